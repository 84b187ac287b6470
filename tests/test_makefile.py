"""`make demo` and `make docs` install what they need, and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rig import HANG

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "installed"),
    [
        ("demo", [".[cli,speed]"]),
        ("docs", [".[cli,speed]", ".[cli,speed,docs]"]),
        ("bench", [".[cli,speed]", ".[cli,speed,bench]"]),
        ("test", [".[cli,speed]", ".[cli,speed,dev]"]),
    ],
)
def test_a_target_installs_what_it_needs(tmp_path: Path, target: str, installed: list[str]) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests" / "interop").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "interop" / "package-lock.json", tmp_path / "tests" / "interop")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    planned = subprocess.run(
        ["make", "--dry-run", target],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    ).stdout
    assert re.findall(r"pip install .* -e '(.*?)'", planned) == installed
    assert planned.count("-m venv .venv") == 1
