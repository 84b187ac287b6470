"""Which stream ids the peer has used, so that one is never taken for new twice.

Ids go up, but not in order: openers that run in parallel may put their SYNs on the wire in any order (the reference
does), so an id that was left out may still come. Of those the last 1024 are remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, final

from ..errors import RemoteProtocolError

__all__ = ["MAX_REMEMBERED_GAPS", "PeerIds"]

MAX_REMEMBERED_GAPS: Final = 1024


@final
class PeerIds:
    """The ids of one parity: 1 for a peer that is the client, 0 for one that is the server."""

    __slots__ = ("_gaps", "_highest", "_parity")

    def __init__(self, parity: int) -> None:
        self._parity = parity
        self._highest = parity - 2
        self._gaps: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, stream_id: int) -> bool:
        """Whether this id is the peer's to open, opened or not."""
        return stream_id % 2 == self._parity

    def were_opened(self, stream_id: int) -> bool:
        """Whether the peer has ever opened a stream with this id of its own."""
        return stream_id <= self._highest and stream_id not in self._gaps

    def open(self, stream_id: int) -> None:
        """The peer opens a stream.

        Raises:
            RemoteProtocolError: the id is not the peer's, or it was used before.
        """
        if stream_id not in self:
            raise RemoteProtocolError(f"SYN for stream {stream_id}, which is of this end's parity")
        if stream_id > self._highest:
            for gap in range(max(self._highest + 2, stream_id - 2 * MAX_REMEMBERED_GAPS), stream_id, 2):
                self._gaps[gap] = None
            while len(self._gaps) > MAX_REMEMBERED_GAPS:
                self._gaps.popitem(last=False)
            self._highest = stream_id
        elif stream_id in self._gaps:
            del self._gaps[stream_id]
        else:
            raise RemoteProtocolError(f"SYN for stream {stream_id}, an id that was used before")
