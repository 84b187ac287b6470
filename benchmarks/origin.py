"""The origin: `python -m benchmarks.origin PORT` (port 0 takes a free one, and it prints which).

A visitor begins with a request head, which a relay may route by, and whose framing it may follow; then come bytes:

    GET /down/N    the origin sends N bytes, and ends
    PUT /up/N      it takes N bytes, and answers with one
    PUT /echo      it sends back what comes, until the visitor ends
    PUT /late      the same, but each time it waits a little before it does
    GET /http      it answers each request with `ANSWER`, and the connection is kept
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress
from typing import Final

from .connections import END, PIECE, READ, WRITE, Loop, Steps, receive, send
from .processes import allow_many_descriptors

__all__ = ["ANSWER", "BODY", "LATE", "serve"]

LATE: Final = 0.004
"""Seconds, much longer than a tunnel works for a byte."""

BODY: Final = b"hello"
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n" + BODY


def serve(listener: socket.socket) -> None:
    """Be the origin, until interrupted."""
    loop = Loop()

    def accept() -> Steps:
        while True:
            yield READ
            with suppress(OSError):
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loop.start(sock, _answer(sock))

    loop.start(listener, accept())
    loop.run(patience=None)


def _answer(sock: socket.socket) -> Steps:
    received = b""
    with suppress(OSError):  # the visitor's trouble, who tells
        while END not in received:
            yield READ
            data = sock.recv(PIECE)
            if not data:
                return
            received += data
        head, _, rest = received.partition(END)
        _, target, _ = head.split(b" ", 2)
        match target.split(b"/"):
            case [b"", b"down", amount]:
                yield from send(sock, int(amount))
            case [b"", b"up", amount]:
                yield from receive(sock, int(amount) - len(rest))
                sock.send(b".")
            case [b"", b"late"]:
                yield from _echo(sock, rest, delay=LATE)
            case [b"", b"http"]:
                yield from _http(sock, received)
            case _:
                yield from _echo(sock, rest)


def _http(sock: socket.socket, received: bytes) -> Steps:
    while True:
        requests = received.count(END)
        if requests:
            received = received[received.rindex(END) + len(END) :]
            sock.send(requests * ANSWER)
        yield READ
        data = sock.recv(PIECE)
        if not data:
            return
        received += data


def _echo(sock: socket.socket, data: bytes, *, delay: float = 0) -> Steps:
    while True:
        if delay:
            time.sleep(delay)
        left = memoryview(data)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                yield WRITE
        yield READ
        data = sock.recv(PIECE)
        if not data:
            return


if __name__ == "__main__":
    allow_many_descriptors()
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096) as origin, suppress(KeyboardInterrupt):
        print(origin.getsockname()[1], flush=True)
        serve(origin)
