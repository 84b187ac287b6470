"""What visitors notice of `RemoteAccess`: the grace at the end of a generation; handlers that fail or do not end."""

from __future__ import annotations

from typing import NoReturn

import pytest
import trio
import trio.testing
from gateway import (
    CLEAR_KEY,
    KEY,
    NEW_KEY,
    OFF,
    ON,
    Carried,
    Gateway,
    connected,
    in_virtual_time,
    running,
    shown,
    wait_for_the_end,
)

from pioneer_tunnel._model.errors import (
    ReplacedError,
)
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport
from pioneer_tunnel.transports.tunnel_stream import TunnelStream


@in_virtual_time
async def test_open_streams_have_the_grace_to_finish_and_new_ones_are_refused(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"apply_grace_ms": 5000})
    async with connected(remote_access):
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        await trio.testing.wait_all_tasks_blocked()
        assert carried.acknowledged
        await remote_access.apply(NEW_KEY)
        await trio.sleep(1)
        with pytest.raises(trio.WouldBlock):
            gateway.transport.visit(TunnelStream(Carried()))
        assert carried.usable
        assert len(gateway.transport.attempts) == 1
        await trio.sleep(3.9)
        assert carried.usable
        await remote_access.settled()
        assert trio.current_time() == 5
        assert carried.was_reset
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_the_grace_ends_with_the_last_visitor(gateway: Gateway) -> None:
    async def handler(stream: TunnelStream) -> None:
        async with stream:
            await trio.sleep(0.25)

    remote_access = gateway.remote_access(handler=handler)
    async with connected(remote_access):
        streams = [Carried(), Carried()]
        for carried in streams:
            gateway.transport.visit(TunnelStream(carried))
        await remote_access.apply(OFF)
        await remote_access.settled()
        assert trio.current_time() == 0.25
        assert not any(carried.was_reset for carried in streams)


@in_virtual_time
async def test_there_is_no_grace_when_the_key_was_withdrawn(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"apply_grace_ms": 5000})
    async with connected(remote_access):
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        await trio.testing.wait_all_tasks_blocked()
        await remote_access.apply(CLEAR_KEY)
        await remote_access.settled()
        assert trio.current_time() == 0
        assert carried.was_reset
        assert shown(remote_access) == (State.FAILED, ErrorKind.MISSING_KEY)


@in_virtual_time
async def test_withdrawing_the_key_ends_a_grace_that_was_given_before(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"apply_grace_ms": 5000})
    async with connected(remote_access):
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        await remote_access.apply(OFF)
        await trio.sleep(1)
        assert carried.usable
        await remote_access.apply(CLEAR_KEY)
        await remote_access.settled()
        assert trio.current_time() == 1
        assert carried.was_reset
        assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_a_key_withdrawn_once_costs_the_next_generation_no_grace(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await remote_access.apply(CLEAR_KEY)
        await remote_access.apply(SettingsUpdate(key=KEY))
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        gateway.transport.visit(TunnelStream(Carried()))
        began = trio.current_time()
        await remote_access.apply(OFF)
        await remote_access.settled()
        assert trio.current_time() == began + 1


@in_virtual_time
async def test_a_handler_that_will_not_end_holds_nothing_up(gateway: Gateway) -> None:
    """Its stream is broken; itself, it is never awaited, but by the host's leaving `run`."""
    broken_at: list[float] = []
    let_go = trio.Event()

    async def handler(stream: TunnelStream) -> None:
        with trio.CancelScope(shield=True):
            await wait_for_the_end(stream)
            broken_at.append(trio.current_time())
            await let_go.wait()

    remote_access = gateway.remote_access(handler=handler)
    async with connected(remote_access):
        gateway.transport.visit(TunnelStream(Carried()))
        await trio.testing.wait_all_tasks_blocked()
        await remote_access.apply(NEW_KEY)
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        assert gateway.transport.attempts[-1].began == 1
        await remote_access.apply(OFF)  # its stream is not open any more, so there is nobody to wait for
        await remote_access.settled()
        assert trio.current_time() == 1
        assert broken_at == [1]
        let_go.set()


@in_virtual_time
async def test_nobody_waits_for_handlers_of_a_generation_that_has_failed_for_good(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Connect(10, then=Fail(ReplacedError))])

    async def handler(stream: TunnelStream) -> None:
        await trio.sleep(60)

    remote_access = gateway.remote_access(handler=handler)
    async with connected(remote_access):
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        await trio.sleep(20)
        assert carried.was_reset
        assert shown(remote_access) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
        with pytest.raises(trio.WouldBlock):
            gateway.transport.visit(TunnelStream(Carried()))
        await remote_access.apply(ON)
        await remote_access.settled()
        assert trio.current_time() == 20


@in_virtual_time
async def test_a_handler_that_raises_costs_its_visitor_only(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: TunnelStream) -> NoReturn:
        raise ExceptionGroup("mine", [ValueError("of the host")])

    remote_access = gateway.remote_access(handler=handler)
    async with connected(remote_access):
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        await trio.testing.wait_all_tasks_blocked()
        assert carried.was_reset
        assert shown(remote_access) == (State.CONNECTED, None)
    assert "of the host" in caplog.text


@in_virtual_time
async def test_without_a_handler_it_connects_and_says_that_the_local_gateway_is_missing(gateway: Gateway) -> None:
    there = False

    async def dial(host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("127.0.0.1", 17878)
        if not there:
            raise ConnectionRefusedError(111, "Connection refused")
        return trio.testing.memory_stream_pair()[0]

    remote_access = gateway.remote_access(handler=None, dial=dial)
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await trio.sleep(1)
        assert shown(remote_access) == (State.CONNECTED, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)
        assert "127.0.0.1:17878" in (remote_access.status.message or "")
        there = True
        await trio.sleep(5)
        assert shown(remote_access) == (State.CONNECTED, None)
    assert len(gateway.transport.attempts) == 1


@in_virtual_time
async def test_a_dialer_that_breaks_costs_no_tunnel(gateway: Gateway) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        raise LookupError("a bug of the host")

    remote_access = gateway.remote_access(handler=None, dial=dial)
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await trio.sleep(60)
        assert shown(remote_access) == (State.CONNECTED, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)
        assert "LookupError" in (remote_access.status.message or "")
    assert len(gateway.transport.attempts) == 1


# Stopping in order


async def stopped(remote_access: RemoteAccess, *, task_status: trio.TaskStatus[None]) -> None:
    """Run it until `stop` ends it."""
    await remote_access.run(task_status=task_status)
    assert shown(remote_access) == (State.STOPPED, None)


@in_virtual_time
async def test_stop_gives_visitors_their_grace_and_ends_the_run(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"stop_grace_ms": 3000, "apply_grace_ms": 0})
    async with trio.open_nursery() as nursery:
        await nursery.start(stopped, remote_access)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        carried = Carried()
        gateway.transport.visit(TunnelStream(carried))
        async with trio.open_nursery() as stopping:
            stopping.start_soon(remote_access.stop)
            stopping.start_soon(remote_access.stop)
            await trio.sleep(1)
            with pytest.raises(trio.WouldBlock):
                gateway.transport.visit(TunnelStream(Carried()))
            assert carried.usable
            await remote_access.apply(NEW_KEY)  # it is saved, and the grace goes on
        assert trio.current_time() == 3
        assert carried.was_reset
    assert shown(remote_access) == (State.STOPPED, None)
    await remote_access.stop()  # nothing runs
    async with running(remote_access):
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_without_visitors_stop_takes_no_time(gateway: Gateway) -> None:
    for update in (SettingsUpdate(enabled=True, key=KEY), OFF):
        remote_access = gateway.remote_access()
        async with trio.open_nursery() as nursery:
            await nursery.start(stopped, remote_access)
            await remote_access.apply(update)
            await remote_access.settled()
            await remote_access.stop()
            assert trio.current_time() == 0


@in_virtual_time
async def test_a_handler_that_goes_on_does_not_hold_up_the_end(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"stop_grace_ms": 100}, handler=lambda stream: trio.sleep(1000))
    async with trio.open_nursery() as nursery:
        await nursery.start(stopped, remote_access)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        gateway.transport.visit(TunnelStream(Carried()))
        await remote_access.stop()
        assert trio.current_time() == 0.1


@in_virtual_time
async def test_a_stop_that_is_cancelled_goes_on_and_a_run_that_is_cancelled_ends_at_once(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"stop_grace_ms": 5000})
    async with trio.open_nursery() as nursery:
        await nursery.start(stopped, remote_access)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        gateway.transport.visit(TunnelStream(Carried()))
        with trio.move_on_after(1):
            await remote_access.stop()
        assert shown(remote_access) == (State.CONNECTED, None)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == 1
    assert shown(remote_access) == (State.STOPPED, None)


@in_virtual_time
async def test_withdrawing_the_key_ends_the_grace_of_a_stop(gateway: Gateway) -> None:
    remote_access = gateway.remote_access({"stop_grace_ms": 5000})
    async with trio.open_nursery() as nursery:
        await nursery.start(stopped, remote_access)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        gateway.transport.visit(TunnelStream(Carried()))
        nursery.start_soon(remote_access.stop)
        await trio.sleep(1)
        await remote_access.apply(CLEAR_KEY)
    assert trio.current_time() == 1
