"""`RemoteAccess.apply` and `run`: what each does by itself, and how they meet. In virtual time."""

from __future__ import annotations

from random import Random

import pytest
import trio
import trio.testing
from gateway import (
    KEY,
    NEW_KEY,
    OFF,
    Gateway,
    connected,
    in_virtual_time,
    running,
    shown,
)

from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall


@in_virtual_time
async def test_apply_before_run_saves_only(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    await remote_access.apply(SettingsUpdate(enabled=True, key=KEY, server=" wss://s.test "))
    await remote_access.settled()
    assert shown(remote_access) == (State.DISABLED, None)
    assert len(remote_access.history) == 1
    assert gateway.stored() == Settings(enabled=True, server="wss://s.test")
    assert await gateway.stored_key() == KEY
    async with running(remote_access):
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)


class BrokenRandom(Random):
    """A source of jitter with a bug."""

    def random(self) -> float:
        raise ZeroDivisionError("no chance")


@in_virtual_time
async def test_a_bug_in_its_own_task_comes_out_of_run_bare(gateway: Gateway) -> None:
    gateway.store()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    gateway.transport = ScriptedTransport([Fail()])
    remote_access = gateway.remote_access(random=BrokenRandom())
    with pytest.raises(ZeroDivisionError, match="no chance"):
        await remote_access.run()
    assert shown(remote_access) == (State.STOPPED, None)
    async with running(remote_access):  # and it may be run again
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_run_reports_started_after_its_first_status_and_before_it_is_connected(gateway: Gateway) -> None:
    gateway.store()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    gateway.transport = ScriptedTransport([Stall(60)])
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.STARTING, None)
        assert trio.current_time() == 0


@in_virtual_time
async def test_settled_waits_until_it_has_come_to_something(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Connect(after=5), Stall(7)])
    remote_access = gateway.remote_access()
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        assert (trio.current_time(), shown(remote_access)) == (5, (State.CONNECTED, None))
        await remote_access.apply(NEW_KEY)
        await remote_access.settled()
        assert (trio.current_time(), shown(remote_access)) == (12, (State.FAILED, ErrorKind.RELAY_CONNECT_FAILED))


@in_virtual_time
async def test_settled_knows_that_a_run_has_not_come_to_anything_yet(gateway: Gateway) -> None:
    gateway.store()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    remote_access = gateway.remote_access()
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote_access.run)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()  # now it runs, and has not read the settings
            await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
            nursery.cancel_scope.cancel()


@in_virtual_time
async def test_settled_ends_when_run_does(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Stall()])
    remote_access = gateway.remote_access()
    async with trio.open_nursery() as nursery, running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        nursery.start_soon(remote_access.settled)
        nursery.start_soon(remote_access.settled)
        await trio.sleep(1)
    assert shown(remote_access) == (State.STOPPED, None)


@in_virtual_time
async def test_run_never_runs_twice_at_once_and_again_after_it_ended(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    for _ in range(2):
        async with running(remote_access):
            with pytest.raises(RuntimeError, match="running already"):
                await remote_access.run()
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
        assert shown(remote_access) == (State.STOPPED, None)
        assert gateway.transport.running == 0
    assert len(gateway.transport.attempts) == 2


@in_virtual_time
async def test_what_was_applied_between_two_runs_is_brought_about(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        pass
    await remote_access.apply(OFF)
    assert shown(remote_access) == (State.STOPPED, None)
    async with running(remote_access):
        assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_watching_ends_after_stopped_and_starts_again_with_the_next_run(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    seen: list[list[State]] = []

    async def watch() -> None:
        seen.append([status.state async for status in remote_access.watch()])

    for _ in range(2):
        async with trio.open_nursery() as nursery, connected(remote_access):
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked()
    nothing_more = [status async for status in remote_access.watch()]
    assert seen == [[State.CONNECTED, State.STOPPED]] * 2
    assert [status.state for status in nothing_more] == [State.STOPPED]


@in_virtual_time
async def test_the_same_settings_survive_a_restart_of_the_host(gateway: Gateway) -> None:
    async with connected(gateway.remote_access()):
        pass
    remote_access = gateway.remote_access()
    async with running(remote_access):
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
    first, second = (attempt.target for attempt in gateway.transport.attempts)
    assert first.instance == second.instance == (gateway.folder / "remote-access" / "instance").read_text()
    assert len(first.instance or "") == 32


@in_virtual_time
async def test_an_instance_that_is_none_is_made_anew_and_nothing_else_is_touched(gateway: Gateway) -> None:
    folder = gateway.folder / "remote-access"
    folder.mkdir(mode=0o700)
    (folder / "instance").write_bytes(b"\xff" * 32)
    (folder / "notes").write_text("somebody's")
    (folder / ".instance.0123456789abcdef.pioneer-tmp").write_text("left by a killed writer")
    async with connected(gateway.remote_access()):
        instance = gateway.transport.attempts[0].target.instance
    assert sorted(entry.name for entry in folder.iterdir()) == ["instance", "instance.lock", "notes"]
    assert (folder / "instance").read_text() == instance
