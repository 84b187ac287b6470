"""The contract's two methods and its notification, as desktop clients speak them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import pytest
import trio
import trio.testing
from gateway import EPOCH, KEY, Gateway, failing_once, in_virtual_time, running
from schema import problems_with
from shown import everything_shown

from pioneer_tunnel._model.errors import RelayResolveError, TunnelAuthError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._wire.json_rpc import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, RpcError
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore
from pioneer_tunnel.gateway.rpc import STATUS_CHANGED, RemoteAccessRpc
from pioneer_tunnel.gateway.settings import Settings
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall
from pioneer_tunnel.transports.interface import RoundTrip

CANARY: Final = "ptk1_canary-THIS-MUST-NOT-BE-SEEN-0123456789"


async def call(rpc: RemoteAccessRpc, method: str, params: Any = None) -> dict[str, Any]:
    """A request as it comes over a wire; the answer as it goes there, valid by the schema."""
    answer: dict[str, Any] = json.loads(json.dumps(await rpc.handle(method, json.loads(json.dumps(params)))))
    assert problems_with(method, {"params": params or {}, "result": answer}) == []
    section: dict[str, Any] = answer["settings"]["remote_access"]
    return section


async def update(rpc: RemoteAccessRpc, **fields: object) -> dict[str, Any]:
    return await call(rpc, "settings/update", {"update": {"remote_access": fields}})


async def refused(rpc: RemoteAccessRpc, method: str, params: Any = None) -> RpcError:
    with pytest.raises(RpcError) as raised:
        await rpc.handle(method, params)
    assert raised.value.to_wire() == {"code": raised.value.code, "message": raised.value.message}
    assert CANARY not in everything_shown(raised.value)
    return raised.value


# The messages of a desktop client


@in_virtual_time
async def test_a_fresh_gateway_says_what_it_has(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    nothing: list[Any] = [{}, None]
    for params in nothing:
        assert await call(rpc, "settings/get", params) == {
            "enabled": False,
            "server": "wss://relay.test",
            "service_name": "pioneer_gateway",
            "transport": "websocket",
            "has_key": False,
            "status": {"state": "disabled", "updated_at_unix": EPOCH},
        }


@in_virtual_time
async def test_switching_on_saving_a_key_and_switching_off(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Connect(public_url="https://office.example.com")])
    remote_access = gateway.remote_access()
    rpc = RemoteAccessRpc(remote_access)
    async with running(remote_access):
        answer = await update(rpc, enabled=True)
        assert (answer["enabled"], answer["has_key"]) == (True, False)
        await remote_access.settled()
        status = (await call(rpc, "settings/get"))["status"]
        assert (status["state"], status["error_kind"]) == ("failed", "missing_key")
        assert "message" in status
        assert "retry_at_unix" not in status
        answer = await update(rpc, key=f"  {CANARY}\n")
        assert answer["has_key"]
        await remote_access.settled()
        assert (await call(rpc, "settings/get"))["status"] == {
            "state": "connected",
            "updated_at_unix": EPOCH,
            "public_url": "https://office.example.com",
            "attempt": 1,
        }
        assert gateway.transport.attempts[0].target.key == RelayKey(CANARY)
        assert not (await update(rpc, enabled=False))["enabled"]
        await remote_access.settled()
        assert (await call(rpc, "settings/get"))["status"] == {"state": "disabled", "updated_at_unix": EPOCH}


@in_virtual_time
async def test_absent_and_null_mean_unchanged(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access({"allow_server_override": True}))
    await update(rpc, enabled=True, server=" wss://elsewhere.test ", key=CANARY)
    wanted = Settings(enabled=True, server="wss://elsewhere.test")
    unchanged: list[dict[str, Any]] = [
        {"update": {"remote_access": {}}},
        {"update": {"remote_access": {"enabled": None, "server": None, "key": None, "clear_key": None}}},
        {"update": {"remote_access": {"of_a_newer_client": 1}}},
        {"update": {"remote_access": {"clear_key": False}}},
        {"update": {"remote_access": None}},
        {"update": {}},
        {"update": {"another section": {"a": 1}}},
    ]
    for params in unchanged:
        answer = await rpc.handle("settings/update", params)
        assert answer["settings"]["remote_access"]["server"] == "wss://elsewhere.test"
        assert gateway.stored() == wanted
        assert await gateway.stored_key() == RelayKey(CANARY)
    answer = await update(rpc, server="  ")
    assert answer["server"] == "wss://relay.test"
    assert gateway.stored() == Settings(enabled=True)


@in_virtual_time
async def test_a_new_key_wins_over_clear_key(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    assert (await update(rpc, key=CANARY, clear_key=True))["has_key"]
    assert await gateway.stored_key() == RelayKey(CANARY)
    assert not (await update(rpc, clear_key=True))["has_key"]
    assert not (await update(rpc, clear_key=True))["has_key"]
    assert await gateway.stored_key() is None


@in_virtual_time
async def test_limits_count_after_trimming(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    await rpc.handle("settings/update", {"update": {"remote_access": {"key": f" {'k' * 4096} ", "server": "s" * 512}}})
    assert await gateway.stored_key() == RelayKey("k" * 4096)
    assert gateway.stored().server == "s" * 512


@in_virtual_time
async def test_the_address_in_use_is_shown_and_process_is_told_as_tcp(gateway: Gateway) -> None:
    gateway.store("service_name = 'office'\nserver = 'wss://elsewhere.test'")
    rpc = RemoteAccessRpc(gateway.remote_access({"relay_addr": "relay.test:2333"}))
    answer = await call(rpc, "settings/get")
    assert (answer["server"], answer["transport"], answer["service_name"]) == ("relay.test:2333", "tcp", "office")
    for transport, told, detail in (
        ("tls", "tls", None),
        ("noise", "noise", None),
        ("process", "tcp", "process"),
        ("pigeon", "tcp", None),
    ):
        gateway.store(f"transport = '{transport}'")
        answer = await call(rpc, "settings/get")
        assert (answer["transport"], answer.get("transport_detail")) == (told, detail)


@in_virtual_time
async def test_sections_of_the_host_stand_beside_ours(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(
        gateway.remote_access(), other_sections=lambda: {"display": {"dark": True}, "remote_access": "never this"}
    )
    for method, params in (("settings/get", {}), ("settings/update", {"update": {"display": {"dark": False}}})):
        answer = await rpc.handle(method, params)
        assert answer["settings"]["display"] == {"dark": True}
        assert answer["settings"]["remote_access"]["has_key"] is False


# What is refused


@in_virtual_time
async def test_a_method_that_is_none_of_ours_is_not_found(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    for method in ("", "settings/updat", "settings/get ", "gateway/remote_access/status_changed", "x" * 10_000):
        for params in (None, {"update": {"remote_access": {"key": CANARY}}}, [CANARY]):
            error = await refused(rpc, method, params)
            assert error.code == METHOD_NOT_FOUND == -32601
            assert len(error.message) < 400


MALFORMED: Final[dict[str, Any]] = {
    "no params": None,
    "params that are no object": [CANARY],
    "no update": {"remote_access": {"key": CANARY}},
    "an update that is no object": {"update": CANARY},
    "a section that is no object": {"update": {"remote_access": CANARY}},
    "a section that is a list": {"update": {"remote_access": [CANARY]}},
    "an empty key": {"update": {"remote_access": {"key": " \n "}}},
    "a long key": {"update": {"remote_access": {"key": CANARY * 100}}},
    "a key with a control character": {"update": {"remote_access": {"key": f"{CANARY}\x07{CANARY}"}}},
    "a key that is no text": {"update": {"remote_access": {"key": [CANARY]}}},
    "a key and a wrong flag": {"update": {"remote_access": {"key": CANARY, "enabled": 1}}},
    "the key as a flag": {"update": {"remote_access": {"enabled": CANARY}}},
    "the key as clear_key": {"update": {"remote_access": {"clear_key": CANARY}}},
    "the key as a long server": {"update": {"remote_access": {"server": CANARY * 20}}},
    "half of a surrogate pair": {"update": {"remote_access": {"key": f"{CANARY}\ud800"}}},
    "a flag that is text": {"update": {"remote_access": {"enabled": "true"}}},
    "a server that is a number": {"update": {"remote_access": {"server": 1}}},
}


@pytest.mark.parametrize("params", MALFORMED.values(), ids=MALFORMED)
@in_virtual_time
async def test_malformed_values_are_invalid_params_and_change_nothing(gateway: Gateway, params: Any) -> None:
    remote_access = gateway.remote_access()
    async with running(remote_access):
        error = await refused(RemoteAccessRpc(remote_access), "settings/update", params)
        assert error.code == INVALID_PARAMS == -32602
        assert not gateway.settings_path.exists()
        assert await gateway.stored_key() is None
        await trio.testing.wait_all_tasks_blocked()
        assert remote_access.status.state == "disabled"


HOPELESS: Final[dict[str, dict[str, Any]]] = {
    "a short key": {"key": "short-CANARY-key"},
    "a public key": {"key": f"ed25519:{'ab' * 32}", "enabled": True},
    "the key as the server": {"server": CANARY},
    "an address with another scheme": {"server": "http://relay.test"},
    "all at once": {"server": "relay.test", "key": "xx", "enabled": True},
}


@pytest.mark.parametrize("fields", HOPELESS.values(), ids=HOPELESS)
@in_virtual_time
async def test_what_cannot_work_is_invalid_params_and_changes_nothing(
    gateway: Gateway, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    remote_access = gateway.remote_access({"allow_server_override": True})
    rpc = RemoteAccessRpc(remote_access)
    async with running(remote_access):
        await update(rpc, enabled=True, key=KEY.reveal())
        await remote_access.settled()
        written, history = gateway.settings_path.read_bytes(), remote_access.history
        error = await refused(rpc, "settings/update", {"update": {"remote_access": fields}})
        assert error.code == INVALID_PARAMS
        if "key" in fields:
            assert fields["key"] not in everything_shown(error) + caplog.text
        await trio.sleep(60)
        assert remote_access.history == history
    assert gateway.settings_path.read_bytes() == written
    assert await gateway.stored_key() == KEY


@in_virtual_time
async def test_settings_get_with_params_that_are_no_object_is_invalid(gateway: Gateway) -> None:
    error = await refused(RemoteAccessRpc(gateway.remote_access()), "settings/get", [CANARY])
    assert error.code == INVALID_PARAMS


@in_virtual_time
async def test_what_the_disk_refuses_is_an_internal_error_that_names_the_file(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    with failing_once("replace"):
        error = await refused(rpc, "settings/update", {"update": {"remote_access": {"enabled": True, "key": CANARY}}})
    assert error.code == INTERNAL_ERROR == -32603
    assert str(gateway.settings_path) in error.message
    assert (gateway.stored(), await gateway.stored_key()) == (Settings(), None)
    gateway.settings_path.write_text("[remote_access")
    for method, params in (("settings/get", {}), ("settings/update", {"update": {"remote_access": {"key": CANARY}}})):
        error = await refused(rpc, method, params)
        assert error.code == INTERNAL_ERROR


@in_virtual_time
async def test_what_a_host_raises_is_an_internal_error_that_tells_its_type_alone(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async def key_provider() -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise LookupError("of the vault")

    def sections() -> NoReturn:
        raise ZeroDivisionError("of the host")

    for rpc, name in (
        (RemoteAccessRpc(gateway.remote_access(key_provider=key_provider)), "LookupError"),
        (RemoteAccessRpc(gateway.remote_access(), other_sections=sections), "ZeroDivisionError"),
    ):
        error = await refused(rpc, "settings/get", {})
        assert error.code == INTERNAL_ERROR
        assert name in error.message
        assert " of the " not in error.message
    assert "of the vault" in caplog.text
    assert "of the host" in caplog.text


# The key


@in_virtual_time
async def test_the_key_is_seen_nowhere_but_in_the_keystore(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway.keystore = FileKeystore(gateway.folder / "keystore")
    gateway.transport = ScriptedTransport(
        [Fail(RelayResolveError), Connect(5), Fail(TunnelAuthError, message="no"), Connect()]
    )
    remote_access = gateway.remote_access()
    rpc = RemoteAccessRpc(remote_access)
    shown: list[str] = []
    async with running(remote_access) as nursery:

        @nursery.start_soon
        async def listen() -> None:
            shown.extend([repr(notification) async for notification in rpc.notifications()])

        shown.append(repr(await rpc.handle("settings/update", {"update": {"remote_access": {"key": CANARY}}})))
        shown.append(repr(await rpc.handle("settings/update", {"update": {"remote_access": {"enabled": True}}})))
        await trio.sleep(100)
        with failing_once("replace"):
            error = await refused(
                rpc, "settings/update", {"update": {"remote_access": {"key": f"{CANARY}2", "enabled": False}}}
            )
        shown += [everything_shown(error)]
        shown.append(repr(await rpc.handle("settings/update", {"update": {"remote_access": {"enabled": True}}})))
        await trio.sleep(100)
        shown += [repr(each) for each in (remote_access, rpc, remote_access.history, await remote_access.snapshot())]
        shown += [repr(gateway.transport.attempts), repr(vars(remote_access)), repr(vars(rpc))]
        assert gateway.transport.attempts[-1].target.key.reveal() == CANARY
    shown += [caplog.text, *map(repr, caplog.records), *map(str, (vars(record) for record in caplog.records))]
    shown += capfd.readouterr()
    shown += [path.read_bytes().decode("latin-1") for path in gateway.folder.rglob("*") if path.is_file()]
    assert len(caplog.records) >= 1
    assert any("tunnel_auth_failed" in text for text in shown)
    assert [text for text in shown if CANARY in text] == []
    assert await gateway.keystore.get(DEFAULT_SECRET_REF) == RelayKey(CANARY)


# Notifications


@asynccontextmanager
async def listening(gateway: Gateway) -> AsyncIterator[tuple[RemoteAccessRpc, list[dict[str, Any]]]]:
    """A client that takes every notification at once, of a gateway with a key that is switched on."""
    remote_access = gateway.remote_access()
    rpc = RemoteAccessRpc(remote_access)
    told: list[dict[str, Any]] = []

    async def listen() -> None:
        async for notification in rpc.notifications():
            assert notification.keys() == {"jsonrpc", "method", "params"}
            assert (notification["jsonrpc"], notification["method"]) == ("2.0", STATUS_CHANGED)
            assert problems_with(STATUS_CHANGED, json.loads(json.dumps(notification))) == []
            told.append(notification["params"]["status"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        async with running(remote_access):
            await update(rpc, enabled=True, key=KEY.reveal())
            yield rpc, told


@in_virtual_time
async def test_a_notification_is_sent_for_news_and_never_for_a_round_trip(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport(
        [
            Fail(after=1),
            Fail(after=1),
            Connect(
                10,
                after=1,
                public_url="https://a.example.com",
                reports=tuple((seconds, RoundTrip(seconds / 1000)) for seconds in range(1, 9)),
            ),
            Stall(),
        ]
    )
    async with listening(gateway) as (rpc, told):
        await trio.sleep(7.5)
        assert (await call(rpc, "settings/get"))["status"]["relay_rtt_ms"] > 0
        await trio.sleep(60)
    assert [(status["state"], status.get("error_kind"), status.get("retry_at_unix")) for status in told] == [
        ("starting", None, None),
        ("failed", "relay_connect_failed", EPOCH + 2),
        ("failed", "relay_connect_failed", EPOCH + 5),
        ("connected", None, None),
        ("reconnecting", "relay_connect_failed", told[4]["retry_at_unix"]),
        ("stopped", None, None),
    ]
    assert [status.get("public_url") for status in told[3:5]] == ["https://a.example.com"] * 2
    assert [status["updated_at_unix"] - EPOCH for status in told[:4]] == [0, 1, 1, 6]


@in_virtual_time
async def test_a_slow_client_misses_what_lay_between_and_never_the_newest(gateway: Gateway) -> None:
    gateway.transport = ScriptedTransport([Fail()] * 50)
    remote_access = gateway.remote_access({"restart_max_ms": 1000})
    rpc = RemoteAccessRpc(remote_access)
    notifications = rpc.notifications()
    async with running(remote_access):
        await update(rpc, enabled=True, key=KEY.reveal())
        await trio.sleep(1000)
        assert len(remote_access.history) > 100
        first = await anext(notifications)
        assert first["params"]["status"] == remote_access.status.to_wire()
        assert first["params"]["status"]["state"] == "connected"
        with trio.move_on_after(1000) as scope:
            await anext(notifications)
        assert scope.cancelled_caught
    assert [each["params"]["status"]["state"] async for each in notifications] == ["stopped"]


@in_virtual_time
async def test_a_client_that_comes_is_not_told_what_it_can_ask_for(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    rpc = RemoteAccessRpc(remote_access)
    notifications = rpc.notifications()
    async with running(remote_access):
        with trio.move_on_after(10) as scope:
            await anext(notifications)
        assert scope.cancelled_caught
        await update(rpc, enabled=True)
        assert (await anext(notifications))["params"]["status"]["error_kind"] == "missing_key"


@in_virtual_time
async def test_what_is_no_method_at_all_is_refused_as_one(gateway: Gateway) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    wrong: list[Any] = [[], {}, None, 3, float("nan"), "\ud800", "x" * 100_000]
    for method in wrong:
        refusal = await refused(rpc, method)
        assert refusal.code == METHOD_NOT_FOUND
        assert len(json.dumps(refusal.to_wire())) < 1000
