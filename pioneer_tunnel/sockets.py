"""What lies at the bottom of a connection, told and asked directly: a socket.

`LentSocket` is one whose bytes move past its stream; the functions are what neither Trio nor the standard library has a
word for.

Neighbours: `streams` and `channel_stream` stand on sockets, `splice` joins two, `endings` ends one.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import trio

if sys.platform == "linux":
    import fcntl
    import termios

__all__ = [
    "LentSocket",
    "descriptor_of",
    "keep_alive",
    "plain_socket",
    "raise_unsent_limit",
    "reset_on_close",
    "unsent",
]

_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_UNSENT_LIMIT: Final = 256 * 1024


def descriptor_of(sock: trio.socket.SocketType) -> int:
    """The socket's descriptor, asked for anew each time: when it is closed, its number soon is somebody else's."""
    descriptor = sock.fileno()
    if descriptor == -1:
        raise trio.ClosedResourceError("this stream was closed")
    return descriptor


@final
class LentSocket:
    """The socket of a stream, lent to whoever moves bytes past the stream.

    Args:
        socket: what is lent.
        on_close: tells the stream that the borrower has closed the connection.

    Attributes:
        taken_back: the borrower's; called when the stream is closed meanwhile, just before its socket is.
    """

    __slots__ = ("_on_close", "socket", "taken_back")

    def __init__(self, socket: trio.socket.SocketType, on_close: Callable[[], None] | None = None) -> None:
        self.socket: Final = socket
        self.taken_back: Callable[[], None] | None = None
        self._on_close = on_close

    def take_back(self) -> None:
        """The stream is about to close the socket."""
        if self.taken_back is not None:
            self.taken_back()

    def close(self) -> None:
        """Both directions have ended, and the borrower closes the connection."""
        self.socket.close()
        if self._on_close is not None:
            self._on_close()

    def forget_owner(self) -> None:
        """It is closed, so nobody will have to be told."""
        self._on_close = None


def plain_socket(stream: trio.abc.Stream) -> LentSocket | None:
    """The socket whose bytes are those of `stream`, when nothing stands between and nothing was read ahead."""
    found: LentSocket | None = getattr(stream, "plain_socket", None)
    return found


def keep_alive(connected: trio.abc.Stream, *, idle: int = 20, interval: int = 8) -> None:
    """Have the system find out when the other end of a silent connection is gone, and NATs not forget it.

    Args:
        connected: something else than a `trio.SocketStream` is left alone.
        idle: seconds of silence after which it asks.
        interval: seconds after which it asks again; after some such questions without an answer the connection breaks.
    """
    if not isinstance(connected, trio.SocketStream):
        return
    with suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval)):
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def raise_unsent_limit(sock: trio.socket.SocketType) -> None:
    """Let there be room for more when a send has had to wait: Trio's 16 KiB make a large one many small ones."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_LIMIT)


def unsent(descriptor: int) -> int:
    """Bytes that the other end has not acknowledged."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def reset_on_close(sock: trio.socket.SocketType) -> None:
    """Let closing `sock` be a RST, which drops what it has not sent."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
