"""A real redis-server for tests, on a free port of loopback or with a Unix socket, that keeps nothing on disk."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import pytest
from rig import HANG, free_port

__all__ = ["RedisServer", "redis_server"]

_PROGRAM: Final = "redis-server"


@final
class RedisServer:
    """A server that can be killed, stopped and started again with nothing in it.

    Args:
        folder: for its files.
        password: of the default user; None for no password.

    Attributes:
        url: for `redis` of `[relay.fleet]`.
        socket_url: the same server, by its Unix socket.
        port: its port.
    """

    def __init__(self, folder: Path, *, password: str | None = None) -> None:
        self.port: Final = free_port()
        self.url: Final = f"redis://127.0.0.1:{self.port}/0"
        self._socket: Final = folder / "redis.sock"
        self.socket_url: Final = f"unix://{self._socket}"
        self._folder: Final = folder
        self._password: Final = password
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with nothing in it, and wait until it answers."""
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self._socket),
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
        } | ({} if self._password is None else {"requirepass": self._password})
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen([_PROGRAM, *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + HANG
        while True:
            try:
                self.command("PING")
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL: all that is in it is lost."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: it accepts connections, and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str | bytes) -> bytes:
        """Send a command, as anybody who may write to it can; returns the answer as it comes."""
        with socket.create_connection(("127.0.0.1", self.port), HANG) as connection:
            if self._password is not None:
                _send(connection, "AUTH", self._password)
                connection.recv(4096)
            _send(connection, *words)
            return connection.recv(1024 * 1024)


def _send(connection: socket.socket, *words: str | bytes) -> None:
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    connection.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))


@contextmanager
def redis_server(folder: Path, *, password: str | None = None) -> Iterator[RedisServer]:
    """A server that runs while the block does. The test is skipped where the program is missing."""
    if shutil.which(_PROGRAM) is None:
        pytest.skip(f"{_PROGRAM} is not installed: apt-get install redis-server")
    server = RedisServer(folder, password=password)
    server.start()
    try:
        yield server
    finally:
        server.kill()
