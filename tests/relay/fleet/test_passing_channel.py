"""The channels between the workers of a machine: what one of them passes on, and another takes."""

from __future__ import annotations

import os
import random
import resource
import socket
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from node_rig import PASSED
from rig import eventually, no_hang

from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.turn import Turn
from pioneer_tunnel.relay.fleet.passed_message import MOST_RECEIVED, encode_passed, parse_passed
from pioneer_tunnel.relay.fleet.passing import RETRY_INTERVAL, VISITORS, Channel, SocketPassing, Source
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.visitors.passing import Passed

PROCESSES: Final = ("a" * 16, "b" * 16)


def sequential_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


HOSTILE: Final[dict[str, tuple[bytes, int]]] = {
    "no message": (b"?", 1),
    "an unknown stage": (b"\xff" + bytes(8), 1),
    "texts that are cut": (encode_passed(PASSED)[:-3], 1),
    "no descriptor": (encode_passed(PASSED), 0),
    "two descriptors": (encode_passed(PASSED), 2),
    "too long": (bytes(200 * 1024), 1),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_message_that_makes_no_sense_leaves_nothing_open(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    content, amount = HOSTILE[kind]
    there, here = sequential_pair()
    taken: list[Passed] = []
    with no_hang(), there, here, Stay() as stay:
        here.setblocking(False)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
        source = Source(here, taken.append, stay)
        source.begin()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(there, [content], [theirs.fileno()] * amount)
            if amount:
                ours.settimeout(0)
            there.shutdown(socket.SHUT_WR)
            await stay.wait()
            source.stop()
            assert ours.recv(1) == b""  # every descriptor is closed
    assert taken == []
    assert "visitors that were passed on are lost" in caplog.text


async def test_a_connection_that_cannot_be_taken_costs_the_others_of_its_message_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, here = sequential_pair()
    taken: list[bytes] = []

    def take(passed: Passed) -> None:
        os.close(passed.descriptor)
        if passed.received == b"1":
            raise LookupError("a bug")
        taken.append(passed.received)

    with no_hang(), there, here, Stay() as stay:
        here.setblocking(False)
        Source(here, take, stay).begin()
        together = [PASSED._replace(received=b"%d" % number) for number in range(3)]
        message = b"".join(encode_passed(passed) + passed.received for passed in together)
        socket.send_fds(there, [message], [there.fileno()] * len(together))
        there.shutdown(socket.SHUT_WR)
        await stay.wait()
    assert taken == [b"0", b"2"]
    assert "a connection failed in an unforeseen way" in caplog.text


async def test_a_process_without_descriptors_takes_those_that_it_can() -> None:
    there, here = sequential_pair()
    taken: list[Passed] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with no_hang(), there, here, Stay() as stay:
        here.setblocking(False)
        pairs = [socket.socketpair() for _ in range(3)]
        channel = Channel(random.Random(1), lambda amount: None)
        channel.socket = there

        def pass_on() -> None:
            for number, (_, theirs) in enumerate(pairs):
                passed = PASSED._replace(descriptor=theirs.detach(), received=bytes([number]))
                channel.send_soon(passed, taken.append)

        Turn.current().run(pass_on)  # in one message
        source = Source(here, taken.append, stay)
        source.begin()
        there.shutdown(socket.SHUT_WR)
        held = [os.dup(there.fileno()) for _ in range(3)]
        os.close(free := held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            await stay.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            source.stop()
        assert [passed.received for passed in taken] == [b"\0"]
        os.close(taken[0].descriptor)
        for descriptor in held:
            os.close(descriptor)
        for ours, _ in pairs:
            ours.settimeout(0)
            assert ours.recv(1) == b""  # every descriptor is closed
            ours.close()


async def test_a_full_channel_takes_no_more_and_loses_nothing() -> None:
    here, there = sequential_pair()
    with here, there:
        here.setblocking(False)
        counts: list[int] = []
        channel = Channel(random.Random(1), counts.append)
        channel.socket = here
        ours, theirs = socket.socketpair()
        with ours, theirs:
            passed = PASSED._replace(descriptor=theirs.fileno(), received=bytes(1000))
            count = 0
            while channel.send(passed):
                count += 1
            assert count
            assert counts == [1] * count
            left: list[Passed] = []
            Turn.current().run(partial(channel.send_soon, passed, left.append))
            assert left == [passed]
            os.fstat(passed.descriptor)  # whoever has it now closes it
            for _ in range(count):
                message, descriptors, _, _ = socket.recv_fds(there, 4096, 1)
                assert parse_passed(message, descriptors) == ([passed._replace(descriptor=descriptors[0])], True)
                os.close(descriptors[0])
            assert channel.send(passed)
            assert not channel.send(passed._replace(received=bytes(MOST_RECEIVED + 1)))
            there.close()
            assert not channel.send(passed)


@pytest.mark.parametrize("process", [PROCESSES[1], None])
async def test_a_process_that_takes_none_is_tried_seldom_and_a_worker_soon(
    process: str | None, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Another process of the worker may begin at any time. A gateway that takes a hop until then takes it for good."""
    (tmp_path / "workers").mkdir(mode=0o700)
    network = WorkerNetwork("m/0", PROCESSES[0], tmp_path / "workers", lambda _pid: None, workers=2)
    began = trio.current_time()
    await Channel(random.Random(1), lambda amount: None).run(network, "m/1", process)
    assert (trio.current_time() - began <= RETRY_INTERVAL) is (process is None)


async def test_only_workers_may_pass_visitors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "workers").mkdir(mode=0o700)
    network = WorkerNetwork("m/0", PROCESSES[0], tmp_path / "workers", lambda pid: None, workers=2)
    passing = SocketPassing(network, lambda tunnel_id: None, random.Random(1))
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(passing.serve, lambda passed: None)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.connect(str(tmp_path / "workers" / f"{VISITORS}-0"))
                await eventually(lambda: "is refused" in caplog.text)
                assert stranger.recv(1) == b""
            nursery.cancel_scope.cancel()


async def test_a_worker_without_descriptors_takes_visitors_when_it_has_some_again(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir(mode=0o700)
    network = WorkerNetwork("m/0", PROCESSES[0], tmp_path / "workers", lambda pid: None, workers=2)
    passing = SocketPassing(network, lambda tunnel_id: None, random.Random(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with no_hang(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as comer:
        async with trio.open_nursery() as nursery:
            await nursery.start(passing.serve, lambda passed: None)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                comer.connect(str(tmp_path / "workers" / f"{VISITORS}-0"))
                await trio.testing.wait_all_tasks_blocked(0.05)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await trio.to_thread.run_sync(comer.recv, 1) == b""  # it is served: refused, since it is no worker
            nursery.cancel_scope.cancel()
