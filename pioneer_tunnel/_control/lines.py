"""Lines from a stream, of bounded length."""

from __future__ import annotations

from typing import Final, final

import trio

from .._model.errors import RemoteProtocolError

__all__ = ["LONGEST_LINE", "Lines"]

LONGEST_LINE: Final = 256 * 1024
"""Bytes of a message. The longest are answers, such as a list of tunnels."""

_PIECE: Final = 64 * 1024


@final
class Lines:
    """Reads lines. Not more than one task may read.

    Args:
        stream: where they come from.
    """

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream: Final = stream
        self._received: Final = bytearray()

    async def next(self) -> bytearray | None:
        """The next line, without its end; None at EOF. A part of a line before EOF is dropped.

        Raises:
            RemoteProtocolError: it is longer than 256 KiB.
            trio.BrokenResourceError: the peer is gone.
        """
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > LONGEST_LINE:
                raise RemoteProtocolError(f"a line of more than {LONGEST_LINE} bytes")
            # No deadline: a client that watches says nothing. There are few clients, and all are of this user.
            data = await self._stream.receive_some(_PIECE)
            if not data:
                return None
            self._received.extend(data)
        line = self._received[:end]
        del self._received[: end + 1]
        return line
