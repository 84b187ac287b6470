"""Many connections side by side, over plain sockets, so that the tunnel is what is measured.

A connection is a generator that yields what its socket has to be ready for, and `Loop` resumes it then. Where time is
measured to the microsecond, sockets block instead.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Generator
from typing import Final, TypeAlias, final

__all__ = ["END", "HOST", "PATIENCE", "PIECE", "READ", "WRITE", "Endpoint", "Loop", "Steps", "receive", "send"]

HOST: Final = "bench.test"
PATIENCE: Final = 60.0

Endpoint: TypeAlias = tuple[str, int]
Steps: TypeAlias = Generator[int, None, None]

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
PIECE: Final = 256 * 1024
END: Final = b"\r\n\r\n"
_SENT: Final = memoryview(os.urandom(PIECE))
_RECEIVED: Final = bytearray(4 * PIECE)


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
            OSError: one of them failed. All are closed.
        """
        with self._epoll:
            try:
                while self._running:
                    self._step(patience)
            finally:
                for sock, _, _ in self._running.values():
                    sock.close()

    def _step(self, patience: float | None) -> None:
        ready = self._epoll.poll(patience)
        if not ready:
            raise TimeoutError(f"{len(self._running)} connections stand still for {patience} seconds")
        for descriptor, _ in ready:
            sock, steps, waiting_for = self._running[descriptor]
            wanted = next(steps, None)
            if wanted is None:
                del self._running[descriptor]
                if sock.fileno() >= 0:
                    self._epoll.unregister(descriptor)
                    sock.close()
            elif wanted != waiting_for:
                self._epoll.modify(descriptor, wanted)
                self._running[descriptor] = sock, steps, wanted


def send(sock: socket.socket, amount: int) -> Steps:
    while amount:
        yield WRITE
        amount -= sock.send(_SENT[:amount])


def receive(sock: socket.socket, amount: int) -> Steps:
    while amount:
        yield READ
        received = sock.recv_into(_RECEIVED)
        if not received:
            raise ConnectionError(f"the connection ended {amount} bytes too early")
        amount -= received
