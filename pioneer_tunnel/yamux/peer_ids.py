"""The stream ids that the peer has used, so that none is opened twice.

Ids grow, but SYNs may arrive out of order: tasks that open streams in parallel may send their SYNs in any order
(hashicorp/yamux does). So a skipped id may still be used. Skipped ids are stored as ranges, so a SYN costs the same
however many ids it skips. At most 1024 ranges are kept; the ids of a lower range then count as used.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import final

from .._model.errors import RemoteProtocolError

__all__ = ["MAX_REMEMBERED_GAPS", "PeerIds"]

MAX_REMEMBERED_GAPS = 1024


@final
class PeerIds:
    """The ids of one parity: 1 when the peer is the client, 0 when it is the server."""

    __slots__ = ("_firsts", "_highest", "_lasts", "_parity")

    def __init__(self, parity: int) -> None:
        self._parity = parity
        self._highest = parity - 2
        # Gap i is the skipped ids from _firsts[i] to _lasts[i], both included. Gaps are sorted and do not touch.
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __contains__(self, stream_id: int) -> bool:
        """Whether this id has the peer's parity."""
        return stream_id % 2 == self._parity

    def were_opened(self, stream_id: int) -> bool:
        """Whether the peer has opened a stream with this id, which has its parity."""
        return stream_id <= self._highest and self._gap_with(stream_id) is None

    def open(self, stream_id: int) -> None:
        """Record that the peer opens a stream.

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
