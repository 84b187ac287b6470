"""Both ends of the traffic: an origin, and visitors who measure. Plain sockets, so that the tunnel is what is measured.

A visitor begins with a request head, which a relay may route by, and whose framing it may follow; then come bytes:

    GET /down/N    the origin sends N bytes, and ends
    PUT /up/N      it takes N bytes, and answers with one
    PUT /echo      it sends back what comes, until the visitor ends
    PUT /late      the same, but each time it waits a little before it does

A connection is a generator that yields what its socket has to be ready for, and `Loop` resumes it then. Where time is
measured to the microsecond, sockets block instead.

`python -m benchmarks.traffic PORT` is the origin (port 0 takes a free one, and it prints which).
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Literal, TypeAlias, final

__all__ = ["HOST", "LATE", "Endpoint", "connections_a_second", "dial_echo", "idle_streams", "round_trips", "throughput"]

HOST: Final = "bench.test"
PATIENCE: Final = 60.0
LATE: Final = 0.004
"""Seconds, much longer than a tunnel works for a byte."""

Endpoint: TypeAlias = tuple[str, int]
Steps: TypeAlias = Generator[int, None, None]

_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_PIECE: Final = 256 * 1024
_SENT: Final = memoryview(os.urandom(_PIECE))
_RECEIVED: Final = bytearray(4 * _PIECE)
_END: Final = b"\r\n\r\n"
_ENDLESS: Final = 10**15


@final
class Loop:
    """Runs connections side by side until all have ended, and closes their sockets."""

    def __init__(self) -> None:
        self._epoll: Final = select.epoll()
        self._running: Final[dict[int, tuple[socket.socket, Steps, int]]] = {}

    def start(self, sock: socket.socket, steps: Steps) -> None:
        sock.setblocking(False)
        wanted = next(steps)
        self._epoll.register(sock, wanted)
        self._running[sock.fileno()] = sock, steps, wanted

    def run(self, patience: float | None = PATIENCE) -> None:
        """Run until no connection is left; a running one may start others.

        Raises:
            TimeoutError: nothing at all happened for `patience` seconds.
        """
        with self._epoll:
            while self._running:
                ready = self._epoll.poll(patience)
                if not ready:
                    raise TimeoutError(f"{len(self._running)} connections stand still for {patience} seconds")
                for descriptor, _ in ready:
                    sock, steps, waiting_for = self._running[descriptor]
                    wanted = next(steps, None)
                    if wanted is None:
                        del self._running[descriptor]
                        sock.close()
                    elif wanted != waiting_for:
                        self._epoll.modify(descriptor, wanted)
                        self._running[descriptor] = sock, steps, wanted


# What both ends do


def _send(sock: socket.socket, amount: int) -> Steps:
    while amount:
        yield _WRITE
        amount -= sock.send(_SENT[:amount])


def _receive(sock: socket.socket, amount: int) -> Steps:
    while amount:
        yield _READ
        received = sock.recv_into(_RECEIVED)
        if not received:
            raise ConnectionError(f"the connection ended {amount} bytes too early")
        amount -= received


# The origin


def serve(listener: socket.socket) -> None:
    """Be the origin, until interrupted."""
    loop = Loop()

    def accept() -> Steps:
        while True:
            yield _READ
            with suppress(OSError):
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loop.start(sock, _answer(sock))

    loop.start(listener, accept())
    loop.run(patience=None)


def _answer(sock: socket.socket) -> Steps:
    received = b""
    with suppress(OSError):  # the visitor's trouble, who tells
        while _END not in received:
            yield _READ
            data = sock.recv(_PIECE)
            if not data:
                return
            received += data
        head, _, rest = received.partition(_END)
        _, target, _ = head.split(b" ", 2)
        match target.split(b"/"):
            case [b"", b"down", amount]:
                yield from _send(sock, int(amount))
            case [b"", b"up", amount]:
                yield from _receive(sock, int(amount) - len(rest))
                sock.send(b".")
            case [b"", b"late"]:
                yield from _echo(sock, rest, delay=LATE)
            case _:
                yield from _echo(sock, rest)


def _echo(sock: socket.socket, data: bytes, *, delay: float = 0) -> Steps:
    while True:
        if delay:
            time.sleep(delay)
        left = memoryview(data)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                yield _WRITE
        yield _READ
        data = sock.recv(_PIECE)
        if not data:
            return


# Visitors


def _request(target: str, *, body: int = 0) -> bytes:
    method, framing = ("PUT", f"\r\nContent-Length: {body}") if body else ("GET", "")
    return f"{method} {target} HTTP/1.1\r\nHost: {HOST}{framing}".encode() + _END


def _dial(endpoint: Endpoint, first_bytes: bytes) -> socket.socket:
    sock = socket.create_connection(endpoint, timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(first_bytes)
    return sock


def dial_echo(endpoint: Endpoint, target: Literal["/echo", "/late"] = "/echo") -> socket.socket:
    """An echo that has answered once.

    Raises:
        OSError: it has not.
    """
    sock = _dial(endpoint, _request(target, body=_ENDLESS) + b"?")
    if sock.recv(1) != b"?":
        sock.close()
        raise ConnectionError("the echo does not answer")
    return sock


def throughput(endpoint: Endpoint, direction: Literal["down", "up"], *, streams: int, total: int) -> float:
    """MB/s of all `streams` together, of which each carries its part of `total` bytes."""
    loop, amount = Loop(), total // streams
    started = time.perf_counter()
    for _ in range(streams):
        sock = _dial(endpoint, _request(f"/{direction}/{amount}", body=amount if direction == "up" else 0))
        loop.start(sock, _receive(sock, amount) if direction == "down" else _upload(sock, amount))
    loop.run()
    return total / 1e6 / (time.perf_counter() - started)


def _upload(sock: socket.socket, amount: int) -> Steps:
    yield from _send(sock, amount)
    yield from _receive(sock, 1)


def round_trips(endpoint: Endpoint, count: int) -> list[float]:
    """How long one byte takes there and back, in microseconds, in ascending order."""
    times = []
    with dial_echo(endpoint) as sock:
        for _ in range(count):
            started = time.perf_counter()
            sock.send(b"!")
            if not sock.recv(1):
                raise ConnectionError("the echo ended")
            times.append((time.perf_counter() - started) * 1e6)
    return sorted(times)


def connections_a_second(endpoint: Endpoint, *, count: int, at_once: int) -> float:
    """Connections that send a byte, see it come back and end; `at_once` of them at any time."""
    loop, left = Loop(), iter(range(count))

    def start_next() -> None:
        if next(left, None) is not None:
            sock = socket.socket()
            loop.start(sock, connect(sock))

    def connect(sock: socket.socket) -> Steps:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            sock.connect(endpoint)
        yield _WRITE
        sock.send(_request("/echo", body=_ENDLESS) + b"!")
        yield from _receive(sock, 1)
        start_next()

    started = time.perf_counter()
    for _ in range(at_once):
        start_next()
    loop.run()
    return count / (time.perf_counter() - started)


@contextmanager
def idle_streams(endpoint: Endpoint, count: int) -> Iterator[None]:
    """Connections that have answered once and then stay silent, for the length of a `with`."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(dial_echo(endpoint))
        yield


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096) as origin, suppress(KeyboardInterrupt):
        print(origin.getsockname()[1], flush=True)
        serve(origin)
