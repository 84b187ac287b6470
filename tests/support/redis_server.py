"""A real server for tests, on a Unix socket, and without a file of its data.

It is the redis-server of Debian's package. `TEST_REDIS` names another program that is one, such as `valkey-server`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import pytest
from rig import HANG

if TYPE_CHECKING:
    from pioneer_tunnel.relay.fleet.redis_store import RedisServer

__all__ = ["PROGRAM", "RealRedis", "has_tls", "real_redis", "redis_of_the_module"]

PROGRAM: Final = os.environ.get("TEST_REDIS", "redis-server")


@final
class RealRedis:
    """A server that a test starts, stops and pauses.

    Args:
        folder: of its socket; the path has to be short.
        arguments: more of them.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = ()) -> None:
        self.path: Final = folder / "redis"
        self._away: Final = folder / "away"
        self._arguments: Final = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `redis` of `[relay.fleet]`."""
        return f"unix://{self.path}"

    @property
    def server(self) -> RedisServer:
        from pioneer_tunnel.relay.fleet.redis_store import RedisServer  # an extra

        return RedisServer(path=str(self.path))

    @property
    def runs(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def start(self) -> None:
        """Start it, empty."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [PROGRAM, "--port", "0", "--unixsocket", str(self.path), "--save", "", "--appendonly", "no",
             "--dir", str(self.path.parent), "--daemonize", "no", *self._arguments],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + HANG
        while True:
            try:
                if self.call("PING") == b"+PONG":
                    break
            except OSError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it: its data are lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(HANG)
            self._process = None

    def pause(self) -> None:
        """Stop the process; connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """Close all connections, and take no new ones."""
        self.path.rename(self._away)
        self._call(self._away, "CLIENT", "KILL", "SKIPME", "yes")
        self._call(self._away, "CLIENT", "KILL", "TYPE", "pubsub")

    def mend(self) -> None:
        """Take connections again after `cut`."""
        self._away.rename(self.path)

    def call(self, *words: str | bytes) -> bytes:
        """Run a command, and return the first line of the answer, or the text that it is."""
        return self._call(self.path, *words)

    @staticmethod
    def _call(path: Path, *words: str | bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(HANG)
            connection.connect(str(path))
            parts = [b"*%d\r\n" % len(words)]
            encoded = [word.encode() if isinstance(word, str) else word for word in words]
            parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded]
            connection.sendall(b"".join(parts))
            with connection.makefile("rb") as answers:
                line = answers.readline()
                if line.startswith(b"$") and line != b"$-1\r\n":
                    return answers.read(int(line[1:]))
                return line.rstrip()


def has_tls() -> bool:
    """Whether the server was built with TLS. If so, it misses a certificate here, and does not start."""
    tried = subprocess.run([PROGRAM, "--port", "0", "--tls-port", "1"], capture_output=True, check=False, timeout=HANG)
    return b"No tls-cert-file" in tried.stdout


@contextmanager
def real_redis(*arguments: str) -> Iterator[RealRedis]:
    """A server that runs; it ends with the test."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed: apt-get install {PROGRAM}")
    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        redis = RealRedis(Path(folder), arguments)
        try:
            redis.start()
            yield redis
        finally:
            redis.kill()


@pytest.fixture(scope="module")
def redis_of_the_module() -> Iterator[RealRedis]:
    with real_redis() as redis:
        yield redis
