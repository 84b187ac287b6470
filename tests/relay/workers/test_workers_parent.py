"""The parent, with workers that follow a plan: they refuse to start, die, or get stuck."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
from rig import eventually, no_hang

from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.relay.reload import ConfigFile
from pioneer_tunnel.relay.workers import parent as parent_module, process as process_module
from pioneer_tunnel.relay.workers.parent import Parent
from pioneer_tunnel.relay.workers.process import NoWorker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no workers there")

WORKER: Final = """
import json, os, pathlib, socket, struct, sys, time

plan = pathlib.Path(sys.argv[1])
mode, *rest = plan.read_text().split()
plan.write_text(" ".join(rest or [mode]))
parent = socket.socket(fileno=int(os.environ["PIONEER_TUNNEL_WORKER"]))

def read(amount):
    data = b""
    while len(data) < amount:
        piece = parent.recv(amount - len(data))  # without room for descriptors, the kernel closes them
        if not piece:
            sys.exit()
        data += piece
    return data

while True:
    length, _ = struct.unpack("!IB", read(5))
    message = json.loads(read(length))
    if message["method"] == "end" or (message["method"] == "drain" and mode == "serves"):
        sys.exit()
    if "call" not in message:
        continue
    answer = {"answer": message["call"], "result": None}
    if message["method"] == "start":
        if mode == "refuses":
            answer = {"answer": message["call"], "error": "the key cannot be read", "kind": "io"}
        if mode == "dies-at-once":
            sys.exit(3)
        if mode == "never-ready":
            time.sleep(3600)
    elif mode == "stuck":
        time.sleep(3600)
    body = json.dumps(answer).encode()
    parent.sendall(struct.pack("!IB", len(body), 0) + body)
    if mode == "dies":
        sys.exit(7)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(parent_module, "FIRST_DELAY", 0.02)
    caplog.set_level(logging.INFO)


def parent_of(folder: Path, *plan: str, workers: int = 1) -> Parent:
    """The plan has a word for each process that is started; the last one holds for all others."""
    path = folder / "relay.toml"
    path.write_text(
        '[relay]\ncontrol_addr = "127.0.0.1:0"\ningress_addr = "127.0.0.1:0"\nid = "r"\npublic_names = ["r.test"]\n'
        "drain_timeout_ms = 0\n"
    )
    (folder / "plan").write_text(" ".join(plan))
    file = ConfigFile(path)
    command = [sys.executable, "-E", "-S", "-c", WORKER, str(folder / "plan")]
    return Parent(file, file.load(), workers, command=command)


@asynccontextmanager
async def serving(parent: Parent) -> AsyncIterator[None]:
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(parent.serve)
            yield
            await parent.drain()


def listens(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often a worker has begun to listen."""
    return lambda: sum(getattr(record, "event", "") == "worker_listens" for record in caplog.records)


@pytest.mark.parametrize(
    ("plan", "why", "kind"),
    [
        ("refuses", "the key cannot be read", ErrorKind.IO),
        ("dies-at-once", "it has ended: exit status 3", None),
    ],
)
async def test_a_relay_whose_workers_do_not_start_does_not_start(
    tmp_path: Path, plan: str, why: str, kind: ErrorKind | None
) -> None:
    with no_hang(), pytest.raises(NoWorker, match=why) as failed:
        await parent_of(tmp_path, plan).serve()
    assert failed.value.kind is kind


async def test_a_worker_that_dies_is_started_again_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = listens(caplog)
    async with serving(parent_of(tmp_path, "dies", "dies", "refuses", "dies-at-once", "serves")):
        await eventually(lambda: count() == 3)
    said = [record.getMessage().partition(", process")[0] for record in caplog.records if record.levelname == "ERROR"]
    assert said == [
        "worker 0",  # it has ended
        "worker 0",
        "worker 0 cannot be started: the key cannot be read",
        "worker 0 cannot be started: it has ended: exit status 3",
    ]
    assert caplog.text.count("has ended: exit status 7; another one is started") == 2


async def test_a_worker_that_is_stuck_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "LOOK_INTERVAL", 0.05)
    monkeypatch.setattr(process_module, "STUCK_AFTER", 0.5)
    count = listens(caplog)
    parent = parent_of(tmp_path, "stuck", "serves")
    async with serving(parent):
        await eventually(lambda: count() > 1)
    assert "is stuck: it did not answer within 0.5 seconds" in caplog.text
    assert "has ended: killed by SIGKILL; another one is started" in caplog.text


async def test_a_worker_that_does_not_drain_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parent_module, "STUCK_TIMEOUT", 0.1)
    async with serving(parent_of(tmp_path, "goes-on", workers=2)):
        assert listens(caplog)() == 2
    assert "ERROR" not in caplog.text


async def test_a_restart_that_fails_leaves_the_worker_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = parent_of(tmp_path, "serves", "refuses", "serves")
    async with serving(parent):
        (first,) = parent.overview.pids
        await parent.restart()
        assert "there is no successor of worker 0, and it goes on: the key cannot be read" in caplog.text
        await eventually(lambda: parent.overview.pids == [first])
        await parent.restart()
        assert "all workers are replaced" in caplog.text
        await eventually(lambda: first not in parent.overview.pids)
        assert len(parent.overview.pids) == 1


async def test_a_worker_of_a_restart_is_not_replaced_by_one_that_was_due_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker dies while another one is about to come in its place."""
    count = listens(caplog)
    parent = parent_of(tmp_path, "serves")
    async with serving(parent), trio.open_nursery() as nursery:
        (slot,) = parent._slots
        (first,) = parent.overview.pids
        async with slot.changing:
            nursery.start_soon(parent.restart)
            await eventually(lambda: slot.changing.statistics().tasks_waiting == 1)
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: slot.changing.statistics().tasks_waiting == 2)
        await eventually(lambda: not parent._replacing.child_tasks)
        assert count() == 2


async def test_a_worker_that_is_never_ready_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "END_TIMEOUT", 0.1)
    parent = parent_of(tmp_path, "serves", "never-ready", "serves")
    async with serving(parent):
        monkeypatch.setattr(process_module, "START_TIMEOUT", 0.3)
        (first,) = parent.overview.pids
        await parent.restart()
        assert "it did not listen within 0.3 seconds" in caplog.text
        await eventually(lambda: parent.overview.pids == [first])
