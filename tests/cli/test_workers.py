"""`relay --workers N` as an operator runs it: real processes that are killed, replaced, reloaded and stopped."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
from programs import Program, Relay, relay_in, running
from restart_trial import Load, disturb_under_load

LISTENS: Final = r"worker {}, process (\d+), listens"


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with relay_in(tmp_path, workers=2) as started:
        yield started


@contextmanager
def exposed(relay: Relay, local: str) -> Iterator[Program]:
    """A gateway that is connected."""
    with running("expose", local, "--relay", relay.url, "--key-file", relay.folder / "key") as gateway:
        gateway.wait_for("connected .*http://office.test")
        yield gateway
        assert gateway.interrupt(signal.SIGTERM) == 0


def pid_of(relay: Relay, worker: int) -> int:
    """The process of a worker, as the log says it last."""
    relay.program.wait_for(LISTENS.format(worker))
    return int(re.findall(LISTENS.format(worker), relay.program.err.decode())[-1])


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(rate=20, kept=2, downloads=2, seconds=3.0, before=1.0), id="short"),
        pytest.param(
            Load(rate=50, kept=6, downloads=12, seconds=8.0, before=2.0, restarts=2), id="long", marks=pytest.mark.slow
        ),
    ],
)
async def test_replacing_the_workers_fails_no_request(relay: Relay, load: Load) -> None:
    async def replace(number: int) -> None:
        relay.program.process.send_signal(signal.SIGUSR2)
        said = rf"(?s)(?:all workers are replaced.*?){{{number}}}"
        await trio.to_thread.run_sync(relay.program.wait_for, said)

    before = pid_of(relay, 0), pid_of(relay, 1)
    figures = await disturb_under_load(relay, load, replace)
    assert (figures.failed, figures.kept_failed, figures.downloads_failed) == ([], [], [])
    assert figures.requests > load.rate * load.before
    assert figures.downloads == load.downloads
    assert {*before}.isdisjoint({pid_of(relay, 0), pid_of(relay, 1)})
    assert relay.program.process.poll() is None


async def ask_all(relay: Relay, amount: int) -> list[bytes]:
    """Ask over so many connections side by side; returns the answers."""
    answers: list[bytes] = []

    async def ask(stream: trio.SocketStream) -> None:
        async with stream:
            answers.append(b"".join([data async for data in stream]))

    async with trio.open_nursery() as nursery:
        for number in range(amount):
            stream = await trio.open_tcp_stream("127.0.0.1", relay.ingress)
            await stream.send_all(f"GET /{number} HTTP/1.0\r\nHost: office.test\r\n\r\n".encode())
            nursery.start_soon(ask, stream)
    return answers


@pytest.mark.parametrize("worker", [0, 1])
async def test_who_waits_at_a_worker_that_is_killed_is_served_by_its_successor(
    relay: Relay, local_gateway: str, worker: int
) -> None:
    """One of the two has the gateway, which is the harder case, and the other one has not."""
    with exposed(relay, local_gateway):
        killed = pid_of(relay, worker)
        os.kill(killed, signal.SIGSTOP)  # so that it accepts nobody
        async with trio.open_nursery() as nursery:
            answers: list[bytes] = []

            async def ask() -> None:
                answers.extend(await ask_all(relay, 20))

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            assert len(answers) < 20
            os.kill(killed, signal.SIGKILL)
        assert len(answers) == 20
        assert [answer[:15] for answer in answers] == [b"HTTP/1.0 200 OK"] * 20
        await trio.to_thread.run_sync(
            relay.program.wait_for, rf"worker {worker}, process {killed}, has ended: killed by SIGKILL"
        )
        assert pid_of(relay, worker) != killed
