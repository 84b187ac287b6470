"""Each error kind is provoked, and the cure that docs/errors.md names brings the tunnel up."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from rig import no_hang

from pioneer_tunnel import (
    ErrorKind,
    FileKeystore,
    MemoryKeystore,
    RemoteAccess,
    RemoteAccessConfig,
    SettingsFile,
    SettingsUpdate,
    State,
    new_relay_key,
)
from pioneer_tunnel.testing import (
    Crash,
    FaultPlan,
    MemoryRelay,
    NotResolved,
    Refuse,
    ScriptedTransport,
    Takeover,
    open_memory_relay,
    virtual_time,
)


@asynccontextmanager
async def gateway(
    home: Path, relay: MemoryRelay, config: dict[str, Any], **options: Any
) -> AsyncIterator[RemoteAccess]:
    """A gateway that has remote access switched on, with the relay's key."""
    fields: dict[str, Any] = {"relay_addr": relay.url, "base_dir": home} | config
    defaults: dict[str, Any] = {"keystore": MemoryKeystore(), "handler": trio.aclose_forcefully, "dial": relay.dial}
    remote_access = RemoteAccess(
        RemoteAccessConfig(**fields),
        settings=SettingsFile(home / "gateway-settings.toml"),
        **(defaults | options),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, key=relay.key))
        yield remote_access
        nursery.cancel_scope.cancel()


async def shows(remote_access: RemoteAccess, kind: ErrorKind, *, state: State = State.FAILED, final: bool) -> None:
    """Wait until the status shows this error."""
    with trio.fail_after(3600):
        async for status in remote_access.watch():
            if status.error_kind is kind:
                assert status.state is state
                assert (status.retry_at_unix is None) == (final or state is State.CONNECTED)
                assert status.message
                return


async def is_cured(remote_access: RemoteAccess) -> None:
    """Wait until the tunnel is up, and all is well."""
    with trio.fail_after(3600):
        async for status in remote_access.watch():
            if status.state is State.CONNECTED and status.error_kind is None:
                return


async def apply_again(remote_access: RemoteAccess) -> None:
    """Switch off and on."""
    await remote_access.apply(SettingsUpdate(enabled=False))
    await remote_access.apply(SettingsUpdate(enabled=True))


def test_no_kind_is_left_out() -> None:
    shown = re.findall(r"shows\(it, ErrorKind\.(\w+)", Path(__file__).read_text())
    assert sorted(shown) == sorted(kind.name for kind in ErrorKind)


@virtual_time
async def test_two_gateways_with_one_key(tmp_path: Path) -> None:
    async with open_memory_relay(FaultPlan([Takeover(60.0)])) as relay, gateway(tmp_path, relay, {}) as it:
        await shows(it, ErrorKind.INVALID_SETTINGS, final=True)
        await apply_again(it)  # the other one was stopped
        await is_cured(it)


@virtual_time
async def test_a_missing_key(tmp_path: Path) -> None:
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {}) as it:
        await it.apply(SettingsUpdate(clear_key=True))
        await shows(it, ErrorKind.MISSING_KEY, final=True)
        await it.apply(SettingsUpdate(key=relay.key))
        await is_cured(it)


@virtual_time
async def test_a_local_server_that_does_not_run(tmp_path: Path) -> None:
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {}, handler=None) as it:
        await shows(it, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE, state=State.CONNECTED, final=False)
        relay.listen(trio.aclose_forcefully)
        await is_cured(it)


@virtual_time
async def test_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    async with open_memory_relay(FaultPlan([NotResolved()])) as relay, gateway(tmp_path, relay, {}) as it:
        await shows(it, ErrorKind.RELAY_RESOLVE_FAILED, final=False)
        await is_cured(it)  # by itself


@virtual_time
async def test_a_relay_that_does_not_run(tmp_path: Path) -> None:
    async with open_memory_relay(FaultPlan([Refuse()] * 5)) as relay, gateway(tmp_path, relay, {}) as it:
        await shows(it, ErrorKind.RELAY_CONNECT_FAILED, final=False)
        await is_cured(it)  # it was started


@virtual_time
async def test_a_key_that_the_relay_does_not_have(tmp_path: Path) -> None:
    async with open_memory_relay() as relay:
        relay.register("office", new_relay_key())
        async with gateway(tmp_path, relay, {}) as it:
            await shows(it, ErrorKind.TUNNEL_AUTH_FAILED, final=True)
            relay.register("office", relay.key)
            await apply_again(it)
            await is_cured(it)


@virtual_time
async def test_a_transport_that_is_not_offered(tmp_path: Path) -> None:
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {}, transports={}) as it:
        await shows(it, ErrorKind.UNSUPPORTED_TRANSPORT, final=True)
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {"transport": "websocket"}) as it:
        await is_cured(it)


@virtual_time
async def test_restarts_that_are_used_up(tmp_path: Path) -> None:
    plan = FaultPlan([Refuse(), Refuse()])
    async with open_memory_relay(plan) as relay, gateway(tmp_path, relay, {"max_restarts": 1}) as it:
        await shows(it, ErrorKind.RESTART_LIMIT_REACHED, final=True)
        await apply_again(it)
        await is_cured(it)


@virtual_time
async def test_a_secret_that_others_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "keystore"
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {}, keystore=FileKeystore(folder)) as it:
        folder.chmod(0o755)
        await apply_again(it)
        await shows(it, ErrorKind.IO, final=True)
        assert f"run: chmod 700 {folder}" in (it.status.message or "")
        folder.chmod(0o700)
        await apply_again(it)
        await is_cured(it)


@virtual_time
async def test_a_bug_in_a_transport(tmp_path: Path) -> None:
    transports = {"websocket": ScriptedTransport([Crash()])}
    async with open_memory_relay() as relay, gateway(tmp_path, relay, {}, transports=transports) as it:
        await shows(it, ErrorKind.UNKNOWN, final=False)
        await is_cured(it)


def install(program: Path, text: str) -> None:
    """Write a program in one step: it may be started at any moment."""
    new = program.with_suffix(".new")
    new.write_text(f"#!{sys.executable}\n{text}\n")
    new.chmod(0o755)
    new.replace(program)


async def test_a_program_that_is_not_there_and_one_that_ends(tmp_path: Path) -> None:
    program = tmp_path / "tunnel-program"
    process = {"command": [str(program)], "connected_pattern": "up"}
    async with open_memory_relay() as relay:
        config = {"transport": "process", "relay_addr": "relay.test:22", "process": process, "restart_initial_ms": 10}
        with no_hang():
            async with gateway(tmp_path, relay, config, handler=None) as it:
                relay.listen(trio.aclose_forcefully)
                await shows(it, ErrorKind.MISSING_BINARY, final=True)
                install(program, "raise SystemExit('login failed')")
                await apply_again(it)
                await shows(it, ErrorKind.PROCESS_EXITED, final=False)
                install(program, "import time; print('up', flush=True); time.sleep(1000)")
                await is_cured(it)
