"""Programs that end with the `with` that started them, and what they cost.

Costs are read from /proc, so this is for Linux.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Final, final

import attrs

__all__ = [
    "LOOPBACK",
    "Process",
    "Program",
    "allow_many_descriptors",
    "ended",
    "free_port",
    "running",
    "stopped",
    "wait_until",
    "wait_until_listening",
]

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 10.0


@final
@attrs.frozen
class Process:
    """What a running process has cost so far, and those that it started and that still run."""

    pid: int

    @property
    def cpu(self) -> float:
        """Seconds, user and system, of all threads, and of children that have ended."""
        ticks = sum(sum(map(int, fields[11:15])) for fields in self._tree())
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> float:
        """MiB that are resident. Pages that processes share count for each."""
        pages = sum(int(fields[21]) for fields in self._tree())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _tree(self) -> Iterator[list[str]]:
        """/proc/PID/stat of this process and its descendants, from the third field."""
        found = {int(entry.name): _stat(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        if not found.get(self.pid):
            raise ProcessLookupError(f"there is no process {self.pid}")
        wanted = [self.pid]
        for parent in wanted:
            yield found[parent]
            wanted += [pid for pid, fields in found.items() if fields and int(fields[1]) == parent]


def _stat(entry: Path) -> list[str]:
    try:
        # Its second field, the name, stands in brackets and may hold anything.
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


@final
class Program:
    """A program that can be started again.

    Attributes:
        name: of its log.
    """

    def __init__(self, folder: Path, name: str, command: Sequence[str], *, cwd: Path | None = None) -> None:
        self.name: Final = name
        self._command: Final = command
        self._cwd: Final = cwd or folder
        self._log: Final = folder / f"{name}.log"
        self._running: Popen[bytes] | None = None

    @property
    def process(self) -> Process:
        assert self._running is not None
        return Process(self._running.pid)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def has_ended(self) -> bool:
        return self._running is None or self._running.poll() is not None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._running = Popen(self._command, cwd=self._cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, *, abruptly: bool = False) -> None:
        """End it, with a signal that it cannot handle if `abruptly`."""
        if self._running is None:
            return
        with self._running as process:
            if abruptly:
                process.kill()
            _end(process)
        self._running = None


@contextmanager
def running(folder: Path, name: str, command: Sequence[str], *, cwd: Path | None = None) -> Iterator[Program]:
    """Run `command` in `folder`, or in `cwd`. Its log is in `folder`."""
    program = Program(folder, name, command, cwd=cwd)
    program.start()
    try:
        yield program
    finally:
        program.stop()


@contextmanager
def ended(process: Popen[str]) -> Iterator[Popen[str]]:
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: Popen[str] | Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes, for the length of a `with`. What comes for them meanwhile waits."""
    pids = [*pids]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def wait_until_listening(port: int, *programs: Program) -> None:
    wait_until(lambda: socket.create_connection((LOOPBACK, port)).close(), *programs)


def wait_until(works: Callable[[], None], *programs: Program) -> None:
    """Call `works` until it raises no OSError.

    Raises:
        RuntimeError: one of the programs has ended, or this takes too long. It has their logs.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return works()
        except OSError:
            time.sleep(0.01)
        if time.monotonic() > deadline or any(program.has_ended for program in programs):
            logs = "\n".join(program.log for program in programs)
            raise RuntimeError(f"it does not come up\n{logs}".strip())


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def allow_many_descriptors() -> None:
    """Raise the limit of open files of this process, and those that it starts, as far as it goes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
