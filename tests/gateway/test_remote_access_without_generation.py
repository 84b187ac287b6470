"""What `RemoteAccess` publishes when there is nothing to run, row by row of the contract; which updates it refuses."""

from __future__ import annotations

from typing import Any, Final

import pytest
import trio
import trio.testing
from gateway import (
    EPOCH,
    KEY,
    OFF,
    ON,
    Gateway,
    connected,
    in_virtual_time,
    running,
    shown,
)
from statuses import states_of

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate


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
