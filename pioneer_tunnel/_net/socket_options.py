"""Options and state of sockets that neither Trio nor the standard library has a function for."""

from __future__ import annotations

import errno
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
    "means_loss",
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
    """The socket's descriptor. Do not keep it: after a close the kernel may give the number to another socket.

    Raises:
        trio.ClosedResourceError: it is closed.
    """
    descriptor = sock.fileno()
    if descriptor == -1:
        raise trio.ClosedResourceError("this stream was closed")
    return descriptor


def keep_alive(sock: Socket, *, idle: int = 20, interval: int = 8) -> None:
    """Turn on TCP keepalive, so that a dead peer is noticed and NATs keep the connection.

    Args:
        idle: seconds of silence before the first probe.
        interval: seconds between probes. After some probes without an answer the connection breaks.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def limit_unsent(sock: Socket) -> None:
    """Let the kernel buffer at most 256 KiB that it has not sent yet (TCP_NOTSENT_LOWAT).

    The default is megabytes, and a last answer would wait behind them. The 16 KiB that Trio's streams set cut a large
    send into many small ones.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_LIMIT)


def means_loss(error: BaseException | None) -> bool:
    """Whether a send that fails with `error` took the kernel's only report of a reset or a timeout.

    A receive then gets EOF, although the peer did not send one. After EPIPE it gets what the peer has sent: we have
    sent our end, or the peer has sent its end before it reset the connection.
    """
    return isinstance(error, OSError) and error.errno != errno.EPIPE


def _unsent(descriptor: int) -> int:
    """Bytes that the peer has not acknowledged."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


async def wait_sent(sock: Socket) -> None:
    """Wait until the peer has acknowledged all that was sent (Linux; elsewhere return at once)."""
    pause = _FIRST_PAUSE
    while _CAN_ASK_UNSENT and sock.fileno() != -1 and _unsent(sock.fileno()):
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def fin_on_close(sock: Socket) -> None:
    """Undo `reset_on_close`: closing `sock` sends a FIN."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN)


def reset_on_close(sock: Socket) -> None:
    """Closing `sock` sends a RST and drops unsent data. Sockets that a listener accepts inherit this."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
