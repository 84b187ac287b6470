"""Which stream ids the peer has used, so that one is never taken for new twice.

Ids go up, but not in order: openers that run in parallel may put their SYNs on the wire in any order (the reference
does), so an id that was left out may still come. What was left out is remembered as ranges, the last 1024 of them, so
that a SYN costs the same however far it jumps.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import final

from .._model.errors import RemoteProtocolError

__all__ = ["MAX_REMEMBERED_GAPS", "PeerIds"]

MAX_REMEMBERED_GAPS = 1024


@final
class PeerIds:
    """The ids of one parity: 1 for a peer that is the client, 0 for one that is the server."""

    __slots__ = ("_firsts", "_highest", "_lasts", "_parity")

    def __init__(self, parity: int) -> None:
        self._parity = parity
        self._highest = parity - 2
        # Gap number i goes from _firsts[i] to _lasts[i], both included; gaps are in order and do not touch.
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __contains__(self, stream_id: int) -> bool:
        """Whether this id is the peer's to open, opened or not."""
        return stream_id % 2 == self._parity

    def were_opened(self, stream_id: int) -> bool:
        """Whether the peer has ever opened a stream with this id of its own."""
        return stream_id <= self._highest and self._gap_with(stream_id) is None

    def open(self, stream_id: int) -> None:
        """The peer opens a stream.

        Raises:
            RemoteProtocolError: the id is not the peer's, or it was used before.
        """
        if stream_id not in self:
            raise RemoteProtocolError(f"SYN for stream {stream_id}, which is of this end's parity")
        if stream_id > self._highest:
            if stream_id > self._highest + 2:
                self._insert(len(self._firsts), self._highest + 2, stream_id - 2)
            self._highest = stream_id
            return
        gap = self._gap_with(stream_id)
        if gap is None:
            raise RemoteProtocolError(f"SYN for stream {stream_id}, an id that was used before")
        first, last = self._firsts.pop(gap), self._lasts.pop(gap)
        if stream_id < last:
            self._insert(gap, stream_id + 2, last)
        if first < stream_id:
            self._insert(gap, first, stream_id - 2)

    def _gap_with(self, stream_id: int) -> int | None:
        gap = bisect_right(self._firsts, stream_id) - 1
        return gap if gap >= 0 and stream_id <= self._lasts[gap] else None

    def _insert(self, gap: int, first: int, last: int) -> None:
        self._firsts.insert(gap, first)
        self._lasts.insert(gap, last)
        if len(self._firsts) > MAX_REMEMBERED_GAPS:
            del self._firsts[0], self._lasts[0]
