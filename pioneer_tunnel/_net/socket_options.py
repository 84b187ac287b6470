"""What lies at the bottom of a connection, told and asked directly: a socket.

`LentSocket` is one whose bytes move past its stream; the functions are what neither Trio nor the standard library has a
word for.

Neighbours: `dialer` makes sockets; `tcp_stream`, `channel_stream`, `data_channels` stand on them; `splice` joins two;
`endings` ends one.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias, final

import trio

try:
    import fcntl
    import termios
except ModuleNotFoundError:  # Windows has neither
    _CAN_ASK_UNSENT = False
else:
    _CAN_ASK_UNSENT = sys.platform == "linux"

__all__ = [
    "LentSocket",
    "Socket",
    "descriptor_of",
    "keep_alive",
    "lent_below",
    "limit_unsent",
    "plain_socket",
    "reset_on_close",
    "socket_below",
    "wait_sent",
]

_RESET: Final = struct.pack("ii", 1, 0)
_FIN: Final = struct.pack("ii", 0, 0)
_UNSENT_LIMIT: Final = 256 * 1024
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.01


Socket: TypeAlias = trio.socket.SocketType | socket.socket


def descriptor_of(sock: Socket) -> int:
    """The socket's descriptor, asked for anew each time: when it is closed, its number soon is somebody else's."""
    descriptor = sock.fileno()
    if descriptor == -1:
        raise trio.ClosedResourceError("this stream was closed")
    return descriptor


@final
class LentSocket:
    """The socket of a stream, lent to whoever moves bytes past the stream. Every close of it goes through here.

    While it `resets`, only `close` ends the connection with a FIN. All else that closes the socket is a RST, the kernel
    after the death of this process and the garbage collector included. So a truncated stream never looks complete.

    Args:
        socket: what is lent.
        resets: whether it does so already: what is accepted inherits it from its listener.

    Attributes:
        socket, resets: as above.
        waited_for: whether Trio was ever asked to wait for it. Only then closing has to wake who waits.
        on_close: the owner's; called when it was closed, by the borrower or through here.
        taken_back: the borrower's; called when the stream is closed meanwhile, just before its socket is.
    """

    __slots__ = ("on_close", "resets", "socket", "taken_back", "waited_for")

    def __init__(self, socket: Socket, *, resets: bool = False) -> None:
        self.socket: Final = socket
        self.resets = resets
        self.waited_for = False
        self.on_close: Callable[[], None] | None = None
        self.taken_back: Callable[[], None] | None = None

    def take_back(self) -> None:
        """The stream is about to close the socket."""
        if self.taken_back is not None:
            self.taken_back()

    def arm_reset(self) -> None:
        """Let every end but `close` be a RST."""
        if not self.resets:
            self.resets = True
            reset_on_close(self.socket)

    def disarm_reset(self) -> None:
        """Let every end but `reset` be a FIN."""
        if self.resets:
            self.resets = False
            with suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN)

    def close(self) -> None:
        """Close it in good order: what was sent still arrives. The borrower does so once both directions have ended."""
        self.disarm_reset()
        self.drop()

    def reset(self) -> None:
        """Close it with a RST, which drops what has not been sent."""
        self.arm_reset()
        self.drop()

    def drop(self) -> None:
        """Close it, with a RST if `resets` is True."""
        if self.waited_for and isinstance(self.socket, socket.socket) and self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)  # Trio's own do so themselves
        self.socket.close()
        if self.on_close is not None:
            self.on_close()


def socket_below(stream: object) -> Socket | None:
    """The socket at the bottom of a stream, however deep below TLS and wrappers."""
    found = getattr(_innermost(stream), "socket", None)
    return found if isinstance(found, (trio.socket.SocketType, socket.socket)) else None


def lent_below(stream: object) -> LentSocket | None:
    """The same, as what it is closed by."""
    lent: LentSocket | None = getattr(_innermost(stream), "plain_socket", None)
    if lent is None and (found := socket_below(stream)) is not None:
        lent = LentSocket(found)
    return lent


def _innermost(stream: object) -> object:
    innermost: Any = stream
    while hasattr(innermost, "transport_stream"):
        innermost = innermost.transport_stream
    return innermost


def plain_socket(stream: trio.abc.Stream) -> LentSocket | None:
    """The socket whose bytes are those of `stream`, when nothing stands between and nothing was read ahead."""
    found: LentSocket | None = getattr(stream, "plain_socket", None)
    return found


def keep_alive(sock: Socket, *, idle: int = 20, interval: int = 8) -> None:
    """Have the system find out when the other end of a silent connection is gone, and NATs not forget it.

    Args:
        idle: seconds of silence after which it asks.
        interval: seconds after which it asks again; after some such questions without an answer the connection breaks.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def limit_unsent(sock: Socket) -> None:
    """Let the system take 256 KiB beyond what is on its way, and no more.

    By itself it takes megabytes, which then lie before whoever wants to say a last word. The 16 KiB of Trio's streams
    make a large send many small ones.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_LIMIT)


def _unsent(descriptor: int) -> int:
    """Bytes that the other end has not acknowledged."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


async def wait_sent(sock: Socket) -> None:
    """Wait until the other end has acknowledged all that was sent, where the system tells."""
    pause = _FIRST_PAUSE
    while _CAN_ASK_UNSENT and sock.fileno() != -1 and _unsent(sock.fileno()):
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def reset_on_close(sock: Socket) -> None:
    """Let closing `sock` be a RST, which drops what it has not sent. What a listener accepts then is like that, too."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
