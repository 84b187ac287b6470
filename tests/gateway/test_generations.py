"""One generation after another: what begins a new one, and that nothing is left of the old. In virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import trio
import trio.testing
from gateway import (
    CLEAR_KEY,
    KEY,
    NEW_KEY,
    OFF,
    ON,
    OTHER_KEY,
    Carried,
    Gateway,
    connected,
    in_virtual_time,
    running,
    shown,
)
from statuses import states_of

from pioneer_tunnel._model.errors import (
    RelayConnectError,
    TunnelAuthError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport
from pioneer_tunnel.transports.interface import RoundTrip
from pioneer_tunnel.transports.tunnel_stream import TunnelStream


@in_virtual_time
async def test_apply_never_waits_for_a_generation(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport(goodbye=30)
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        gateway.transport.visit(TunnelStream(Carried()))
        began = trio.current_time()
        for update in (NEW_KEY, OFF, ON, CLEAR_KEY):
            await remote_access.apply(update)
        assert trio.current_time() == began
        assert gateway.stored() == Settings(enabled=True)
        assert await gateway.stored_key() is None


@pytest.mark.parametrize(
    "update",
    [
        SettingsUpdate(),
        ON,
        SettingsUpdate(key=KEY),
        SettingsUpdate(enabled=True, key=KEY, clear_key=True, server=""),
    ],
)
@in_virtual_time
async def test_an_apply_that_changes_nothing_leaves_a_live_generation_alone(
    gateway: Gateway, update: SettingsUpdate
) -> None:
    gateway.transport = ScriptedTransport([Connect(60), Fail(), Fail(), Fail()])
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        for seconds in (1, 60, 1):  # connected, and again while it waits for a retry
            await trio.sleep(seconds)
            history = remote_access.history
            await remote_access.apply(update)
            await remote_access.settled()
            assert remote_access.history == history
        assert shown(remote_access)[0] is State.RECONNECTING
    assert State.STARTING not in states_of(remote_access.history)[2:]


@in_virtual_time
async def test_an_apply_that_changes_nothing_leaves_a_generation_in_preparation_alone(gateway: Gateway) -> None:
    gateway.store()
    reading = trio.Event()

    async def key_provider() -> RelayKey | None:
        reading.set()
        await trio.sleep(1)
        return KEY

    remote_access = gateway.remote_access(key_provider=key_provider)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(remote_access.run)
        await reading.wait()
        await remote_access.apply(ON)
        await remote_access.settled()
        assert trio.current_time() == 1
        assert len(gateway.transport.attempts) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("updates", [[ON], [OFF, ON], [SettingsUpdate(key=KEY)], [SettingsUpdate(server="")]], ids=repr)
@in_virtual_time
async def test_an_ended_generation_is_followed_by_one_that_is_asked_for(
    gateway: Gateway, updates: list[SettingsUpdate]
) -> None:
    gateway.transport = ScriptedTransport([Fail(TunnelAuthError)])
    remote_access = gateway.remote_access()
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
        await trio.sleep(3600)
        await remote_access.apply(SettingsUpdate())
        remote_access.retry_now()
        await remote_access.configure(remote_access.config)
        await trio.sleep(3600)
        assert len(gateway.transport.attempts) == 1
        for update in updates:
            await remote_access.apply(update)
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)


CHANGES: Final[dict[str, Callable[[RemoteAccess], Any]]] = {
    "key": lambda remote_access: remote_access.apply(NEW_KEY),
    "server": lambda remote_access: remote_access.apply(SettingsUpdate(server="wss://elsewhere.test")),
    "config": lambda remote_access: remote_access.configure(
        RemoteAccessConfig(
            relay_addr="wss://elsewhere.test", base_dir=remote_access.config.base_dir, allow_server_override=True
        )
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@in_virtual_time
async def test_a_change_moves_to_a_new_generation_when_nothing_is_left_of_the_old(
    gateway: Gateway, change: Callable[[RemoteAccess], Any]
) -> None:
    gateway.transport = ScriptedTransport(goodbye=3)
    remote_access = gateway.remote_access({"allow_server_override": True})
    async with connected(remote_access):
        await trio.sleep(10)
        await change(remote_access)
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        old, new = gateway.transport.attempts
        assert old.ended == new.began == 13
        assert not gateway.transport.overlapped
        assert (old.target.key, old.target.address) != (new.target.key, new.target.address)
    assert [status.state for status in remote_access.history[-3:]] == [State.STARTING, State.CONNECTED, State.STOPPED]


@in_virtual_time
async def test_only_the_newest_of_many_applies_is_brought_about(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport(goodbye=3)
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        for number in range(20):
            await remote_access.apply(SettingsUpdate(key=RelayKey(f"ptk1_key-number-{number:020}")))
        await remote_access.settled()
        assert len(gateway.transport.attempts) == 2
        assert gateway.transport.attempts[-1].target.key.reveal().endswith("19")


@in_virtual_time
async def test_a_new_generation_that_fails_leaves_the_settings_as_they_were_asked(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Connect(), Fail(TunnelAuthError)])
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await remote_access.apply(NEW_KEY)
        await remote_access.settled()
        assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
        assert remote_access.status.public_url is None
        assert await gateway.stored_key() == OTHER_KEY
        assert gateway.stored().enabled


@pytest.mark.parametrize("update", [ON, SettingsUpdate(), SettingsUpdate(key=OTHER_KEY)], ids=repr)
@in_virtual_time
async def test_an_apply_ends_the_wait_after_a_rejection(gateway: Gateway, update: SettingsUpdate) -> None:
    gateway.transport = ScriptedTransport([Connect(10), Fail(TunnelAuthError)])
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await trio.sleep(60)
        assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
        assert remote_access.status.retry_at_unix is not None
        await remote_access.apply(update)
        await trio.sleep(0.1)
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_an_apply_that_changes_nothing_ends_no_other_wait(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Connect(10), Fail(RelayConnectError, retry_after=500.0)])
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await trio.sleep(60)
        attempts = len(gateway.transport.attempts)
        await remote_access.apply(ON)
        await trio.sleep(60)
        assert len(gateway.transport.attempts) == attempts


@in_virtual_time
async def test_switching_off_ends_the_tunnel(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await remote_access.apply(OFF)
        await remote_access.settled()
        assert shown(remote_access) == (State.DISABLED, None)
        assert gateway.transport.running == 0
        assert trio.current_time() == 0  # nobody was there who needed time


@in_virtual_time
async def test_retry_now_cuts_a_wait_short(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Fail(retry_after=600)])
    remote_access = gateway.remote_access()
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        await trio.sleep(10)
        remote_access.retry_now()
        await trio.sleep(1)
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_late_events_of_an_ended_generation_change_nothing(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        report, deliver = gateway.transport.report, gateway.transport.visit
        await remote_access.apply(OFF)
        await remote_access.settled()
        history = remote_access.history
        report(RoundTrip(0.1))
        with pytest.raises(trio.WouldBlock):
            deliver(TunnelStream(Carried()))
        assert remote_access.history == history
        assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_a_visitor_who_comes_during_the_goodbye_is_refused(gateway: Gateway) -> None:
    """Also when the key was withdrawn, so that nobody took leave before."""
    gateway.transport = ScriptedTransport(goodbye=3)
    handled: list[TunnelStream] = []

    async def handler(stream: TunnelStream) -> None:
        handled.append(stream)

    remote_access = gateway.remote_access(handler=handler)
    async with connected(remote_access):
        await remote_access.apply(CLEAR_KEY)
        await trio.sleep(1)
        with pytest.raises(trio.WouldBlock):
            gateway.transport.visit(TunnelStream(Carried()))
        await remote_access.settled()
        assert shown(remote_access) == (State.FAILED, ErrorKind.MISSING_KEY)
    assert handled == []
