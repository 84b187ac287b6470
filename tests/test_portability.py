"""The package can be imported, and tunnels work, where the modules of POSIX do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rig import HANG

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
PROGRAM = TESTS / "support" / "without_posix.py"

CORE = (
    "wire", "tunnel/test_supervisor.py", "tunnel/test_supervisor_links.py", "tunnel/test_supervisor_local_gateway.py",
    "tunnel/test_supervisor_restarts.py", "tunnel/test_tunnel.py", "tunnel/test_tunnel_leaving.py",
    "tunnel/test_tunnel_streams.py", "relay/test_relay.py", "relay/test_relay_for_gateways.py",
    "relay/test_relay_tls.py",
    "relay/test_relay_takeover.py", "relay/test_relay_ghosts.py", "relay/test_relay_candidates.py",
    "relay/test_takeover_rules.py", "relay/test_local_directory.py",
)  # fmt: skip
NOT_THERE = (
    "relay/test_relay_for_gateways.py::test_an_identity_file_that_cannot_be_used_is_named",  # modes of files
    "tunnel/test_tunnel_leaving.py::test_a_clock_that_fails_still_ends_the_watch",  # the clock of Linux
)


@pytest.mark.skipif(sys.platform != "linux", reason="it takes away what Linux has")
@pytest.mark.parametrize("kind", ["modules", "windows"])
def test_it_works_without(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM, kind], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it works\n")


@pytest.mark.skipif(sys.platform != "linux", reason="it takes away what Linux has")
@pytest.mark.timeout(600)  # it runs hundreds of tests
def test_the_tests_of_the_core_pass_without() -> None:
    options = [word for name in NOT_THERE for word in ("--deselect", f"tests/{name}")]
    done = subprocess.run(
        [sys.executable, PROGRAM, "windows", *(f"tests/{name}" for name in CORE), *options],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout
