"""How a connection ends: with EOF, with a last answer that still arrives, or with a reset. For any Trio stream."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import trio

from .socket_options import reset_on_close
from .streams import ByteStream

__all__ = ["abandon", "bottom_of", "close_after_answer", "send_eof"]

_PIECE: Final = 64 * 1024
_IGNORED_LIMIT: Final = 4 * 1024 * 1024
_GOODBYE_TIMEOUT: Final = 2.0


async def send_eof(stream: trio.abc.Stream) -> None:
    """Send EOF if the stream supports half-close; otherwise close it."""
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
    else:
        await stream.aclose()


async def close_after_answer(stream: trio.abc.Stream) -> None:
    """Close after a last answer to a peer that may still be sending, so that the answer arrives. Takes up to 2 seconds.

    Closing a socket with unread data sends a RST, and the peer may lose data that we had already sent. So what still
    comes is read and dropped, up to 4 MiB of it.
    """
    with trio.move_on_after(_GOODBYE_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await send_eof(stream)
        ignored = 0
        while ignored < _IGNORED_LIMIT and (data := await stream.receive_some(_PIECE)):
            ignored += len(data)
    await stream.aclose()


async def abandon(stream: trio.abc.AsyncResource) -> None:
    """Close a connection at once so that the peer sees a reset, not an orderly end. Never blocks, also when cancelled.

    A tunnel stream is reset. A socket is closed with a RST, also below TLS and other streams that have a
    `transport_stream`. Anything else is closed forcefully.
    """
    # Shielded: a caller that abandons two streams must abandon the second one also when it is cancelled.
    with trio.CancelScope(shield=True):
        if isinstance(stream, ByteStream):
            await stream.abort()
            return
        bottom = bottom_of(stream)
        if isinstance(bottom, ByteStream):
            await bottom.abort()
        elif hasattr(bottom, "reset"):
            bottom.reset()
        elif isinstance(bottom, trio.SocketStream) and bottom.socket.fileno() != -1:
            reset_on_close(bottom.socket)
        await trio.aclose_forcefully(stream)


def bottom_of(stream: object) -> object:
    """Follow Trio's `transport_stream` from a stream that is not ours to one of ours, or else to the lowest one."""
    bottom: Any = stream
    while not isinstance(bottom, ByteStream) and not hasattr(bottom, "reset") and hasattr(bottom, "transport_stream"):
        bottom = bottom.transport_stream
    return bottom
