"""Ctrl-C while a real program starts: no traceback, exit status 130. A host keeps its own handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from programs import SOURCE
from rig import HANG

from pioneer_tunnel._interrupts import INTERRUPTED

WAITING: Final = b"waiting\n"

HOOK: Final = """
import os, sys, time

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["WAIT_AT"]:
            os.write(1, b"waiting\\n")
            time.sleep(600)

sys.meta_path.insert(0, Hook())
"""
"""A `sitecustomize` that waits when a module is imported."""

SCRIPT: Final = "import sys\nfrom pioneer_tunnel.cli import main\nsys.exit(main())\n"
"""What pip installs for `pioneer-tunnel`."""


def waiting_at(module: str, folder: Path, *command: str | Path) -> subprocess.Popen[bytes]:
    """A process that has come to the import of `module`."""
    (folder / "sitecustomize.py").write_text(HOOK)
    environment = os.environ | {"WAIT_AT": module, "PYTHONPATH": f"{folder}{os.pathsep}{SOURCE}"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == WAITING, process.communicate()
    return process


@pytest.mark.parametrize("module", ["pioneer_tunnel._deprecation", "trio", "click", "pioneer_tunnel.cli.commands"])
@pytest.mark.parametrize("by_name", [True, False])
def test_an_interrupted_start_ends_without_a_traceback(tmp_path: Path, module: str, by_name: bool) -> None:
    script = tmp_path / "pioneer-tunnel"
    script.write_text(SCRIPT)
    command = [script] if by_name else ["-m", "pioneer_tunnel"]
    with waiting_at(module, tmp_path, *command, "relay", "new-key") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=HANG) == (b"", b"")
    assert process.returncode == INTERRUPTED == 130


EXAMPLES: Final = ("custom_server", "embedded_gateway", "remote_access_client", "small_gateway")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_interrupted_start_of_an_example_too(tmp_path: Path, example: str) -> None:
    with waiting_at("trio", tmp_path, SOURCE / "examples" / f"{example}.py") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=HANG) == (b"", b"")
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("command", [["-c", "import pioneer_tunnel"], ["-m", "hosting"]])
def test_a_host_keeps_its_handler(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "hosting.py").write_text("import pioneer_tunnel")
    with waiting_at("trio", tmp_path, *command) as process:
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=HANG)[1]
    assert process.returncode == -signal.SIGINT


def test_a_program_that_ignores_sigint_goes_on_to_do_so(tmp_path: Path) -> None:
    """As one that a shell runs in the background, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = waiting_at("trio", tmp_path, "-m", "pioneer_tunnel", "--version")
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        process.send_signal(signal.SIGINT)
        process.terminate()
        process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGTERM
