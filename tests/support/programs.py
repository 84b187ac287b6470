"""The real command line, as a process, with a relay and a local server to go with it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, Final, final

import pytest
from rig import HANG, free_port

from pioneer_tunnel import __main__ as entry_point
from pioneer_tunnel._model.keys import RelayKey

PROGRAM: Final = [sys.executable, "-m", "pioneer_tunnel"]
SOURCE: Final = Path(entry_point.__file__).parents[1]
KEY: Final = RelayKey("ptk1_the-key-of-the-tests-0123456789abcdef")


@final
class Program:
    """One run of `pioneer-tunnel`, with what it has printed so far.

    Args:
        stderr: its standard error; by default a pipe, which `wait_for` reads. None is a descriptor that is closed.
        source: the folder that holds the package; by default the one that is tested.
        command: what starts it, before its arguments.
        pass_fds: descriptors that it inherits.
        stdin: its standard input; by default an empty one.
    """

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        stderr: int | IO[bytes] | None = subprocess.PIPE,
        source: Path = SOURCE,
        command: Sequence[str] = PROGRAM,
        pass_fds: Sequence[int] = (),
        stdin: int | IO[str] | None = subprocess.DEVNULL,
    ) -> None:
        self.arguments = [*map(str, arguments)]
        environment = os.environ | {"COLUMNS": "400", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error"}
        environment["PYTHONPATH"] = str(source)
        closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if stderr is None else []
        self.process = subprocess.Popen(
            [*closed, *command, *self.arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            cwd=cwd,
            pass_fds=pass_fds,
        )
        self.out = b""
        self.err = b""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read standard error until it has what is looked for."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + HANG
        while (found := re.search(pattern, self.err.decode())) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.err.decode()!r}"
            if select.select([self.process.stderr], [], [], left)[0]:
                data = os.read(self.process.stderr.fileno(), 65536)
                assert data, f"it ended with {self.err.decode()!r} before it said {pattern!r}"
                self.err += data
        return found

    def finish(self) -> int:
        """Wait for its end; returns the exit status."""
        out, err = self.process.communicate(timeout=HANG)
        self.out += out
        self.err += err or b""
        assert b"Traceback" not in self.err
        return self.process.returncode

    def interrupt(self, by: signal.Signals) -> int:
        self.process.send_signal(by)
        return self.finish()

    @property
    def errors(self) -> str:
        return " ".join(self.err.decode().split())


@contextmanager
def running(
    *arguments: str | Path,
    cwd: Path | None = None,
    stderr: int | IO[bytes] | None = subprocess.PIPE,
    source: Path = SOURCE,
    stdin: int | IO[str] | None = subprocess.DEVNULL,
) -> Iterator[Program]:
    program = Program(*arguments, cwd=cwd, stderr=stderr, source=source, stdin=stdin)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.process.kill()
        for pipe in (program.process.stdout, program.process.stderr):
            if pipe is not None:
                pipe.close()
        program.process.wait()


def run(*arguments: str | Path, cwd: Path | None = None, stderr: int | IO[bytes] | None = subprocess.PIPE) -> Program:
    with running(*arguments, cwd=cwd, stderr=stderr) as program:
        program.finish()
        return program


class Gateway(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"hello from {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, which is empty; none of the developer's own variables is there."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    for name in [*os.environ]:
        if name == "NO_COLOR" or (name.startswith("PIONEER_TUNNEL_") and "TEST" not in name):
            monkeypatch.delenv(name)
    return folder


@pytest.fixture
def local_gateway() -> Iterator[str]:
    """A local HTTP gateway's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@final
class Relay:
    def __init__(self, folder: Path, program: Program, url: str, ingress: int) -> None:
        self.folder, self.program, self.url, self.ingress = folder, program, url, ingress

    def ask(self, path: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.ingress), timeout=HANG) as visitor:
            visitor.sendall(f"GET {path} HTTP/1.0\r\nHost: office.test\r\n\r\n".encode())
            return b"".join(iter(lambda: visitor.recv(65536), b""))

    def ask_until(self, path: str, answer: bytes) -> None:
        """Ask until the answer ends like that, for programs whose standard error is not read."""
        deadline, answered = time.monotonic() + HANG, b""
        while not answered.endswith(answer):
            assert time.monotonic() < deadline, answered
            with contextlib.suppress(ConnectionRefusedError):
                answered = self.ask(path)
            time.sleep(0.05)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """A relay in a process of its own, and the key file of its one tunnel beside its configuration."""
    with relay_in(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def shared_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """The same for all tests of a module that leave it running."""
    with relay_in(tmp_path_factory.mktemp("relay")) as started:
        yield started


@contextmanager
def relay_in(folder: Path, *, source: Path = SOURCE, more: str = "", workers: int | None = None) -> Iterator[Relay]:
    """See `relay`. `more` are lines of its configuration."""
    control, ingress = free_port(), free_port()
    (folder / "relay.toml").write_text(
        f"""
        [relay]
        control_addr = "127.0.0.1:{control}"
        ingress_addr = "127.0.0.1:{ingress}"
        id = "relay-1"
        public_names = ["127.0.0.1:{control}"]
        {more}

        [[relay.tunnels]]
        id = "office"
        url = "http://office.test"
        key = "{KEY.identity().public_key}"
        """
    )
    key_file(folder, KEY.reveal() + "\n")
    with_workers = [] if workers is None else ["--workers", str(workers)]
    with running("relay", *with_workers, "--config", folder / "relay.toml", source=source) as program:
        program.wait_for("gateways at")
        yield Relay(folder, program, f"ws://127.0.0.1:{control}", ingress)
        if program.process.poll() is None:
            assert program.interrupt(signal.SIGTERM) == 0
        assert KEY.reveal().encode() not in program.out + program.err


def key_file(folder: Path, text: str) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(0o600)
    return path
