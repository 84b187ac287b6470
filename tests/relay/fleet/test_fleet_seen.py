"""The state file of a node, which its workers share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Final

import pytest
from programs import SOURCE
from rig import HANG

from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel.relay.fleet.claims import Claim, sign_claim
from pioneer_tunnel.relay.fleet.names import FleetNames
from pioneer_tunnel.relay.fleet.seen import SeenFile

HOST: Final = "blog.box.example.com"
IDENTITY: Final = SigningIdentity.from_seed(b"n" * 32)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[FleetNames]]:
    """What two workers of a node know of names."""
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            seen = SeenFile(tmp_path / "state.db")
            stack.enter_context(seen.opened())
            nodes = {"fra1": IDENTITY.public_key}
            made.append(FleetNames("fra1", IDENTITY, nodes, seen, reserved=(), wall_clock=lambda: 0.0))
        yield made


def claim(key: str, since: int) -> Claim:
    return sign_claim("fra1", IDENTITY, host=HOST, keys=frozenset({key}), since=since)


async def test_a_claim_that_another_worker_has_just_seen_counts(workers: list[FleetNames]) -> None:
    """The earliest one does, whatever a worker has in memory."""
    one, other = workers
    late, early, between = claim("late", 30), claim("early", 10), claim("between", 20)
    assert await one._take(late) == late
    assert await other._take(early) == early
    assert await one._take(between) == early
    assert await one.keys_of(HOST) == await other.keys_of(HOST) == {"early"}


BEGIN: Final = """
import sys
from pathlib import Path
from pioneer_tunnel.relay.fleet.seen import SeenFile

print("ready", flush=True)
sys.stdin.readline()
for round in range(2):
    seen = SeenFile(Path(sys.argv[1]) / f"state-{round}.db")
    with seen.opened():
        pass
    with seen.opened():
        seen.note_name(sys.argv[2], b"x", replaces=lambda _: True)
"""


def test_processes_that_begin_at_once_share_one_file(tmp_path: Path) -> None:
    names = [f"{number}.test" for number in range(4)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                Popen([sys.executable, "-c", BEGIN, str(tmp_path), name], stdin=PIPE, stdout=PIPE, cwd=SOURCE)
            )
            for name in names
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [process.wait(HANG) for process in processes] == [0] * len(names)
    for number in range(2):
        seen = SeenFile(tmp_path / f"state-{number}.db")
        with seen.opened():
            assert [host for host, _ in seen.names("", 100)] == names
        assert (tmp_path / f"state-{number}.db").stat().st_mode & 0o777 == 0o600
