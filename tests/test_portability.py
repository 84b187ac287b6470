"""The package can be imported, and tunnels work, where the modules of POSIX do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "support" / "without_posix.py"


@pytest.mark.skipif(sys.platform != "linux", reason="it takes away what Linux has")
@pytest.mark.parametrize("kind", ["modules", "windows"])
def test_it_works_without(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM, kind], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it works\n")
