"""Reaching a gateway from a command: over its socket, or by its stores while none can start."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from gateway import KEY, Gateway
from rig import HANG

from pioneer_tunnel._control import AlreadyServedError, hold, serve_control
from pioneer_tunnel.gateway import control
from pioneer_tunnel.gateway.control import reach_gateway
from pioneer_tunnel.gateway.rpc import RemoteAccessRpc

GET = "settings/get"


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


async def test_no_gateway_can_start_while_its_stores_are_changed(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    folder = remote_access.config.runtime_path
    async with reach_gateway(remote_access, change=True) as (reached, running):
        assert not running
        with pytest.raises(AlreadyServedError), hold(folder):
            pass
        update = {"enabled": True, "key": KEY.reveal()}
        result = await reached.call("settings/update", {"update": {"remote_access": update}})
        assert result["settings"]["remote_access"]["has_key"] is True
    with hold(folder):
        assert gateway.stored().enabled
        assert await gateway.stored_key() == KEY


async def test_looking_makes_nothing_and_keeps_nobody_from_starting(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with reach_gateway(remote_access) as (reached, running):
        assert not running
        assert (await reached.call(GET))["settings"]["remote_access"]["enabled"] is False
        assert not remote_access.config.runtime_path.exists()
        with hold(remote_access.config.runtime_path):
            pass


async def test_a_gateway_that_is_starting_is_waited_for(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    folder, asked = remote_access.config.runtime_path, trio.Event()

    async def ask() -> None:
        async with reach_gateway(gateway.remote_access(), change=True) as (reached, running):
            assert running
            assert (await reached.call(GET))["settings"]["remote_access"]["enabled"] is False
        asked.set()

    with hold(folder), trio.fail_after(HANG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.1)
            assert not asked.is_set()
            await nursery.start(serve_control, folder, RemoteAccessRpc(remote_access).handle)
            await asked.wait()
            nursery.cancel_scope.cancel()


async def test_a_process_that_holds_the_folder_and_never_answers_is_an_error(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.1)
    remote_access = gateway.remote_access()
    with hold(remote_access.config.runtime_path), pytest.raises(AlreadyServedError):
        async with reach_gateway(remote_access, change=True):
            pass
