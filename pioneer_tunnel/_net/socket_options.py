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
from contextlib import suppress
from typing import Final, TypeAlias

import trio

try:
    import fcntl
    import termios
except ModuleNotFoundError:  # Windows has neither
    _CAN_ASK_UNSENT = False
else:
    _CAN_ASK_UNSENT = sys.platform == "linux"

__all__ = [
    "Socket",
    "descriptor_of",
    "fin_on_close",
    "keep_alive",
    "limit_unsent",
    "reset_on_close",
    "wait_sent",
]

_FIN: Final = struct.pack("ii", 0, 0)
_RESET: Final = struct.pack("ii", 1, 0)
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


def fin_on_close(sock: Socket) -> None:
    """Undo `reset_on_close`: closing `sock` sends a FIN."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN)


def reset_on_close(sock: Socket) -> None:
    """Let closing `sock` be a RST, which drops what it has not sent. What a listener accepts then is like that, too."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
