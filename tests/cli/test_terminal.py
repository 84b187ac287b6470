"""What a person sees at a terminal: a question for the key, a QR code, the bar of `run`, colours, and a clean end."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import pytest
from click.testing import CliRunner
from programs import KEY, PROGRAM, SOURCE, Relay, running
from rig import HANG

from pioneer_tunnel.cli.commands import pioneer_tunnel

pytestmark = pytest.mark.usefixtures("user_config")

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")
fcntl = pytest.importorskip("fcntl")

IN_A_TERMINAL: Final = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@final
class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *arguments: str | Path, columns: int, lines: int, variables: Mapping[str, str]) -> None:
        self._own, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (lines, columns))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm-256color", **variables}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", IN_A_TERMINAL, *PROGRAM, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        self.said = ""

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + HANG
        while re.search(pattern, ESCAPE.sub("", self.said)) is None:
            if select.select([self._own], [], [], 1)[0]:
                self.said += os.read(self._own, 65536).decode()
            else:
                assert self.process.poll() is None, self.said
                assert time.monotonic() < deadline, self.said

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def finish(self) -> int:
        deadline = time.monotonic() + HANG
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.said
            if select.select([self._own], [], [], 0.05)[0]:
                self.said += os.read(self._own, 65536).decode()
        while select.select([self._own], [], [], 0)[0]:
            self.said += os.read(self._own, 65536).decode()
        assert termios.tcgetattr(self._theirs) == self.before, "the terminal is as it was"
        assert self.said.rfind("\x1b[?25l") <= self.said.rfind("\x1b[?25h"), "the cursor is there"
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._own)
        os.close(self._theirs)


@contextmanager
def terminal(
    *arguments: str | Path, columns: int = 80, lines: int = 40, variables: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    opened = Terminal(*arguments, columns=columns, lines=lines, variables=variables or {})
    try:
        yield opened
    finally:
        opened.close()


def test_the_key_is_asked_for_and_not_echoed(shared_relay: Relay, local_gateway: str) -> None:
    with terminal("expose", local_gateway, "--relay", shared_relay.url) as person:
        person.wait_for(r"relay key \(it is not shown\):")
        person.type(f"{KEY.reveal()}\n")
        person.wait_for("connected .*http://office.test")
        person.wait_for("▄▄▄▄▄")  # the QR code
        person.type("\x03")
        assert person.finish() == 0
        assert KEY.reveal() not in person.said


def test_ctrl_c_at_the_question_leaves_a_terminal_with_an_echo(shared_relay: Relay) -> None:
    with terminal("expose", "8000", "--relay", shared_relay.url) as person:
        person.wait_for("relay key")
        person.type("\x03")
        assert person.finish() == 130


@pytest.mark.parametrize(
    ("lines", "options", "shown"),
    [
        (40, [], True),
        (20, [], False),
        pytest.param(20, ["--qr"], True, marks=pytest.mark.slow),
        pytest.param(40, ["--no-qr"], False, marks=pytest.mark.slow),
    ],
)
def test_a_qr_code_is_there_where_it_fits_or_is_asked_for(
    shared_relay: Relay, local_gateway: str, lines: int, options: list[str], shown: bool
) -> None:
    key = shared_relay.folder / "key"
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", shared_relay.url, "--key-file", key, *options]
    with terminal(*arguments, lines=lines) as person:
        person.wait_for("connected .*http://office.test")
        person.type("\x03")
        assert person.finish() == 0
        assert ("▄▄▄▄▄" in person.said) == shown


def gateway(folder: Path, relay: Relay, local: str) -> Path:
    config = folder / "gateway.toml"
    config.write_text(f'[gateway.remote_access]\nrelay_addr = "{relay.url}"\nlocal_addr = "{local}"\n')
    for command, stdin in ((["key", "set"], KEY.reveal()), (["enable"], "")):
        assert CliRunner().invoke(pioneer_tunnel, [*command, "--config", str(config)], input=stdin).exit_code == 0
    return config


@pytest.mark.parametrize("columns", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_run_has_a_bar_that_goes_away_at_the_end(
    shared_relay: Relay, tmp_path: Path, local_gateway: str, columns: int
) -> None:
    config = gateway(tmp_path, shared_relay, local_gateway)
    with terminal("run", "--config", config, columns=columns) as person:
        person.wait_for(r"● connected  0:00:0[1-9]")
        assert shared_relay.ask("/one").endswith(b"hello from /one")
        person.wait_for("visitors: 0 now, 1 so far")
        lines = re.split(r"[\r\n]+", ESCAPE.sub("", person.said))
        bars = [line for line in lines if line.startswith(("●", "  vis"))]
        assert max(map(len, bars)) <= columns
        person.type("\x03")
        assert person.finish() == 0
        assert re.search(r"\rstopped *\r\n", ESCAPE.sub("", person.said))
        assert "\x1b[2K" in person.said[person.said.rindex("●") :], "the bar was cleared"


@pytest.mark.parametrize(
    ("variables", "coloured"), [({}, True), pytest.param({"NO_COLOR": "1"}, False, marks=pytest.mark.slow)]
)
def test_colours_are_for_terminals_and_not_with_no_color(
    shared_relay: Relay, tmp_path: Path, local_gateway: str, variables: dict[str, str], coloured: bool
) -> None:
    config = gateway(tmp_path, shared_relay, local_gateway)
    with terminal("run", "--config", config, variables=variables) as person:
        person.wait_for("● connected")
        person.type("\x03")
        assert person.finish() == 0
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[[0-9;]*97", person.said)) == coloured


def test_there_are_no_escapes_where_there_is_no_terminal(
    shared_relay: Relay, tmp_path: Path, local_gateway: str
) -> None:
    config = gateway(tmp_path, shared_relay, local_gateway)
    with running("run", "--config", config, "--qr") as program:
        program.wait_for("connected")
        assert program.interrupt(signal.SIGINT) == 0
        assert b"\x1b" not in program.err
        assert "▄" not in program.errors
