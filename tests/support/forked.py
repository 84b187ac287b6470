"""`pioneer-tunnel` as a process of its own that has not to import anything: the imports take most of a short run.

A process beside pytest, one for each of its workers, has imported the command line. It forks for each program, which
from there on is what `python -m pioneer_tunnel` is. The rest of this module is what a test has in hand: the few methods
of `subprocess.Popen` that tests of programs use.

Linux only, for `pidfd_open`. Whoever tests the start itself, or what a process inherits, starts one with `subprocess`.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final, final

__all__ = ["CAN_FORK", "Forked", "end_server"]

# What coverage measures is started by `exec`: it does not follow forks.
CAN_FORK: Final = hasattr(os, "pidfd_open") and "COVERAGE_PROCESS_CONFIG" not in os.environ
_one_at_a_time: Final = threading.Lock()
_LIMIT: Final = 1024 * 1024
_SOURCE: Final = Path(__file__).parents[2]


@final
class Forked:
    """A program that runs.

    Args:
        arguments: of `pioneer-tunnel`.
        stdin, stderr: descriptors that it gets; None for `/dev/null`, and for a pipe.
        environment: all its variables.
        cwd: its folder.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: int | None,
        stderr: int | None,
        environment: Mapping[str, str],
        cwd: Path | None,
    ) -> None:
        self.args: Final = arguments
        self.stdin: Final[IO[bytes] | None] = None
        self.returncode: int | None = None
        out, its_out = os.pipe()
        ended, its_end = os.pipe()
        given = [its_out, its_end]
        err = None
        if stdin is None:
            stdin = os.open(os.devnull, os.O_RDONLY)
            given.append(stdin)
        if stderr is None:
            err, stderr = os.pipe()
            given.append(stderr)
        asked = json.dumps([arguments, dict(environment), str(cwd or Path.cwd())])
        with _one_at_a_time:
            _, server = _server()
            socket.send_fds(server, [asked.encode()], [stdin, its_out, stderr, its_end])
            self.pid: Final = int(server.recv(100))
        for descriptor in given:
            os.close(descriptor)
        self.stdout: Final[IO[bytes]] = os.fdopen(out, "rb")
        self.stderr: Final[IO[bytes] | None] = None if err is None else os.fdopen(err, "rb")
        self._ended: Final = os.fdopen(ended, "rb")

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """Read to the end of both streams, and wait for the exit status."""
        deadline = time.monotonic() + timeout
        read: dict[IO[bytes], bytearray] = {}
        with selectors.DefaultSelector() as waiting:
            for stream in (self.stdout, self.stderr):
                if stream is not None and not stream.closed:
                    waiting.register(stream, selectors.EVENT_READ)
                    read[stream] = bytearray()
            while waiting.get_map():
                ready = waiting.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                for key, _ in ready:
                    assert not isinstance(key.fileobj, int)
                    stream = next(each for each in read if each is key.fileobj)
                    data = os.read(stream.fileno(), 65536)
                    read[stream] += data
                    if not data:
                        waiting.unregister(stream)
                        stream.close()
        self.wait(max(deadline - time.monotonic(), 0))
        return bytes(read.get(self.stdout, b"")), b"" if self.stderr is None else bytes(read.get(self.stderr, b""))

    def send_signal(self, number: int) -> None:
        """Does nothing after its end, as far as that is known."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = int(self._ended.read())
            self._ended.close()
        return self.returncode


@functools.cache
def _server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process that forks, and how it is asked to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LIMIT)
    changes = {"PYTHONPATH": str(_SOURCE), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, __file__, str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=os.environ | changes
        )
    return process, ours


def end_server() -> None:
    """End the process that forks, if there is one."""
    if _server.cache_info().currsize:
        process, server = _server()
        server.close()
        process.wait()


# What runs in the process that forks


def _serve(requests: socket.socket) -> list[str]:
    """Fork at each request. Returns in the new process, with its arguments; does not return when the tests end."""
    running: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in running:
                pid, end = running.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(end, str(status).encode())
                os.close(end)
                continue
            asked, descriptors, _, _ = socket.recv_fds(requests, _LIMIT, 4)
            if not asked:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                return _become(json.loads(asked), descriptors, [requests.detach(), *_flat(running)])
            *given, end = descriptors
            for each in given:
                os.close(each)
            new = os.pidfd_open(pid)
            running[new] = pid, end
            poll.register(new, select.POLLIN)
            requests.send(str(pid).encode())


def _flat(running: dict[int, tuple[int, int]]) -> list[int]:
    return [descriptor for pidfd, (_, end) in running.items() for descriptor in (pidfd, end)]


def _become(asked: list[object], descriptors: list[int], others: list[int]) -> list[str]:
    arguments, environment, cwd = asked
    assert isinstance(arguments, list)
    assert isinstance(environment, dict)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, standard)
    for descriptor in {*descriptors, *others}:
        os.close(descriptor)
    os.chdir(str(cwd))
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, and its end is the end of this
    gc.disable()
    import pioneer_tunnel.cli.commands  # noqa: F401

    gc.enable()
    gc.freeze()
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.orig_argv[:] = [sys.executable, "-m", "pioneer_tunnel", *arguments]
    sys.argv[1:] = arguments
    runpy.run_module("pioneer_tunnel", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
