"""`reaper`: what a test has started ends with the run, however the run ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from rig import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")]

LEAVES = """
import subprocess, sys, time
from pathlib import Path
from typing import Final

CHILD = (
    "import os, subprocess, sys, time\\n"
    "grandchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\\n"
    "open('started', 'w').write(f'{os.getpid()} {grandchild.pid} {os.getppid()} ')\\n"
    "time.sleep(600)"
)

def test_leaves_a_process_behind():
    subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    while Path("started").read_text()[-1:] != " ":
        time.sleep(0.01)
    while STAYS:
        time.sleep(600)
"""


def pytest_run(folder: Path, *arguments: str, stays: bool) -> subprocess.Popen[str]:
    (folder / "started").touch()
    (folder / "test_leaves.py").write_text(LEAVES.replace("STAYS", str(stays)))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "reaper", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent / "support"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def started(folder: Path) -> list[int]:
    return [int(word) for word in (folder / "started").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


WORKERS: Final = ("-p", "xdist", "-n", "1")


@pytest.mark.parametrize("arguments", [(), WORKERS], ids=["alone", "with workers"])
def test_a_run_that_is_killed_leaves_no_process(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with pytest_run(tmp_path, *arguments, stays=True) as run:
        wait_until(lambda: len(started(tmp_path)) == 3)
        assert all(map(is_alive, started(tmp_path)))
        run.kill()
        wait_until(lambda: not any(map(is_alive, started(tmp_path))))


def test_a_run_that_leaves_a_process_fails_and_names_it(tmp_path: Path) -> None:
    with pytest_run(tmp_path, *WORKERS, stays=False) as run:
        said = run.communicate()[0]
    child, grandchild, _ = started(tmp_path)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, said
    assert "1 passed" in said
    assert f"{child}: {sys.executable}" in said
    assert f"{grandchild}: sleep 600" in said
    assert not any(map(is_alive, (child, grandchild)))
