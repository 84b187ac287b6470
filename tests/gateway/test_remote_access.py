"""`RemoteAccess` keeps the gateway contract: what is published, what is stored, and how one generation follows another.

Most of it in virtual time, over a transport that follows a script; what only real sockets can show, over a relay.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any, Final, NoReturn

import pytest
import trio
import trio.testing
from crashing_files import STEPS, Crash, crash_after
from gateway import (
    EPOCH,
    KEY,
    OTHER_KEY,
    Carried,
    Gateway,
    connected,
    failing_once,
    in_virtual_time,
    running,
    shown,
    wait_for_the_end,
)
from rig import (
    HOST,
    KEY as RELAY_KEY,
    RELAY_NAME,
    RelayRig,
    eventually,
    living_tasks,
    no_hang,
    nothing_left_behind,
    read_exactly,
    read_until,
    relay_rig,
    request,
    tunnel_entry,
)
from statuses import states_of

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    RelayConnectError,
    ReplacedError,
    StorageError,
    TunnelAuthError,
    TunnelError,
    UnknownError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.dialing import dial_tcp
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore, MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import Settings, SettingsFile, SettingsUpdate
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall, StatusContract
from pioneer_tunnel.transports import TRANSPORTS
from pioneer_tunnel.transports.interface import Deliver, Report, RoundTrip, Session, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

ON: Final = SettingsUpdate(enabled=True)
OFF: Final = SettingsUpdate(enabled=False)
NEW_KEY: Final = SettingsUpdate(key=OTHER_KEY)
CLEAR_KEY: Final = SettingsUpdate(clear_key=True)


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    """A gateway for tests in virtual time."""
    return Gateway(tmp_path)


@pytest.fixture
def real_gateway(tmp_path: Path) -> Gateway:
    """A gateway with a clock, threads and a relay on loopback."""
    return Gateway(tmp_path, keystore=FileKeystore(tmp_path / "keystore"))


# The table, row by row: what is published when there is no generation


@in_virtual_time
async def test_before_the_first_run_it_is_disabled_whatever_the_settings_say(gateway: Gateway) -> None:
    gateway.store("enabled = true")
    remote_access = gateway.remote_access()
    assert shown(remote_access) == (State.DISABLED, None)
    assert remote_access.status.updated_at_unix == EPOCH
    assert remote_access.status.to_wire() == {"state": "disabled", "updated_at_unix": EPOCH}


@in_virtual_time
async def test_settings_that_say_nothing_are_disabled(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.DISABLED, None)
        await trio.sleep(3600)
        assert shown(remote_access) == (State.DISABLED, None)
    assert gateway.transport.attempts == []
    assert states_of(remote_access.history) == [State.DISABLED, State.STOPPED]


NO_GENERATION: Final[dict[str, tuple[str, dict[str, Any], ErrorKind]]] = {
    # All that is wrong in the first one is found in the contract's order, as it is mended.
    "unknown transport": ("transport = 'pigeon'\nserver = 'http://x'", {}, ErrorKind.UNSUPPORTED_TRANSPORT),
    "noise": ("transport = 'noise'\nserver = 'http://x'", {}, ErrorKind.UNSUPPORTED_TRANSPORT),
    "a transport this install lacks": ("transport = 'tls'", {}, ErrorKind.UNSUPPORTED_TRANSPORT),
    "the default, tcp, not installed": ("", {"relay_addr": "relay.test:2333"}, ErrorKind.UNSUPPORTED_TRANSPORT),
    "an invalid server": ("server = 'http://x'", {}, ErrorKind.INVALID_SETTINGS),
    "a server that contradicts": ("transport = 'websocket'\nserver = 'h:0'", {}, ErrorKind.INVALID_SETTINGS),
    "a service name that no wire takes": (f"service_name = '{'n' * 200}'", {}, ErrorKind.INVALID_SETTINGS),
    "no key": ("server = 'wss://elsewhere.test'", {}, ErrorKind.MISSING_KEY),
}


@pytest.mark.parametrize(("settings", "config", "kind"), NO_GENERATION.values(), ids=NO_GENERATION)
@in_virtual_time
async def test_what_rules_a_generation_out_is_final(
    gateway: Gateway, settings: str, config: dict[str, Any], kind: ErrorKind
) -> None:
    gateway.store(f"enabled = true\n{settings}")
    remote_access = gateway.remote_access({"allow_server_override": True} | config)
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, kind)
        assert remote_access.status.retry_at_unix is None
        await remote_access.settled()
        await trio.sleep(3600)
        assert shown(remote_access) == (State.FAILED, kind)
    assert gateway.transport.attempts == []
    assert states_of(remote_access.history) == [State.DISABLED, State.FAILED, State.STOPPED]


@in_virtual_time
async def test_switched_off_nothing_else_is_looked_at(gateway: Gateway) -> None:
    gateway.store("enabled = false\ntransport = 'pigeon'\nserver = 'http://x'")
    gateway.keystore.failing.add("get")
    remote_access = gateway.remote_access({"allow_server_override": True})
    async with running(remote_access):
        assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_each_problem_shows_when_the_one_before_it_is_mended(gateway: Gateway) -> None:
    gateway.store("enabled = true\ntransport = 'pigeon'\nserver = 'http://x'")
    gateway.keystore.failing.add("get")
    remote_access = gateway.remote_access({"allow_server_override": True})
    async with running(remote_access):
        found = [shown(remote_access)]
        for step in ("transport = 'websocket'\nserver = 'http://x'", "server = 'wss://y'", "server = 'wss://y'"):
            gateway.store(f"enabled = true\n{step}")
            if len(found) == 2:
                gateway.keystore.failing.add("get")
            await remote_access.apply(ON)
            await remote_access.settled()
            found.append(shown(remote_access))
        await remote_access.apply(SettingsUpdate(key=KEY))
        await remote_access.settled()
        found.append(shown(remote_access))
    assert found == [
        (State.FAILED, ErrorKind.UNSUPPORTED_TRANSPORT),
        (State.FAILED, ErrorKind.INVALID_SETTINGS),
        (State.FAILED, ErrorKind.IO),
        (State.FAILED, ErrorKind.MISSING_KEY),
        (State.CONNECTED, None),
    ]
    assert gateway.transport.attempts[0].target.address.host == "y"


@in_virtual_time
async def test_a_server_of_the_settings_is_kept_but_not_used_unless_the_operator_allows_it(gateway: Gateway) -> None:
    gateway.store("enabled = true\nserver = 'not an address at all'")
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        assert gateway.transport.attempts[0].target.address.host == "relay.test"
        assert (await remote_access.snapshot()).server == "wss://relay.test"
        await remote_access.apply(SettingsUpdate(server="wss://elsewhere.test"))
        await remote_access.settled()
        assert gateway.transport.attempts[-1].target.address.host == "relay.test"
        assert gateway.stored().server == "wss://elsewhere.test"


UNUSABLE_KEYS: Final = {"short": RelayKey("short"), "public": RelayKey(f" Ed25519:{'0' * 64}")}


@pytest.mark.parametrize("key", UNUSABLE_KEYS.values(), ids=UNUSABLE_KEYS)
@in_virtual_time
async def test_a_stored_key_that_cannot_work_is_refused_before_anything_is_dialled(
    gateway: Gateway, key: RelayKey
) -> None:
    gateway.store()
    await gateway.keystore.put(DEFAULT_SECRET_REF, key)
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
    assert gateway.transport.attempts == []


REFUSED: Final[dict[str, tuple[dict[str, Any], SettingsUpdate, type[TunnelError], str]]] = {
    # configuration, update, error, what it says
    "a short key": ({}, SettingsUpdate(enabled=False, key=RelayKey("xx")), InvalidSettingsError, "20 characters"),
    "a public key": ({}, SettingsUpdate(key=UNUSABLE_KEYS["public"]), InvalidSettingsError, "public half"),
    "a public key over tcp": (
        {"relay_addr": "relay.test:2333"},
        SettingsUpdate(key=UNUSABLE_KEYS["public"]),
        InvalidSettingsError,
        "public half",
    ),
    "a short key, moved to a WebSocket": (
        {"relay_addr": "relay.test:2333"},
        SettingsUpdate(server="wss://relay.test", key=RelayKey("xx")),
        InvalidSettingsError,
        "20 characters",
    ),
    "not an address": ({}, SettingsUpdate(server="http://x"), InvalidSettingsError, "server: .*'http://x'"),
    "no port": ({}, SettingsUpdate(enabled=False, server="relay.test"), InvalidSettingsError, "no port"),
    "an address that contradicts": (
        {"relay_addr": "relay.test:2333", "transport": "tcp"},
        SettingsUpdate(server="wss://relay.test"),
        InvalidSettingsError,
        "means websocket",
    ),
    "an address of a transport that is not there": (
        {},
        SettingsUpdate(server="relay.test:2333"),
        UnsupportedTransportError,
        "'tcp'",
    ),
}


@pytest.mark.parametrize(("config", "update", "error", "says"), REFUSED.values(), ids=REFUSED)
@in_virtual_time
async def test_an_update_that_cannot_work_is_refused_and_nothing_is_written(
    gateway: Gateway, config: dict[str, Any], update: SettingsUpdate, error: type[TunnelError], says: str
) -> None:
    transports = {"websocket": gateway.transport} | ({"tcp": gateway.transport} if config else {})
    remote_access = gateway.remote_access(config | {"allow_server_override": True}, transports=transports)
    async with connected(remote_access):
        written = gateway.settings_path.read_bytes()
        history = remote_access.history
        with pytest.raises(error, match=says):
            await remote_access.apply(update)
        await trio.sleep(60)
        assert remote_access.history == history
    assert gateway.settings_path.read_bytes() == written
    assert await gateway.stored_key() == KEY


@in_virtual_time
async def test_a_stored_key_is_too_short_for_the_transport_that_a_new_server_takes(gateway: Gateway) -> None:
    transports = {"websocket": gateway.transport, "tcp": gateway.transport}
    config = {"relay_addr": "relay.test:2333", "allow_server_override": True}
    remote_access = gateway.remote_access(config, transports=transports)
    short = RelayKey("xx")
    await remote_access.apply(SettingsUpdate(key=short))
    for update in (SettingsUpdate(server="wss://relay.test"), SettingsUpdate(server="wss://relay.test", key=short)):
        with pytest.raises(InvalidSettingsError, match="20 characters"):
            await remote_access.apply(update)
    assert gateway.stored() == Settings()
    await remote_access.apply(SettingsUpdate(server="elsewhere.test:2333"))
    await remote_access.apply(SettingsUpdate(server="wss://relay.test", key=KEY))
    assert gateway.stored() == Settings(server="wss://relay.test")


@in_virtual_time
async def test_what_was_wrong_before_is_no_reason_to_refuse_an_update(gateway: Gateway) -> None:
    gateway.store("enabled = true\ntransport = 'pigeon'\nserver = 'http://x'")
    remote_access = gateway.remote_access({"allow_server_override": True})
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=False, key=KEY, server="wss://y"))
        await remote_access.settled()
        assert shown(remote_access) == (State.DISABLED, None)
    assert gateway.stored() == Settings(transport="pigeon", server="wss://y")


@in_virtual_time
async def test_a_server_that_is_not_used_is_not_judged(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    await remote_access.apply(SettingsUpdate(server="not an address at all"))
    assert gateway.stored().server == "not an address at all"


@in_virtual_time
async def test_settings_that_cannot_be_read_are_io_and_named(gateway: Gateway) -> None:
    gateway.settings_path.mkdir()
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.IO)
        assert str(gateway.settings_path) in (remote_access.status.message or "")
        gateway.settings_path.rmdir()
        gateway.store("enabled = false")
        await remote_access.apply(OFF)
        await remote_access.settled()
        assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_settings_that_are_not_toml_are_invalid_and_stay(gateway: Gateway) -> None:
    gateway.settings_path.write_text("[remote_access\n")
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
        with pytest.raises(InvalidSettingsError, match="gateway-settings"):
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
    assert gateway.settings_path.read_text() == "[remote_access\n"
    assert await gateway.stored_key() is None


@in_virtual_time
async def test_a_keystore_that_others_can_read_is_io_and_says_how_to_mend_it(gateway: Gateway) -> None:
    gateway.keystore = FileKeystore(gateway.folder / "keystore")
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    (gateway.folder / "keystore").chmod(0o755)
    gateway.store()
    remote_access = gateway.remote_access()
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.IO)
        assert "chmod 700" in (remote_access.status.message or "")
        (gateway.folder / "keystore").chmod(0o700)
        await remote_access.apply(ON)
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)


@pytest.mark.parametrize("runtime_dir", ["missing/remote-access", "file/remote-access", "file"])
@in_virtual_time
async def test_a_runtime_folder_that_cannot_be_made_is_io(gateway: Gateway, runtime_dir: str) -> None:
    (gateway.folder / "file").touch()
    gateway.store()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    remote_access = gateway.remote_access({"runtime_dir": runtime_dir})
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.IO)
        assert str(gateway.folder) in (remote_access.status.message or "")


# A host that keeps its key elsewhere


def provider(*answers: RelayKey | Exception | None) -> Callable[[], Any]:
    """Gives one answer after another, the last one again and again."""
    left = list(answers)

    async def provide() -> RelayKey | None:
        await trio.lowlevel.checkpoint()
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return provide


@in_virtual_time
async def test_a_key_provider_is_asked_at_each_generation(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access(key_provider=provider(None, KEY, OTHER_KEY))
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.MISSING_KEY)
        for key in (KEY, OTHER_KEY):
            await remote_access.apply(OFF)
            await remote_access.apply(ON)
            await remote_access.settled()
            assert gateway.transport.attempts[-1].target.key == key


@in_virtual_time
async def test_a_key_that_is_kept_elsewhere_is_neither_saved_nor_cleared_here(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access(key_provider=provider(KEY))
    async with running(remote_access):
        await remote_access.settled()
        for update in (SettingsUpdate(enabled=False, key=OTHER_KEY), SettingsUpdate(enabled=False, clear_key=True)):
            with pytest.raises(InvalidSettingsError, match="elsewhere"):
                await remote_access.apply(update)
        assert gateway.stored().enabled
        assert await remote_access.has_key()
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_a_key_provider_that_raises_is_unknown_and_asked_again_as_the_policy_has_it(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.store()
    asked: list[float] = []
    answer = provider(*[LookupError("the vault is sealed")] * 3, KEY)

    async def key_provider() -> RelayKey | None:
        asked.append(trio.current_time())
        key: RelayKey | None = await answer()
        return key

    remote_access = gateway.remote_access(key_provider=key_provider)
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        assert remote_access.status.retry_at_unix == EPOCH + 1
        await trio.sleep(6.9)
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        await trio.sleep(0.2)
        assert shown(remote_access) == (State.CONNECTED, None)
    assert asked == [0, 1, 3, 7]
    assert "the vault is sealed" in caplog.text
    assert all("vault" not in str(status) for status in remote_access.history)


@in_virtual_time
async def test_a_key_provider_that_keeps_raising_uses_the_restarts_up(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access({"max_restarts": 2}, key_provider=provider(LookupError()))
    async with running(remote_access):
        await trio.sleep(2.9)
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        await trio.sleep(0.2)
        assert shown(remote_access) == (State.FAILED, ErrorKind.RESTART_LIMIT_REACHED)
        assert remote_access.status.retry_at_unix is None
        assert "2 restarts" in (remote_access.status.message or "")
        assert "LookupError" in (remote_access.status.message or "")
        await trio.sleep(3600)
        assert shown(remote_access) == (State.FAILED, ErrorKind.RESTART_LIMIT_REACHED)


@in_virtual_time
async def test_retry_now_cuts_the_wait_for_a_key_provider_short(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access({"restart_initial_ms": 30_000}, key_provider=provider(LookupError(), KEY))
    async with running(remote_access):
        await trio.sleep(1)
        remote_access.retry_now()
        await trio.sleep(1)
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_a_key_provider_that_never_answers_holds_up_nothing_but_its_generation(gateway: Gateway) -> None:
    async def key_provider() -> NoReturn:
        await trio.sleep_forever()
        raise AssertionError

    remote_access = gateway.remote_access(key_provider=key_provider)
    with trio.fail_after(1):
        async with running(remote_access):
            await remote_access.apply(ON)
            await trio.testing.wait_all_tasks_blocked()
            await remote_access.apply(OFF)
            await remote_access.settled()
            assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_what_a_key_provider_raises_does_not_come_out_of_a_snapshot_bare(gateway: Gateway) -> None:
    remote_access = gateway.remote_access(key_provider=provider(LookupError("secret")))
    with pytest.raises(UnknownError) as raised:
        await remote_access.snapshot()
    assert "secret" not in str(raised.value)


@in_virtual_time
async def test_a_place_for_the_key_is_given_once(gateway: Gateway) -> None:
    wrong: list[dict[str, Any]] = [{}, {"keystore": MemoryKeystore(), "key_provider": provider(None)}]
    for arguments in wrong:
        with pytest.raises(TypeError, match="either keystore or key_provider"):
            RemoteAccess(gateway.config(), settings=SettingsFile(gateway.settings_path), **arguments)


# Apply and run


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


# One generation after another


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


# What the visitors notice


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


# Whole or not at all


@in_virtual_time
async def test_when_the_settings_cannot_be_written_the_old_key_is_put_back(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    for old in (None, KEY):
        if old is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old)
        with failing_once("replace"), pytest.raises(StorageError, match="gateway-settings"):
            await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
        assert await gateway.stored_key() == old
        assert gateway.stored() == Settings()


@pytest.mark.parametrize("late", [False, True])
@in_virtual_time
async def test_when_the_key_cannot_be_deleted_the_settings_are_put_back(gateway: Gateway, late: bool) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await remote_access.apply(SettingsUpdate(server="wss://first.test"))
        await remote_access.settled()
        history = remote_access.history
        (gateway.keystore.failing_late if late else gateway.keystore.failing).add("delete")
        with pytest.raises(StorageError, match="cannot delete"):
            await remote_access.apply(SettingsUpdate(enabled=False, server="", clear_key=True))
        assert gateway.stored() == Settings(enabled=True, server="wss://first.test")
        assert await gateway.stored_key() == KEY
        await trio.sleep(10)
        assert remote_access.history == history


@pytest.mark.parametrize("late", [False, True])
@in_virtual_time
async def test_when_the_key_cannot_be_saved_nothing_is_changed(gateway: Gateway, late: bool) -> None:
    remote_access = gateway.remote_access()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    (gateway.keystore.failing_late if late else gateway.keystore.failing).add("put")
    with pytest.raises(StorageError, match="cannot put"):
        await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
    assert gateway.stored() == Settings()
    assert await gateway.stored_key() == KEY


@in_virtual_time
async def test_what_could_not_be_put_back_is_told(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_access = gateway.remote_access()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)

    def fail(*_: object, **__: object) -> NoReturn:
        gateway.keystore.failing.add("put")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError) as raised:
        await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
    assert "gateway-settings" in str(raised.value)
    assert "nor could the relay key be put back" in str(raised.value)
    assert "nor could the relay key be put back" in caplog.text


@in_virtual_time
async def test_a_key_that_cannot_be_opened_is_replaced_or_cleared(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    for update, key in ((NEW_KEY, OTHER_KEY), (CLEAR_KEY, None)):
        await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
        gateway.keystore.failing.add("get")
        await remote_access.apply(update)
        assert await gateway.stored_key() == key


UPDATES: Final = {
    "save": (None, SettingsUpdate(enabled=True, server="wss://new.test", key=OTHER_KEY), OTHER_KEY),
    "replace": (KEY, SettingsUpdate(enabled=True, server="wss://new.test", key=OTHER_KEY), OTHER_KEY),
    "clear": (KEY, SettingsUpdate(enabled=True, server="wss://new.test", clear_key=True), None),
    "settings alone": (KEY, SettingsUpdate(enabled=True, server="wss://new.test"), KEY),
}
NEW_SETTINGS: Final = Settings(enabled=True, server="wss://new.test")


@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_whatever_fails_once_leaves_all_old_or_all_new(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
) -> None:
    """Each call of the operating system that writes fails in its turn, the file keystore's and the settings' alike."""
    outcomes = set()
    for name in STEPS:
        for after in range(30):
            folder = tmp_path / f"{name}-{after}"
            folder.mkdir()
            gateway = Gateway(folder, keystore=FileKeystore(folder / "keystore"))
            if old_key is not None:
                await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
            error = None
            with failing_once(name, after=after) as failed:
                try:
                    await gateway.remote_access().apply(update)
                except StorageError as raised:
                    error = raised
            found = gateway.stored(), await gateway.stored_key()
            assert found == ((NEW_SETTINGS, new_key) if error is None else (Settings(), old_key)), (name, after)
            outcomes.add(error is None)
            if not failed:
                break
        else:
            pytest.fail(f"there is no end to the calls of {name}")
    assert outcomes == {True, False}


@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_a_crash_at_any_moment_leaves_each_store_whole_and_the_start_goes_on(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
) -> None:
    allowed = {(Settings(), old_key), (NEW_SETTINGS, new_key)}
    # A new key is stored before the settings are, and cleared after them.
    allowed.add((NEW_SETTINGS, old_key) if update.deletes_key else (Settings(), new_key))
    found = set()
    for count in range(200):
        folder = tmp_path / str(count)
        folder.mkdir()
        gateway = Gateway(folder, keystore=FileKeystore(folder / "keystore"))
        if old_key is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
        crashed = False
        with crash_after(count):
            try:
                await gateway.remote_access().apply(update)
            except Crash:
                crashed = True
        stored = gateway.stored(), await gateway.stored_key()
        assert stored in allowed, f"after {count} calls"
        found.add(stored)
        remote_access = gateway.remote_access()
        async with running(remote_access):
            await remote_access.settled()
            expected = (
                (State.DISABLED, None)
                if not stored[0].enabled
                else (State.FAILED, ErrorKind.MISSING_KEY)
                if stored[1] is None
                else (State.CONNECTED, None)
            )
            assert shown(remote_access) == expected
        if not crashed:
            break
    else:
        pytest.fail("there is no end to the calls")
    assert found == allowed


class CancelAtStep(trio.abc.Instrument):
    """Cancels a task when it has come to its checkpoint number so and so."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task, self._scope, self._left = task, scope, step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


@pytest.mark.parametrize("waiting", [False, True], ids=["alone", "while another apply goes on"])
@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_cancelling_an_apply_at_any_point_loses_nothing(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
    waiting: bool,
) -> None:
    """Before it has begun, nothing is changed and nothing handed over; from then on it is finished, and handed over."""
    done = []
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        gateway = Gateway(folder)
        if old_key is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
        remote_access = gateway.remote_access()
        async with running(remote_access) as nursery:
            if waiting:
                nursery.start_soon(remote_access.apply, SettingsUpdate(server="wss://before.test"))
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
            with trio.CancelScope() as scope:
                if step == 0:
                    scope.cancel()
                instrument = CancelAtStep(trio.lowlevel.current_task(), scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await remote_access.apply(update)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                await trio.lowlevel.checkpoint()
            await remote_access.settled()
            await trio.testing.wait_all_tasks_blocked()
            before = Settings(server="wss://before.test") if waiting else Settings()
            stored = gateway.stored(), await gateway.stored_key()
            assert stored in {(before, old_key), (NEW_SETTINGS, new_key)}, step
            done.append(stored[0] == NEW_SETTINGS)
            # What was made durable was handed over as well.
            connected_or_not = State.FAILED if new_key is None else State.CONNECTED
            assert remote_access.status.state is (connected_or_not if done[-1] else State.DISABLED)
        if not scope.cancelled_caught:
            break
    else:
        pytest.fail("there is no end to the checkpoints")
    assert done == sorted(done)
    assert set(done) == {False, True}


@in_virtual_time
async def test_a_plan_is_never_made_of_half_an_apply(gateway: Gateway) -> None:
    """An apply that fails while `run` reads: what it took back is not acted upon."""
    gateway.store("enabled = true")
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    for delay in range(12):
        for fail in ("settings", "key"):
            gateway.transport = ScriptedTransport()
            remote_access = gateway.remote_access()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remote_access.run)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                if fail == "settings":
                    with failing_once("replace"), contextlib.suppress(StorageError):
                        await remote_access.apply(SettingsUpdate(server=f"wss://{delay}.test", key=OTHER_KEY))
                else:
                    gateway.keystore.failing.add("delete")
                    with pytest.raises(StorageError):
                        await remote_access.apply(SettingsUpdate(enabled=False, clear_key=True))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
                assert [attempt.target.key for attempt in gateway.transport.attempts] == [KEY]
                assert State.DISABLED not in states_of(remote_access.history)[1:]
                nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_key_that_is_taken_back_while_run_reads_it_is_not_used(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.store("enabled = true")
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    failing = gateway.keystore.hold_get = trio.Event()

    def fail(*_: object, **__: object) -> NoReturn:
        failing.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    remote_access = gateway.remote_access()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(remote_access.run)
        await trio.testing.wait_all_tasks_blocked()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            # The settings are written when the new key is stored already, and right then `run` reads it.
            with pytest.raises(StorageError):
                await remote_access.apply(SettingsUpdate(server="wss://elsewhere.test", key=OTHER_KEY))
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        assert [attempt.target.key for attempt in gateway.transport.attempts] == [KEY]
        nursery.cancel_scope.cancel()


# Over a relay


BOUND: Final = [tunnel_entry(bind_addr="127.0.0.1:0")]


class Dialling:
    """The way to the relay and to the local gateway, with a memory of the connections that were made."""

    def __init__(self, rig: RelayRig) -> None:
        self._rig = rig
        self.made: list[trio.SocketStream] = []

    async def __call__(self, host: str, port: int) -> trio.SocketStream:
        stream = await (self._rig.dial(host, port) if host == RELAY_NAME else dial_tcp(host, port))
        self.made.append(stream)
        return stream

    def open(self) -> int:
        return sum(stream.socket.fileno() != -1 for stream in self.made)


def over_relay(gateway: Gateway, rig: RelayRig, config: dict[str, Any] | None = None, **changes: Any) -> RemoteAccess:
    fields = {"relay_addr": f"ws://{RELAY_NAME}", "restart_initial_ms": 10} | (config or {})
    arguments: dict[str, Any] = {"transports": TRANSPORTS, "dial": Dialling(rig)}
    return gateway.remote_access(fields, **(arguments | changes))


@contextlib.asynccontextmanager
async def up(remote_access: RemoteAccess) -> AsyncIterator[trio.Nursery]:
    with no_hang():
        async with running(remote_access) as nursery:
            await remote_access.apply(SettingsUpdate(enabled=True, key=RELAY_KEY))
            await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
            yield nursery


async def say_back(stream: TunnelStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


async def test_a_visitor_is_served_by_a_handler_and_leaving_run_leaves_nothing(real_gateway: Gateway) -> None:
    async with relay_rig() as rig:
        await trio.testing.wait_all_tasks_blocked(0.01)
        before = living_tasks()
        with nothing_left_behind():
            remote_access = over_relay(real_gateway, rig, handler=say_back)
            async with up(remote_access):
                assert remote_access.status.public_url == f"http://{HOST}"
                visitor = await rig.visit()
                await visitor.send_all(request(body=b"hello"))
                await read_exactly(visitor, len(request(body=b"hello")))
            assert shown(remote_access) == (State.STOPPED, None)
            with pytest.raises(trio.BrokenResourceError):
                await read_exactly(visitor, 1)
            await visitor.aclose()
            await eventually(lambda: living_tasks() <= before)  # the relay's side takes a moment


async def test_a_wrong_key_is_told_and_the_right_one_mends_it(real_gateway: Gateway) -> None:
    async with relay_rig() as rig:
        remote_access = over_relay(real_gateway, rig)
        with no_hang():
            async with running(remote_access):
                await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
                await remote_access.settled()
                assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
                await remote_access.apply(SettingsUpdate(key=RELAY_KEY))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
        contract = StatusContract()
        for status in remote_access.history:
            contract.see(status)


async def test_a_generation_begins_when_the_sockets_of_the_old_one_are_closed(real_gateway: Gateway) -> None:
    open_at_start: list[int] = []
    serving = 0

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        nonlocal serving
        open_at_start.append(dial.open())
        serving += 1
        assert serving == 1
        try:
            await TRANSPORTS["websocket"](target, deliver, report, task_status=task_status)
        finally:
            serving -= 1
        raise AssertionError

    async with relay_rig() as rig, trio.open_nursery() as nursery:
        dial = Dialling(rig)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, trio.aclose_forcefully, listeners)
        remote_access = over_relay(
            real_gateway,
            rig,
            {"local_addr": f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", "apply_grace_ms": 20},
            dial=dial,
            handler=None,
            transports={"websocket": serve},
        )
        async with up(remote_access):
            for number in range(10):
                visitor = await rig.visit()
                await visitor.send_all(request())
                await remote_access.apply(SettingsUpdate(server=f"wss://{number}.test"))
                await remote_access.settled()
                await visitor.aclose()
            assert shown(remote_access) == (State.CONNECTED, None)
        assert open_at_start == [0] * 11
        assert dial.open() == 0
        nursery.cancel_scope.cancel()


async def test_streams_that_a_handler_holds_are_broken_and_never_awaited(real_gateway: Gateway) -> None:
    held, broken, let_go = trio.Event(), trio.Event(), trio.Event()

    async def handler(stream: TunnelStream) -> None:
        with trio.CancelScope(shield=True):
            await stream.send_all(b"half an answer")
            held.set()
            with pytest.raises(trio.BrokenResourceError):
                await read_exactly(stream, 1_000_000)
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")
            broken.set()
            await let_go.wait()

    async with relay_rig() as rig:
        remote_access = over_relay(real_gateway, rig, {"apply_grace_ms": 100}, handler=handler)
        async with up(remote_access):
            try:
                visitor = await rig.visit()
                await visitor.send_all(request())
                assert await read_exactly(visitor, 14) == b"half an answer"
                await held.wait()
                await remote_access.apply(SettingsUpdate(server="wss://changed.test"))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
                await broken.wait()
                with pytest.raises(trio.BrokenResourceError):  # a reset: half an answer is not taken for a whole one
                    await read_exactly(visitor, 1)
                await visitor.aclose()
            finally:
                let_go.set()


async def reset(visitor: trio.SocketStream) -> None:
    """The visitor's connection ends, and not orderly."""
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some(1)
    await visitor.aclose()


async def control(remote_access: RemoteAccess, stream: trio.abc.Stream) -> None:
    """A line of JSON in, an update made, a line of JSON out; then the connection stays open, as a WebSocket does."""
    try:
        line = b""
        while not line.endswith(b"\n"):
            data = await stream.receive_some()
            if not data:
                return  # it was only looked whether somebody is here
            line += data
        fields = json.loads(line)
        if "key" in fields:
            fields["key"] = RelayKey(fields["key"])
        await remote_access.apply(SettingsUpdate(**fields))
        snapshot = await remote_access.snapshot()
        await stream.send_all(json.dumps(snapshot.to_wire()).encode() + b"\n")
        await stream.receive_some(1)
    except trio.BrokenResourceError:
        pass


@pytest.mark.parametrize("forwarded", [False, True], ids=["in process", "forwarded"])
async def test_an_update_through_the_tunnel_that_it_changes_gets_its_reply(
    real_gateway: Gateway, forwarded: bool, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1  # the real time, but for the grace, which is over when the reply is here
    async with relay_rig(tunnels=BOUND) as rig, trio.open_nursery() as nursery:

        async def handler(stream: trio.abc.Stream) -> None:
            await control(remote_access, stream)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        remote_access = over_relay(
            real_gateway,
            rig,
            {"local_addr": f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", "apply_grace_ms": 20_000},
            handler=None if forwarded else handler,
        )

        async def ask(**update: object) -> tuple[dict[str, Any], trio.SocketStream]:
            visitor = await trio.open_tcp_stream("127.0.0.1", rig.addresses.tunnels["office"].port)
            await visitor.send_all(json.dumps(update).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await read_until(visitor, b"\n"))
            return answer, visitor

        async with up(remote_access):
            # To a key that the relay does not know, and back by a way of one's own.
            answer, visitor = await ask(key=OTHER_KEY.reveal())
            assert answer["has_key"]
            mock_clock.jump(20)
            await remote_access.settled()
            assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
            await reset(visitor)
            await remote_access.apply(SettingsUpdate(key=RELAY_KEY))
            await remote_access.settled()
            answer, visitor = await ask(server="wss://changed.test", enabled=True)
            await visitor.aclose()
            await remote_access.settled()
            answer, visitor = await ask(enabled=False)
            assert answer["enabled"] is False
            mock_clock.jump(20)
            await remote_access.settled()
            assert shown(remote_access) == (State.DISABLED, None)
            await reset(visitor)
        nursery.cancel_scope.cancel()


async def test_a_gateway_that_comes_back_takes_its_tunnel_over(real_gateway: Gateway) -> None:
    """Its instance is kept over restarts: the relay takes the new process for the same gateway."""
    async with relay_rig() as rig:
        first = over_relay(real_gateway, rig)
        second = over_relay(real_gateway, rig, handler=say_back)
        async with up(first), running(second):
            # They take it from each other for as long as both run.
            await eventually(lambda: (State.CONNECTED, None) in said_by(second))
            lost = (State.RECONNECTING, ErrorKind.RELAY_CONNECT_FAILED)
            await eventually(lambda: lost in said_by(first))


def said_by(remote_access: RemoteAccess) -> list[tuple[State, ErrorKind | None]]:
    return [(status.state, status.error_kind) for status in remote_access.history]


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 8, 20, 50])
async def test_leaving_run_at_any_moment_leaves_no_task_and_no_socket(real_gateway: Gateway, milliseconds: int) -> None:
    real_gateway.store()
    await real_gateway.keystore.put(DEFAULT_SECRET_REF, RELAY_KEY)
    async with relay_rig() as rig:
        dial = Dialling(rig)
        remote_access = over_relay(real_gateway, rig, handler=say_back, dial=dial)
        with trio.move_on_after(milliseconds / 1000):
            await remote_access.run()
        assert dial.open() == 0
        assert shown(remote_access) == (State.STOPPED, None)
        async with running(remote_access):
            with no_hang():
                await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
