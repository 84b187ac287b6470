"""Options and state of sockets that neither Trio nor the standard library has a function for."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from contextlib import suppress
from typing import Final, TypeAlias

import trio

from .delivery import INFO_SIZE, Delivery

try:
    import fcntl
    import termios
except ModuleNotFoundError:  # Windows has neither
    _CAN_ASK = False
else:
    _CAN_ASK = sys.platform == "linux"

__all__ = [
    "UNSENT_LIMIT",
    "Socket",
    "delivery_of",
    "descriptor_of",
    "fin_on_close",
    "forget_round_trip",
    "keep_alive",
    "limit_segment",
    "limit_unsent",
    "means_loss",
    "outlast_silence",
    "resend_within",
    "reset_on_close",
    "send_promptly",
    "source_is_gone",
    "unacknowledged",
    "unsent",
    "wait_sent",
]

_FIN: Final = struct.pack("ii", 0, 0)
_RESET: Final = struct.pack("ii", 1, 0)
UNSENT_LIMIT: Final = 256 * 1024
# Of the kernel's headers; Python has no names for them.
_SIOCOUTQNSD: Final = 0x894B
_TCP_RTO_MAX_MS: Final = 44
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


def keep_alive(sock: Socket, *, idle: int = 20, interval: int = 8, probes: int = 9) -> None:
    """Turn on TCP keepalive, so that a dead peer is noticed and NATs keep the connection.

    Args:
        idle: seconds of silence before the first probe.
        interval: seconds between probes.
        probes: how many of them may stay without an answer before the connection breaks.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", probes)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send_promptly(sock: Socket) -> None:
    """Send small pieces at once, without waiting for more of them (TCP_NODELAY)."""
    _set(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def limit_unsent(sock: Socket, limit: int = UNSENT_LIMIT) -> None:
    """Let the kernel buffer at most `limit` bytes that it has not sent yet (TCP_NOTSENT_LOWAT).

    The system's default is megabytes, and a last answer would wait behind them. The 16 KiB that Trio's streams set cut
    a large send into many small ones.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        _set(sock, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)


def means_loss(error: BaseException | None) -> bool:
    """Whether a send that fails with `error` took the kernel's only report of a reset or a timeout.

    A receive then gets EOF, although the peer did not send one. After EPIPE it gets what the peer has sent: we have
    sent our end, or the peer has sent its end before it reset the connection.
    """
    return isinstance(error, OSError) and error.errno != errno.EPIPE


def resend_within(sock: Socket, seconds: float) -> None:
    """Bound the time after which TCP sends a lost packet again (Linux 6.15; elsewhere it changes nothing).

    It doubles with each attempt, by default up to 120 seconds. So after a pause of the path of 20 seconds TCP may wait
    for 20 more. A bound below the round trip would send packets again that are not lost.
    """
    if sys.platform != "linux":
        return  # the number may mean something else
    _set(sock, socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, round(seconds * 1000))


def outlast_silence(sock: Socket, seconds: float) -> None:
    """Keep the connection while the peer acknowledges nothing for `seconds` (TCP_USER_TIMEOUT).

    By default the kernel counts attempts to send, which come faster with `resend_within`.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        _set(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))


def forget_round_trip(sock: Socket) -> None:
    """Let TCP learn the round trip of the path again. For CUBIC in slow start; otherwise it changes nothing.

    CUBIC leaves slow start when the round trip exceeds the shortest one that the connection has ever had, because that
    should mean that a queue builds up. If the path has become longer since, it stays slow for many seconds. Choosing
    another algorithm and CUBIC again clears its memory, and keeps the congestion window.
    """
    with suppress(AttributeError, OSError):  # the first, where the system has no such option
        algorithm = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        if algorithm == b"cubic":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm)


def limit_segment(sock: Socket, size: int) -> None:
    """Let both ends send packets with at most `size` bytes of data. To be called before it connects."""
    if hasattr(socket, "TCP_MAXSEG"):
        _set(sock, socket.IPPROTO_TCP, socket.TCP_MAXSEG, size)


def unacknowledged(sock: Socket) -> int:
    """Bytes that were written and that the peer has not acknowledged (Linux; elsewhere 0)."""
    return _ask(sock, termios.TIOCOUTQ) if _CAN_ASK else 0


def unsent(sock: Socket) -> int:
    """Bytes that were written and that the kernel has not sent yet (Linux; elsewhere 0)."""
    return _ask(sock, _SIOCOUTQNSD) if _CAN_ASK else 0


def _ask(sock: Socket, request: int) -> int:
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), request, bytes(4)), sys.byteorder)
    except (OSError, ValueError):  # it is closed
        return 0


def delivery_of(sock: Socket) -> Delivery | None:
    """What the kernel knows of the connection; None if this system cannot tell, or it is closed (Linux 5.4)."""
    if not _CAN_ASK:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_SIZE)
    except OSError:
        return None
    return Delivery.parse(info, unacknowledged(sock))


def source_is_gone(sock: Socket) -> bool:
    """Whether this system does not have the address any more from which `sock` is connected."""
    try:
        source = sock.getsockname()
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            probe.bind((source[0], 0, *source[2:]))
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


async def wait_sent(sock: Socket) -> None:
    """Wait until the peer has acknowledged all that was sent (Linux; elsewhere return at once)."""
    pause = _FIRST_PAUSE
    while unacknowledged(sock):
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def fin_on_close(sock: Socket) -> None:
    """Undo `reset_on_close`: closing `sock` sends a FIN."""
    _set(sock, socket.SOL_SOCKET, socket.SO_LINGER, _FIN)


def reset_on_close(sock: Socket) -> None:
    """Closing `sock` sends a RST and drops unsent data. Sockets that a listener accepts inherit this."""
    _set(sock, socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _set(sock: Socket, level: int, option: int, value: int | bytes) -> None:
    """Set an option. If that fails, the socket is broken or closed, and its next use tells."""
    try:  # noqa: SIM105  # `suppress` takes longer than the option, and each visitor needs several
        sock.setsockopt(level, option, value)
    except OSError:
        pass
