"""Completion in bash, as docs/command-line.md sets it up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from click.shell_completion import ShellComplete
from rig import HANG

from pioneer_tunnel.cli.commands import pioneer_tunnel

pytestmark = pytest.mark.usefixtures("user_config")

SCRIPT: Final = """
eval "$(_PIONEER_TUNNEL_COMPLETE=bash_source pioneer-tunnel)" || exit 9
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_pioneer_tunnel_completion pioneer-tunnel
printf '%s\\n' "${COMPREPLY[@]}"
"""
FOLDER: Final = Path(sys.executable).parent


@pytest.mark.skipif(
    shutil.which("bash") is None or not (FOLDER / "pioneer-tunnel").exists(), reason="there is no bash, or no script"
)
def test_bash_completes() -> None:
    environment = os.environ | {"PATH": f"{FOLDER}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", "pioneer-tunnel", "expose", "--transport", "t"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    assert done.stdout.split() == ["tcp", "tls"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ex"], ["expose"]),
        (["key", "s"], ["set", "show-id"]),
        (["expose", "--key"], ["--key-mode", "--key-file"]),
        (["expose", "--transport", "t"], ["tcp", "tls"]),
    ],
)
def test_what_is_offered(words: list[str], offered: list[str]) -> None:
    completion = ShellComplete(pioneer_tunnel, {}, "pioneer-tunnel", "_PIONEER_TUNNEL_COMPLETE")
    assert [item.value for item in completion.get_completions(words[:-1], words[-1])] == offered
