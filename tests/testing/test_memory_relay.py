"""The relay in memory: a real tunnel through it, in virtual time, and what it tells a test."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from rig import KEY, ask, echo, read_all, rejected, request

from pioneer_tunnel import (
    ErrorKind,
    MemoryKeystore,
    RelayKey,
    RemoteAccess,
    RemoteAccessConfig,
    SettingsFile,
    SettingsUpdate,
    State,
    Tunnel,
    TunnelError,
    open_tunnel,
)
from pioneer_tunnel.testing import (
    FaultPlan,
    FaultyDialer,
    Heard,
    Leave,
    MemoryRelay,
    MemoryStream,
    Refuse,
    Reject,
    TasksLeaked,
    Up,
    Visitor,
    check_task_leak,
    count_tasks,
    open_memory_relay,
    open_status_recorder,
    play_visitor,
    run,
    virtual_time,
    wall_clock,
)
from pioneer_tunnel.testing.strategies import visitor_traffic


@asynccontextmanager
async def echoing(relay: MemoryRelay, **changes: Any) -> AsyncIterator[Tunnel]:
    """A tunnel whose visitors hear what they say, connected."""
    fields: dict[str, Any] = {"key": relay.key, "dial": relay.dial, "random": Random(0), "wall_clock": wall_clock}
    async with open_tunnel(relay.url, **(fields | changes)) as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [tunnel])
        await tunnel.wait_connected()
        yield tunnel
        nursery.cancel_scope.cancel()


@virtual_time
async def test_a_visitor_gets_through_and_back() -> None:
    async with open_memory_relay() as relay, echoing(relay) as tunnel:
        assert await ask(await relay.visit(), b"x" * 300_000) == b"x" * 300_000
        assert tunnel.public_url == "http://office.test"
        assert (relay.sessions, relay.reachable, relay.running) == (1, True, True)


@virtual_time
async def test_a_visitor_by_host_is_told_why_not() -> None:
    async with open_memory_relay() as relay:
        assert b"503" in await ask(await relay.visit_http(), request(host="office.test"))
        assert b"404" in await ask(await relay.visit_http(), request(host="nowhere.test"))
        async with echoing(relay):
            sent = request(host="office.test", body=b"hello")
            assert await ask(await relay.visit_http(), sent) == sent
        with pytest.raises(trio.BrokenResourceError):
            await read_all(await relay.visit())


def test_hours_of_heartbeats_and_reconnects_take_seconds() -> None:
    async def scenario(relay: MemoryRelay) -> int:
        async with echoing(relay) as tunnel:
            await trio.sleep(12_000)
            assert tunnel.status.state is State.CONNECTED
        return relay.sessions

    sessions = run(FaultPlan(then=Up(600.0)), scenario)
    assert 12_000 / 603 < sessions <= 12_000 / 600 + 1


def test_what_happened_happens_again() -> None:
    async def scenario(relay: MemoryRelay) -> list[tuple[float, float | None, int]]:
        async with echoing(relay), trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(play_visitor, relay, Visitor(number / 7, sends=(9, 80_000, 9), pause=0.3))
            await trio.sleep(300)
        return [(dial.at, dial.ended_at, dial.connection.carried) for dial in relay.dials if dial.connection]

    plan = FaultPlan([Up(0.5), Up(3.0)], then=Up(20.0))
    seen = {seed: run(plan, scenario, seed=seed) for seed in (1, 2)}
    assert run(plan, scenario, seed=1) == seen[1]
    assert run(plan, scenario, seed=2) == seen[2]
    assert len(seen[1]) > 8


@virtual_time
async def test_it_stops_and_starts() -> None:
    async with open_memory_relay() as relay, echoing(relay) as tunnel:
        for abruptly in (False, True):
            await relay.stop(abruptly=abruptly)
            assert not relay.running
            assert not relay.reachable
            with pytest.raises(ConnectionRefusedError):
                await relay.visit()
            await trio.sleep(100)
            assert tunnel.status.state is State.RECONNECTING
            assert relay.dials[-1].fault is None
            await relay.start()
            await relay.wait_reachable()
            assert await ask(await relay.visit(), b"again") == b"again"
        await relay.start()
        assert relay.sessions == 3
        await relay.stop()
        await relay.stop()


@virtual_time
async def test_a_plan_does_not_go_on_while_the_relay_is_down() -> None:
    plan = FaultPlan([Up(50.0), Up(60.0)])
    async with open_memory_relay(plan) as relay, echoing(relay):
        await relay.stop()
        await trio.sleep(1000)
        await relay.start()
        await trio.sleep(1000)
        assert [dial.fault for dial in relay.dials if dial.fault is not None] == [*plan.faults, plan.then]


@virtual_time
async def test_a_gateway_that_rejects_the_relay_does_not_count() -> None:
    async with open_memory_relay() as relay, echoing(relay) as tunnel:
        rejecting = FaultyDialer(relay)
        pinned = str(RelayKey("ptk1_another-relays-identity-0123456789").identity().public_key)
        async with open_tunnel(
            relay.url, key=relay.key, dial=rejecting, relay_identity=pinned, instance="another", wall_clock=wall_clock
        ):
            await trio.sleep(600)
        assert len(rejecting.dials) > 10
        assert all(dial.connected_at is None for dial in rejecting.dials)
        assert relay.reachable
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


@virtual_time
async def test_a_key_that_is_revoked_is_not_let_in_again() -> None:
    async with open_memory_relay() as relay:
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
            await tunnel.wait_connected()
            relay.revoke()
            await trio.sleep(3600)
            assert relay.reachable
            relay.cut()
            with trio.fail_after(60):
                await rejected(tunnel)
            relay.register("office", KEY)
            await trio.sleep(3600)
            assert (relay.reachable, tunnel.status.retry_at_unix is None) == (False, False)
            relay.register("office", relay.key)
            with trio.fail_after(20 * 60):
                await relay.wait_reachable()
        relay.register("office", KEY)
        async with echoing(relay, key=KEY):
            assert relay.reachable
        relay.register("office", KEY, service="another")
        async with open_tunnel(relay.url, key=KEY, dial=relay.dial) as tunnel:
            with pytest.raises(TunnelError, match="'another'"):
                await tunnel.wait_connected()


@virtual_time
async def test_it_knows_whether_visitors_get_through_when_the_gateway_does_not() -> None:
    async with open_memory_relay() as relay:
        assert not relay.reachable
        async with echoing(relay) as tunnel:
            connection = relay.dials[0].connection
            assert connection is not None
            connection.black_hole()
            assert not relay.reachable
            assert tunnel.status.state is State.CONNECTED
            connection.heal()
            assert relay.is_reachable("office")
            await relay.reconnect()
            with trio.fail_after(0.1):
                await relay.wait_reachable()
        assert not relay.reachable
        assert relay.dials[1].ended_at is not None
        with pytest.raises(RuntimeError, match="no gateway is connected to the tunnel 'office'"):
            await relay.reconnect()


@pytest.mark.parametrize("server", [True, False], ids=["local gateway", "none"])
def test_remote_access_in_virtual_time_with_its_files(tmp_path: Path, server: bool) -> None:
    """Its files are read and written in threads, for which an autojump clock of Trio's would not wait."""

    async def scenario(relay: MemoryRelay) -> None:
        if server:
            relay.listen(echo_lines)
        keystore = MemoryKeystore()
        remote_access = RemoteAccess(
            RemoteAccessConfig(relay_addr=relay.url, runtime_dir=tmp_path / "run"),
            settings=SettingsFile(tmp_path / "gateway-settings.toml"),
            keystore=keystore,
            dial=relay.dial,
            random=Random(0),
            wall_clock=wall_clock,
        )
        async with open_status_recorder(relay) as recorder, trio.open_nursery() as nursery:
            await nursery.start(remote_access.run)
            recorder.watch(remote_access)
            with trio.fail_after(0.5):  # virtual seconds: the disk takes none
                await remote_access.apply(SettingsUpdate(enabled=True, key=relay.key))
            await remote_access.settled()
            if server:
                await relay.wait_reachable()
                assert await ask(await relay.visit(), b"hello\n") == b"HELLO\n"
                relay.stop_listening()
                for _ in range(3):
                    assert (await play_visitor(relay, Visitor())).broken
                await trio.sleep(1)
                assert remote_access.status.error_kind is ErrorKind.LOCAL_GATEWAY_UNAVAILABLE
                relay.listen(echo_lines)
                await trio.sleep(10)
                assert remote_access.status.state is State.CONNECTED
                await remote_access.apply(SettingsUpdate(key=RelayKey("ptk1_nobody-knows-this-0123456789abcdef")))
                await trio.sleep(10)
            else:
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        if server:
            assert recorder.states == [
                "disabled",
                "starting",
                "connected",
                "connected/local_gateway_unavailable",
                "connected",
                "starting",
                "failed/tunnel_auth_failed",
                "stopped",
            ]
        else:
            assert recorder.states == [
                "disabled",
                "starting",
                "connected",
                "connected/local_gateway_unavailable",
                "stopped",
            ]

    run(FaultPlan(), scenario)


async def echo_lines(stream: MemoryStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(data.upper())


@virtual_time
async def test_a_name_that_nobody_has_does_not_resolve() -> None:
    async with open_memory_relay() as relay:
        with pytest.raises(socket.gaierror, match=r"nowhere\.test"):
            await relay.dial("nowhere.test", 80)
        with pytest.raises(ConnectionRefusedError, match=r"127\.0\.0\.1:80"):
            await relay.dial("127.0.0.1", 80)


@settings(max_examples=15, deadline=None)
@given(traffic=visitor_traffic(within=20), lost=st.sampled_from([float("inf"), 3.0, 10.0]))
@virtual_time
async def test_every_byte_arrives_or_its_stream_breaks(traffic: list[Visitor], lost: float) -> None:
    heard: dict[int, Heard] = {}

    async def visit(number: int, visitor: Visitor) -> None:
        heard[number] = await play_visitor(relay, visitor)

    async with open_memory_relay(FaultPlan(then=Up(lost))) as relay, echoing(relay), trio.open_nursery() as nursery:
        for number, visitor in enumerate(traffic):
            nursery.start_soon(visit, number, visitor)
    for number, visitor in enumerate(traffic):
        assert visitor.data.startswith(heard[number].data)
        if visitor.leave is Leave.END and not heard[number].broken:
            assert heard[number].data == visitor.data
        if lost == float("inf") and visitor.leave is Leave.END:
            assert not heard[number].broken


@virtual_time
async def test_a_reconnect_leaves_no_task_behind_and_a_leak_is_named() -> None:
    async def watch_the_link() -> None:
        await trio.sleep_forever()

    async with open_memory_relay() as relay, trio.open_nursery() as nursery:

        async def gateway(*, task_status: trio.TaskStatus[None]) -> None:
            async with echoing(relay):
                task_status.started()
                await trio.sleep_forever()

        async def leaky() -> None:
            await relay.reconnect()
            nursery.start_soon(watch_the_link)

        await nursery.start(gateway)
        await check_task_leak(nursery, relay.reconnect)
        before = count_tasks(nursery)
        with pytest.raises(TasksLeaked, match=r"3 times more have left tasks behind: 3 of .*watch_the_link") as leak:
            await check_task_leak(nursery, leaky)
        assert set((count_tasks(nursery) - before).values()) == {5}
        assert list(leak.value.leaked.values()) == [3]
        nursery.cancel_scope.cancel()


@virtual_time
async def test_when_settings_were_applied_the_plan_goes_on_and_another_dial_is_right() -> None:
    async with open_memory_relay(FaultPlan([Reject(), Refuse()])) as relay:
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial, random=Random(0)) as tunnel:
            with pytest.raises(TunnelError):
                await tunnel.accept()
        relay.dial.settings_applied()
        async with echoing(relay):
            assert [dial.fault for dial in relay.dials] == [Reject(), Refuse(), Up()]
            assert not relay.dials_after_final
