"""Visitors of a relay, in one process: `python -m benchmarks.scaling.visitors PORT TUNNELS COUNT AT_ONCE REQUESTS`.

COUNT visitors come, AT_ONCE at a time, each to another of the tunnels. Each asks so many requests on its connection,
one after the other, and closes it. Prints how many seconds it took.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

from ..processes import LOOPBACK
from .relays import ANSWER, host_of

TIMEOUT: Final = 60.0


def come(port: int) -> socket.socket:
    """A visitor of a relay."""
    visitor = socket.create_connection((LOOPBACK, port), TIMEOUT)
    visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return visitor


def request(visitor: socket.socket, tunnel: int) -> None:
    """Ask for something."""
    visitor.sendall(f"GET / HTTP/1.1\r\nHost: {host_of(tunnel)}\r\n\r\n".encode())


def await_answer(visitor: socket.socket) -> None:
    """Wait for the answer of a request."""
    answer = b""
    while len(answer) < len(ANSWER):
        data = visitor.recv(4096)
        if not data:
            raise SystemExit(f"the answer ends: {answer!r}")
        answer += data
    if answer != ANSWER:
        raise SystemExit(f"not the answer: {answer!r}")


def ask(visitor: socket.socket, tunnel: int) -> None:
    """Send a request, and wait for the answer."""
    request(visitor, tunnel)
    await_answer(visitor)


def visit(port: int, tunnel: int, requests: int) -> None:
    with closing(come(port)) as visitor:
        for _ in range(requests):
            ask(visitor, tunnel)


def main() -> None:
    port, tunnels, count, at_once, requests = map(int, sys.argv[1:])
    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as threads:
        results: Iterator[None] = threads.map(lambda number: visit(port, number % tunnels, requests), range(count))
        for _ in results:
            pass
    print(time.monotonic() - began)


if __name__ == "__main__":
    main()
