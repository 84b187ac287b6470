"""Nodes with several workers each: whichever process a visitor reaches, it gets to its gateway over one hop at most."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import pytest
import trio
from fleet_processes import Fleet, FleetNodeProcess, ask, fleet_of, hashing_gateway
from rig import HANG, eventually, in_background, no_hang

from pioneer_tunnel import Tunnel
from pioneer_tunnel.relay.stats import WorkerStats
from pioneer_tunnel.relay.workers.overview import REPORT_AGE

WORKERS: Final = 2
VISITORS: Final = 12
"""The kernel gives some of so many to each of two workers, but for one test in 2,000."""


@pytest.fixture(scope="module")
def fleet_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("fleet"), "fra1", "ams1", workers=WORKERS) as fleet:
        yield fleet


@pytest.fixture
async def fleet(fleet_of_the_module: Fleet) -> AsyncIterator[Fleet]:
    """A fleet that is whole, before and after the test."""
    yield fleet_of_the_module
    if not fleet_of_the_module.redis.runs:
        fleet_of_the_module.redis.start()
    for node in fleet_of_the_module.nodes:
        if not node.runs:
            await trio.to_thread.run_sync(node.start)
        await eventually(partial(is_whole, node))


async def is_whole(node: FleetNodeProcess) -> bool:
    running = await node.running()
    serving = [worker for worker in running.workers if not worker.draining]
    return len(serving) == WORKERS and running.fleet is not None and running.fleet.redis_reachable


@asynccontextmanager
async def office(fleet: Fleet, *nodes: FleetNodeProcess) -> AsyncIterator[Tunnel]:
    async with fleet.gateway("office", *nodes) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        yield tunnel


async def serves(node: FleetNodeProcess, size: int = 20_000) -> None:
    """Let visitors come to a node, to any of its workers. Each one gets the right answer."""
    body = os.urandom(size)
    wanted = hashlib.sha256(body).hexdigest()

    async def visit() -> None:
        status, answer, address = await ask(node, "office.test", body)
        assert (status, answer) == (200, f"{address} {wanted}"), f"at {node.name}"

    with no_hang():
        async with trio.open_nursery() as nursery:
            for _ in range(VISITORS):
                nursery.start_soon(visit)


async def serves_soon(node: FleetNodeProcess) -> bool:
    with suppress(OSError), trio.move_on_after(2):
        return (await ask(node, "office.test"))[0] == 200
    return False


async def holder(node: FleetNodeProcess) -> WorkerStats:
    """The worker that has the gateway."""
    with no_hang():
        await trio.sleep(REPORT_AGE)  # a report may be of the gateway before
        while len(found := [one for one in (await node.running()).workers if one.sessions_open]) != 1:
            await trio.sleep(0.05)
    return found[0]


async def test_any_worker_of_any_node_leads_to_the_gateway_over_one_hop(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, first):
        await all_reach_it(first)  # the first ones open the channel between the workers
        before = await opened(first)
        for node in fleet.nodes:
            await serves(node)
        # Those of the other machine are hops: they count there. Those of this one are passed to the worker itself.
        assert sorted(now - then for now, then in zip(await opened(first), before, strict=True)) == [0, VISITORS]
        assert (await first.stats()).hops_served_total >= VISITORS
        assert (await second.stats()).hops_served_total == 0
        assert {name for name, trip in (await second.stats()).nodes.items() if trip is not None} == {"fra1"}


async def opened(node: FleetNodeProcess) -> list[int]:
    """The visitors of each worker so far."""
    await trio.sleep(REPORT_AGE)
    return [worker.streams.opened_total for worker in (await node.running()).workers]


async def test_a_killed_worker_costs_what_it_had_and_its_lease_is_broken_at_once(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, first, second):
        for node in fleet.nodes:
            await serves(node)
        record = fleet.redis.call("GET", "pioneer:t:office").decode()
        process, name = record.split("\n")[1].split()[1:3]
        worker = await holder(first)
        assert name == f"fra1/{worker.index}"
        os.kill(worker.pid, signal.SIGKILL)
        with no_hang():
            while fleet.redis.call("GET", f"pioneer:lease:{process}") != b"-":
                await trio.sleep(0.01)
        for node in fleet.nodes:
            await eventually(partial(serves_soon, node))
            await serves(node)


async def test_visitors_of_a_killed_worker_wait_for_the_gateway_at_every_node(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, second, first):
        for node in fleet.nodes:
            await serves(node)
        os.kill((await holder(second)).pid, signal.SIGKILL)
        lease = fleet.redis.call("GET", "pioneer:t:office").decode().split("\n")[1].split()[1]
        with no_hang():
            while fleet.redis.call("GET", f"pioneer:lease:{lease}") != b"-":
                await trio.sleep(0.01)
        for node in fleet.nodes:
            await serves(node)  # none of them is told that the gateway is not connected


async def test_no_request_fails_while_workers_are_replaced_one_by_one(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, first, second):
        asked = dict.fromkeys(fleet.nodes, 0)

        async def ask_all_the_time(node: FleetNodeProcess) -> None:
            body = os.urandom(10_000)
            wanted = hashlib.sha256(body).hexdigest()
            while True:
                with trio.fail_after(HANG):
                    status, answer, address = await ask(node, "office.test", body)
                assert (status, answer) == (200, f"{address} {wanted}"), f"at {node.name}"
                asked[node] += 1
                await trio.sleep(0.05)  # else all that it asks delays the workers that begin

        before = {worker.pid for node in fleet.nodes for worker in (await node.running()).workers}
        async with trio.open_nursery() as nursery:
            for node in fleet.nodes:
                nursery.start_soon(ask_all_the_time, node)
                nursery.start_soon(ask_all_the_time, node)
            for node in fleet.nodes:
                await node.restart()
                for each in asked:
                    await eventually(partial(is_above, asked, each, asked[each] + 5))
            nursery.cancel_scope.cancel()
        for node in fleet.nodes:
            await eventually(partial(is_whole, node))
        after = {worker.pid for node in fleet.nodes for worker in (await node.running()).workers}
        assert before.isdisjoint(after)


def is_above(asked: Mapping[FleetNodeProcess, int], node: FleetNodeProcess, count: int) -> bool:
    return asked[node] > count


async def test_a_gateway_whose_node_is_killed_is_back_at_another(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, first, second):
        await serves(second)
        first.kill()
        await eventually(partial(serves_soon, second))
        await serves(second)


async def test_while_redis_is_down_all_workers_of_a_node_reach_its_gateways(fleet: Fleet) -> None:
    first, second = fleet.nodes
    fleet.redis.kill()
    for node in fleet.nodes:
        await eventually(partial(misses_redis, node))
    entry = [first]
    async with (
        fleet.gateway("office", choose=lambda: entry) as tunnel,
        in_background(lambda: hashing_gateway(tunnel)),
    ):
        await all_reach_it(first)
        for _ in range(4):  # it comes to either worker: the session that it had elsewhere ends, and is not visited
            fleet.cut_gateways()
            await all_reach_it(first)
        assert (await ask(second, "office.test"))[0] == 503
        fleet.redis.start()
        await all_reach_it(second)


async def all_reach_it(node: FleetNodeProcess) -> None:
    """Wait until a gateway that has just come is known to all workers, which takes some milliseconds."""
    with no_hang():
        for _ in range(VISITORS):
            while not await serves_soon(node):
                await trio.sleep(0.05)
    await serves(node)


async def misses_redis(node: FleetNodeProcess) -> bool:
    return not (await node.stats()).redis_reachable


async def test_a_session_resumes_at_its_worker_through_any_other(fleet: Fleet) -> None:
    first, second = fleet.nodes
    entry = [first]
    async with (
        fleet.gateway("office", choose=lambda: entry) as tunnel,
        in_background(lambda: hashing_gateway(tunnel)),
    ):
        await serves(second)
        await holder(first)
        session = (await first.running()).tunnels["office"].sessions[0].id
        for number, node in enumerate([second, first, first, second], start=1):
            entry[0] = node
            fleet.cut_gateways()
            with no_hang():
                while (await first.running()).tunnels["office"].resumes_total < number:
                    await trio.sleep(0.05)
        assert [one.id for one in (await first.running()).tunnels["office"].sessions] == [session]
        for node in fleet.nodes:
            await serves(node)


async def test_a_node_that_is_stopped_drains_and_its_gateways_go_elsewhere(fleet: Fleet) -> None:
    first, second = fleet.nodes
    async with office(fleet, first, second):
        await serves(second)
        stopped = trio.Event()

        async def stop() -> None:
            await first.stop()
            stopped.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            while not stopped.is_set():
                await serves(second)
        await serves(second)


@pytest.mark.slow
async def test_no_wrong_byte_comes_while_workers_and_a_node_are_killed_under_traffic(fleet: Fleet) -> None:
    first, second = fleet.nodes
    served = dict.fromkeys(fleet.nodes, 0)

    async def ask_all_the_time(node: FleetNodeProcess) -> None:
        body = os.urandom(100_000)
        wanted = hashlib.sha256(body).hexdigest()
        while True:
            with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(HANG):
                status, answer, address = await ask(node, "office.test", body)
                if status == 200:
                    assert answer == f"{address} {wanted}", f"at {node.name}"
                    served[node] += 1
            await trio.sleep(0.01)

    async with office(fleet, first, second):
        async with trio.open_nursery() as nursery:
            for node in fleet.nodes:
                nursery.start_soon(ask_all_the_time, node)
                nursery.start_soon(ask_all_the_time, node)
            for _ in range(2):
                os.kill((await holder(first)).pid, signal.SIGKILL)
                for node in fleet.nodes:
                    await eventually(partial(is_above, served, node, served[node] + 5))
                await eventually(partial(is_whole, first))
            first.kill()
            await eventually(partial(is_above, served, second, served[second] + 5))
            nursery.cancel_scope.cancel()
        await serves(second)
