"""A pytest plugin: no process that a test starts outlives the run, also when pytest is killed.

The run marks its environment, which all processes below it inherit. A small process beside pytest, the reaper, waits on
a pipe for the end of the run, which the kernel reports however pytest ends. It then kills every process that has the
mark. After an orderly end the run fails when there was one.

This needs /proc. Without it the plugin does nothing.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

MARK: Final = "PIONEER_TUNNEL_TEST_RUN"
_GRACE: Final = 3.0
"""Seconds after an orderly end in which what is about to end may do so."""

_LEFT: Final = pytest.StashKey[list[str]]()
_PIPES: Final = pytest.StashKey[tuple[int, int]]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not Path("/proc/self/environ").exists():
        return  # a worker of pytest-xdist inherits the mark
    name = secrets.token_hex(16)
    os.environ[MARK] = f"{os.environ.get(MARK, '')} {name}"  # a run inside a test has the mark of the outer run too
    life, our_life = os.pipe()
    our_report, report = os.pipe()
    try:
        # It starts the reaper and ends, so that pytest itself has no child that its tests could meet.
        subprocess.run(
            [sys.executable, "-I", __file__, name, str(life), str(report)], check=True, pass_fds=(life, report), env={}
        )
    finally:
        os.close(life)
        os.close(report)
    config.stash[_PIPES] = our_life, our_report


@pytest.hookimpl(trylast=True)  # the workers of pytest-xdist have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    pipes = session.config.stash.get(_PIPES, None)
    if pipes is None:
        return
    life, report = pipes
    os.write(life, b"orderly")
    os.close(life)
    with os.fdopen(report) as lines:
        session.config.stash[_LEFT] = left = lines.read().splitlines()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_LEFT, [])
    if left:
        terminalreporter.section("processes that were left behind", red=True)
        for line in left:
            terminalreporter.line(line)


def _reap(name: str, life: int, report: int) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    orderly = bool(os.read(life, 16))
    deadline = time.monotonic() + _GRACE
    while orderly and _marked(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    told: set[int] = set()
    while found := _marked(name):  # again, since they may be starting others
        for process, command in found.items():
            if process not in told:
                told.add(process)
                with suppress(BrokenPipeError):
                    os.write(report, f"{process}: {command}\n".encode())
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _marked(name: str) -> dict[int, str]:
    """The processes that have the mark, with their commands."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f" {name}".encode() in (process / "environ").read_bytes():
                command = (process / "cmdline").read_bytes()
                found[int(process.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


if __name__ == "__main__":
    _reap(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
