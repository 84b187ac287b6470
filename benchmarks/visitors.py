"""Visitors, which measure. origin.py says what they can ask for."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Literal, final

import attrs

from .connections import END, HOST, PATIENCE, PIECE, WRITE, Endpoint, Loop, Steps, receive, send
from .origin import ANSWER, BODY
from .processes import ended

__all__ = [
    "Connections",
    "IdleStreams",
    "KeptConnections",
    "bulk_download",
    "connections",
    "dial_echo",
    "percentile",
    "round_trips",
    "stalled_readers",
    "throughput",
]

_ENDLESS: Final = 10**15
_SMALL_BUFFER: Final = 16 * 1024
_AT_ONCE: Final = 50
_FLOWING: Final = 1 << 20
"""Bytes after which a download counts as under way."""


def _request(target: str, *, body: int = 0) -> bytes:
    method, framing = ("PUT", f"\r\nContent-Length: {body}") if body else ("GET", "")
    return f"{method} {target} HTTP/1.1\r\nHost: {HOST}{framing}".encode() + END


_ECHO: Final = _request("/echo", body=_ENDLESS)
_HTTP: Final = _request("/http")


def _dial(endpoint: Endpoint, first_bytes: bytes, *, patience: float = PATIENCE) -> socket.socket:
    sock = socket.create_connection(endpoint, timeout=patience)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(first_bytes)
    return sock


def dial_echo(
    endpoint: Endpoint, target: Literal["/echo", "/late"] = "/echo", *, patience: float = PATIENCE
) -> socket.socket:
    """An echo that has answered once.

    Raises:
        OSError: it has not, for `patience` seconds.
    """
    sock = _dial(endpoint, _request(target, body=_ENDLESS) + b"?", patience=patience)
    try:
        if sock.recv(1) != b"?":
            raise ConnectionError("the echo does not answer")
    except OSError:
        sock.close()
        raise
    return sock


def percentile(ascending: Sequence[float], percent: int) -> float:
    """The value that `percent` of 100 values do not exceed."""
    return ascending[min(len(ascending) * percent // 100, len(ascending) - 1)]


def throughput(endpoint: Endpoint, direction: Literal["down", "up"], *, streams: int, total: int) -> float:
    """MB/s of all `streams` together, of which each carries its part of `total` bytes."""
    loop, amount = Loop(), total // streams
    started = time.perf_counter()
    for _ in range(streams):
        sock = _dial(endpoint, _request(f"/{direction}/{amount}", body=amount if direction == "up" else 0))
        loop.start(sock, receive(sock, amount) if direction == "down" else _upload(sock, amount))
    loop.run()
    return total / 1e6 / (time.perf_counter() - started)


def _upload(sock: socket.socket, amount: int) -> Steps:
    yield from send(sock, amount)
    yield from receive(sock, 1)


def round_trips(endpoint: Endpoint, *, size: int, count: int, seconds: float) -> list[float]:
    """How long `size` bytes take there and back, in µs, in ascending order: `count` times, or for so many seconds."""
    times, payload = list[float](), b"!" * size
    with dial_echo(endpoint) as sock:
        end = time.perf_counter() + seconds
        while len(times) < count and (started := time.perf_counter()) < end:
            sock.send(payload)
            left = size
            while left:
                got = len(sock.recv(left))
                if not got:
                    raise ConnectionError("the echo ended")
                left -= got
            times.append((time.perf_counter() - started) * 1e6)
    return sorted(times)


@contextmanager
def bulk_download(endpoint: Endpoint) -> Iterator[None]:
    """Another process downloads as fast as it can, from the beginning of a `with` to its end."""
    command = [sys.executable, "-m", __name__, endpoint[0], str(endpoint[1])]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise ConnectionError("the download does not begin")
        yield
        if process.poll() is not None:
            raise ConnectionError("the download ended")


def _download(endpoint: Endpoint) -> None:
    buffer, received = bytearray(4 * PIECE), 0
    with _dial(endpoint, _request(f"/down/{_ENDLESS}")) as sock:
        while got := sock.recv_into(buffer):
            received, before = received + got, received
            if before < _FLOWING <= received:
                print("it flows", flush=True)


@final
@attrs.frozen
class Connections:
    """What `connections` found out.

    Attributes:
        rate: how many per second.
        first_byte: from each connect to its first byte, in µs, in ascending order.
    """

    rate: float
    first_byte: list[float]


def connections(endpoint: Endpoint, *, count: int, at_once: int, seconds: float) -> Connections:
    """Connect, send a byte, see it come back and end; with `at_once` of them at any time.

    It ends after `count` of them, or begins no more after so many seconds.
    """
    loop, left, times = Loop(), iter(range(count)), list[float]()

    def start_next() -> None:
        if time.perf_counter() < end and next(left, None) is not None:
            sock = socket.socket()
            loop.start(sock, connect(sock))

    def connect(sock: socket.socket) -> Steps:
        began = time.perf_counter()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            sock.connect(endpoint)
        yield WRITE
        sock.send(_ECHO + b"!")
        yield from receive(sock, 1)
        times.append((time.perf_counter() - began) * 1e6)
        start_next()

    started = time.perf_counter()
    end = started + seconds
    for _ in range(at_once):
        start_next()
    loop.run()
    return Connections(len(times) / (time.perf_counter() - started), sorted(times))


@final
class IdleStreams:
    """Connections that have answered once and then stay silent, for the length of a `with`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint: Final = endpoint
        self._open: Final = ExitStack()
        self._count = 0

    def __enter__(self) -> IdleStreams:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def grow(self, count: int) -> None:
        """Open more, until there are `count`.

        Raises:
            OSError: there cannot be as many.
        """
        loop = Loop()

        def start_next() -> None:
            if self._count < count:
                self._count += 1
                sock = socket.socket()
                loop.start(sock, connect(sock))

        def connect(sock: socket.socket) -> Steps:
            with suppress(BlockingIOError):
                sock.connect(self._endpoint)
            yield WRITE
            sock.send(_ECHO + b"?")
            yield from receive(sock, 1)
            self._open.enter_context(sock.dup())  # the loop closes the other one
            start_next()

        for _ in range(_AT_ONCE):
            start_next()
        loop.run()


@contextmanager
def stalled_readers(endpoint: Endpoint, count: int) -> Iterator[None]:
    """Downloads whose bytes are not read, for the length of a `with`."""
    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            sock.settimeout(PATIENCE)
            sock.connect(endpoint)
            sock.sendall(_request(f"/down/{_ENDLESS}"))
        yield


@final
class KeptConnections:
    """HTTP visitors, each on a connection of its own that has answered once, for the length of a `with`."""

    def __init__(self, endpoint: Endpoint, visitors: int) -> None:
        self._endpoint: Final = endpoint
        self._visitors: Final = visitors
        self._open: Final = ExitStack()
        self._epoll: Final = self._open.enter_context(select.epoll())
        self._received: Final[dict[int, int]] = {}  # of an answer so far
        self._socks: Final[dict[int, socket.socket]] = {}

    def __enter__(self) -> KeptConnections:
        try:
            for _ in range(self._visitors):
                sock = self._open.enter_context(_dial(self._endpoint, _HTTP))
                self._epoll.register(sock, select.EPOLLIN)
                self._socks[sock.fileno()], self._received[sock.fileno()] = sock, 0
            self.await_answers()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def requests(self, seconds: float) -> tuple[int, float]:
        """Send one request after the other on each connection: how many were answered, and how many per second."""
        self.ask_at_once()
        done, started = 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            for descriptor in self._answers():
                done += 1
                self._socks[descriptor].send(_HTTP)
        return done, done / (time.perf_counter() - started)

    def ask_at_once(self) -> None:
        """Send a request on each connection."""
        for sock in self._socks.values():
            sock.send(_HTTP)

    def await_answers(self) -> None:
        """Wait until each connection has an answer."""
        answered = set[int]()
        while len(answered) < self._visitors:
            answered.update(self._answers())

    def _answers(self) -> Iterator[int]:
        """Wait, and tell whose answer is complete."""
        ready = self._epoll.poll(PATIENCE)
        if not ready:
            raise TimeoutError(f"no answer for {PATIENCE} seconds")
        for descriptor, _ in ready:
            data = self._socks[descriptor].recv(PIECE)
            if not data:
                raise ConnectionError("a kept connection was closed")
            if not self._received[descriptor] and not data.startswith(b"HTTP/1.1 200 "):
                raise ConnectionError(f"the answer is {data[:40]!r}")
            self._received[descriptor] += len(data)
            # A proxy may add lines to the head; the body is the end.
            if self._received[descriptor] >= len(ANSWER) and data.endswith(BODY):
                self._received[descriptor] = 0
                yield descriptor


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _download((sys.argv[1], int(sys.argv[2])))
