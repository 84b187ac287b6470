"""How a connection ends: with an end, with a last word that arrives, or with a reset. Whatever stream it is.

Each function looks through TLS and wrappers, by their `transport_stream`, for who can do what is wanted.

Neighbours: everybody who closes a connection that is not just over.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import trio

from .socket_options import reset_on_close, wait_sent

__all__ = ["abandon", "close_after_answer", "drain", "send_eof"]

_PIECE: Final = 64 * 1024
_IGNORED_LIMIT: Final = 4 * 1024 * 1024
_GOODBYE_TIMEOUT: Final = 2.0


async def send_eof(stream: trio.abc.Stream) -> None:
    """End one direction where the stream has such a thing, and the whole stream where it has not."""
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
    else:
        await stream.aclose()


async def close_after_answer(stream: trio.abc.Stream) -> None:
    """Close after a last word to someone who may still be talking, so that the word arrives; 2 seconds at most.

    To close a socket while there is something unread is a reset, and that takes the last word back. So what still
    comes is read, and ignored.
    """
    with trio.move_on_after(_GOODBYE_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await send_eof(stream)
        ignored = 0
        while ignored < _IGNORED_LIMIT and (data := await stream.receive_some(_PIECE)):
            ignored += len(data)
    await stream.aclose()


async def drain(stream: object) -> None:
    """Wait until what `stream` has taken is out of its hands, as far as anybody can tell. The caller sets the deadline.

    For a last word before a RST, which would overtake it.
    """
    innermost: Any = stream
    while not hasattr(innermost, "drain") and hasattr(innermost, "transport_stream"):
        innermost = innermost.transport_stream
    if hasattr(innermost, "drain"):
        await innermost.drain()
    elif isinstance(innermost, trio.SocketStream):
        await wait_sent(innermost.socket)


async def abandon(stream: trio.abc.AsyncResource) -> None:
    """End a connection so that the other end sees a reset, not an orderly end. Quick, also when cancelled.

    A tunnel stream is reset; a socket, however deep below TLS and wrappers, is closed with a RST; anything else is
    closed forcefully.
    """
    innermost: Any = stream
    while not hasattr(innermost, "reset") and hasattr(innermost, "transport_stream"):
        innermost = innermost.transport_stream
    if hasattr(innermost, "reset"):
        innermost.reset()
    elif isinstance(innermost, trio.SocketStream) and innermost.socket.fileno() != -1:
        reset_on_close(innermost.socket)
    # Shielded, or a cancellation would come out of here, and whoever has two streams to abandon abandons one.
    with trio.CancelScope(shield=True):
        await trio.aclose_forcefully(stream)
