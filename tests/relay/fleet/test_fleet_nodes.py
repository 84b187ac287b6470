"""A fleet of real processes: visitors come to any node, and nodes and Redis are killed and stopped."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from fleet_processes import Fleet, FleetNodeProcess, ask, fleet_of, hashing_gateway
from rig import eventually, in_background, no_hang

from pioneer_tunnel import State, Tunnel, TunnelAuthError, open_tunnel
from pioneer_tunnel._model.keys import SigningIdentity, new_relay_key
from pioneer_tunnel.relay.administration.fleet_file import FleetFile
from pioneer_tunnel.relay.fleet.published import Published, connected
from pioneer_tunnel.relay.fleet.publishing import publish, revoke
from pioneer_tunnel.relay.fleet.signed import sign


@pytest.fixture(scope="module")
def fleet_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("fleet"), "fra1", "fra2", "ams1") as fleet:
        yield fleet


@pytest.fixture
async def fleet(fleet_of_the_module: Fleet) -> AsyncIterator[Fleet]:
    """A fleet that is whole, before and after the test."""
    yield fleet_of_the_module
    if not fleet_of_the_module.redis.runs:
        fleet_of_the_module.redis.start()
    for node in fleet_of_the_module.nodes:
        if node.runs:
            node.signal(signal.SIGCONT)
        else:
            node.start()
    for node in fleet_of_the_module.nodes:
        with no_hang():
            while not (await node.stats()).redis_reachable:
                await trio.sleep(0.05)


@asynccontextmanager
async def operator(fleet: Fleet) -> AsyncIterator[Published]:
    file = FleetFile.load(fleet.nodes[0].file)
    async with connected(file.access(fleet.folder)) as published:
        yield published


async def served(node: FleetNodeProcess, host: str = "office.test", body: bytes = b"") -> bool:
    """Whether a visitor at a node gets the right answer."""
    try:
        status, answer, address = await ask(node, host, body)
    except OSError:
        return False
    if status != 200:
        return False
    assert answer == f"{address} {hashlib.sha256(body).hexdigest()}"
    return True


async def served_soon(node: FleetNodeProcess) -> bool:
    with trio.move_on_after(2):
        return await served(node)
    return False


async def test_a_visitor_reaches_a_gateway_at_any_node_and_is_known_by_its_address(fleet: Fleet) -> None:
    async with fleet.gateway("office", fleet.nodes[0]) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        for node in fleet.nodes:
            with no_hang():
                assert await served(node, body=os.urandom(300_000))


async def test_a_gateway_whose_node_is_killed_is_back_at_another(fleet: Fleet) -> None:
    first, second, third = fleet.nodes
    async with fleet.gateway("office", *fleet.nodes) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        assert await served(third)
        first.kill()
        since = time.monotonic()
        await eventually(lambda: served(third, body=b"x" * 100_000))
        print(f"served again after {time.monotonic() - since:.1f} s")
        assert await served(second)


@pytest.mark.slow
async def test_a_gateway_whose_node_is_stopped_is_back_at_another(fleet: Fleet) -> None:
    first, second, third = answering = [*fleet.nodes]
    async with (
        fleet.gateway("office", choose=lambda: answering) as tunnel,
        in_background(lambda: hashing_gateway(tunnel)),
    ):
        assert await served(third)
        first.signal(signal.SIGSTOP)
        answering.remove(first)  # as a balancer does that checks health
        since = time.monotonic()
        await eventually(lambda: served_soon(third))
        print(f"served again after {time.monotonic() - since:.1f} s")
        await eventually(lambda: served_soon(second))


async def test_redis_down_changes_nothing_for_who_is_connected_and_lets_others_come(fleet: Fleet) -> None:
    first, second, third = fleet.nodes
    async with fleet.gateway("office", first) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        assert await served(second)
        fleet.redis.kill()
        for node in fleet.nodes:
            with no_hang():
                while (await node.stats()).redis_reachable:
                    await trio.sleep(0.05)
        assert await served(first)
        assert await served(second), "a known route was forgotten"
    async with fleet.gateway("office", third) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        assert await served(third), "a gateway was not accepted"
        assert (await third.stats()).unannounced_tunnels == 1
        fleet.redis.start()  # nothing is in it
        await eventually(lambda: served(first))
        await eventually(lambda: served(second))
        assert (await third.stats()).unannounced_tunnels == 0


async def test_a_published_tunnel_works_everywhere_until_it_is_revoked(fleet: Fleet) -> None:
    key = new_relay_key()
    table = {"id": "signed", "url": "http://signed.test", "key": str(key.identity().public_key)}
    async with operator(fleet) as published:
        await publish(published, fleet.operator, table, now=time.time(), valid=3600)
        async with fleet.gateway(key, fleet.nodes[0]) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
            for node in fleet.nodes:
                assert await served(node, "signed.test")
            assert "signed" in (await fleet.nodes[0].running()).tunnels
            since = time.monotonic()
            await revoke(published, fleet.operator, "signed", now=time.time())
            await until_not_connected(tunnel)
            print(f"the session ended after {time.monotonic() - since:.2f} s")
            assert (await ask(fleet.nodes[1], "signed.test"))[0] == 404


async def until_not_connected(tunnel: Tunnel) -> None:
    with no_hang():
        async for status in tunnel.watch():
            if status.state is not State.CONNECTED:
                return


async def test_no_request_fails_at_any_node_while_one_restarts_in_place(fleet: Fleet) -> None:
    first, _, third = fleet.nodes
    async with fleet.gateway("office", first) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        assert await served(third)
        asked = dict.fromkeys(fleet.nodes, 0)

        async def ask_all_the_time(node: FleetNodeProcess) -> None:
            while True:
                assert await served(node, body=b"z" * 10_000), f"a visitor at {node.name} was refused"
                asked[node] += 1

        async with trio.open_nursery() as nursery:
            for node in fleet.nodes:
                nursery.start_soon(ask_all_the_time, node)
            await first.restart()
            before = asked.copy()
            await eventually(lambda: all(asked[node] > before[node] + 10 for node in fleet.nodes))
            nursery.cancel_scope.cancel()


async def test_a_session_resumes_at_its_node_through_another_one(fleet: Fleet) -> None:
    first, second, third = fleet.nodes
    entry = [first]
    async with (
        fleet.gateway("office", choose=lambda: entry) as tunnel,
        in_background(lambda: hashing_gateway(tunnel)),
    ):
        assert await served(third)
        session = (await first.running()).tunnels["office"].sessions[0].id
        entry[0] = second
        fleet.cut_gateways()
        with no_hang():
            while not (await first.running()).tunnels["office"].resumes_total:
                await trio.sleep(0.05)
        assert [one.id for one in (await first.running()).tunnels["office"].sessions] == [session]
        for node in fleet.nodes:
            assert await served(node, body=b"y" * 50_000)


async def test_whoever_writes_redis_adds_nothing(fleet: Fleet) -> None:
    """No key, no tunnel, no name and no node. Visitors reach the right gateway, or none until Redis is well again."""
    first, second, third = fleet.nodes
    evil, key = SigningIdentity.generate(), new_relay_key()
    key_id = key.identity().public_key.key_id
    now = int(time.time())
    tables: list[dict[str, Any]] = [
        {"id": "evil", "url": "http://evil.test", "key": str(key.identity().public_key)},
        {"id": "office", "url": "http://office.test", "key": str(key.identity().public_key)},
    ]
    texts = [sign(evil, table, serial=now * 1000, not_after=now + 3600).text for table in tables]
    holdings = [
        f'8000000000000\n9000000000 0123456789abcdef {node} 0123456789abcdef ["k","i",1.5]'
        for node in ("evil1", "fra2")
    ]
    call, entry = fleet.redis.call, [first]
    async with (
        fleet.gateway("office", choose=lambda: entry) as tunnel,
        in_background(lambda: hashing_gateway(tunnel)),
    ):
        assert await served(third)
        entry[0] = second
        for table, text in zip(tables, texts, strict=True):
            claim = f'fra2 {"0" * 128} {{"host":"evil.test","keys":["{key_id}"],"since":1}}'
            call("SET", f"pioneer:entry:{table['id']}", text)
            call("SET", f"pioneer:key:{key_id}", str(table["id"]))
            call("SET", "pioneer:host:evil.test", str(table["id"]))
            call("SET", "pioneer:name:evil.test", claim)
            call("PUBLISH", "pioneer:registry", text)
            async with open_tunnel(f"ws://127.0.0.1:{fleet.balancer}", key=key) as intruder:
                with pytest.raises(TunnelAuthError):
                    await intruder.wait_connected()
            assert (await ask(third, "evil.test"))[0] == 404
        records: list[str | bytes] = [*holdings, "nonsense", b"\xff" * 100_000]
        for record in records:
            call("SET", "pioneer:t:office", record)
            call("SET", "pioneer:lease:0123456789abcdef", "evil1")
            for node in fleet.nodes:
                with trio.move_on_after(5):
                    await served(node)  # if anybody else answers, it fails the test
        fleet.redis.kill()
        fleet.redis.start()
        for node in fleet.nodes:
            await eventually(partial(served_soon, node))
    assert {*(await third.stats()).nodes} == {"fra1", "fra2"}
