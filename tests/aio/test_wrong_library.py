"""An API that is called under the wrong library names the right one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from aio_rig import URL, hello, remote_access
from gateway import Gateway
from rig import KEY, RelayRig, relay_config

import pioneer_tunnel
from pioneer_tunnel import SettingsUpdate, asgi
from pioneer_tunnel.aio import open_tunnel
from pioneer_tunnel.relay import Relay


def test_a_trio_api_under_asyncio_names_the_right_module(tmp_path: Path) -> None:
    async def use(api: Callable[[], Awaitable[Any]]) -> None:
        await api()

    gateway = Gateway(tmp_path).remote_access(wall_clock=time.time)

    async def open_trio() -> None:
        async with pioneer_tunnel.open_tunnel(URL, key=KEY):
            pass

    async def serve_trio() -> None:
        await asgi.serve(hello, None)  # type: ignore[arg-type]

    async def handler_trio() -> None:
        async with asgi.open_handler(hello):
            pass

    async def watch_trio() -> None:
        await anext(gateway.watch())

    for api, instead in (
        (open_trio, "pioneer_tunnel.aio.open_tunnel"),
        (serve_trio, "pioneer_tunnel.aio.serve"),
        (handler_trio, "pioneer_tunnel.aio.serve"),
        (watch_trio, "pioneer_tunnel.aio"),
        (gateway.run, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.settled, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.settings, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.snapshot, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.has_key, "pioneer_tunnel.aio.RemoteAccess"),
        (partial(gateway.apply, SettingsUpdate(enabled=True)), "pioneer_tunnel.aio.RemoteAccess"),
        (partial(gateway.configure, gateway.config), "pioneer_tunnel.aio.RemoteAccess"),
        (Relay(relay_config()).serve, "a process of its own: pioneer-tunnel relay"),
        (partial(pioneer_tunnel.forward, None, "127.0.0.1:1"), "pioneer_tunnel.aio.open_tunnel"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RuntimeError, match=f"needs Trio, and asyncio is running; under asyncio use {instead}"):
            asyncio.run(use(api))


def test_the_asyncio_face_elsewhere_names_the_right_module(relay_in_thread: RelayRig, tmp_path: Path) -> None:
    async def enter() -> None:
        async with open_tunnel(URL, key=KEY):
            pass

    async def enter_remote() -> None:
        async with remote_access(relay_in_thread, tmp_path):
            pass

    for api, instead in ((enter, "pioneer_tunnel.open_tunnel"), (enter_remote, "pioneer_tunnel.RemoteAccess")):
        with pytest.raises(RuntimeError, match=f"needs asyncio, and Trio is running; under Trio use {instead}"):
            trio.run(api)
        coroutine = api()
        with pytest.raises(RuntimeError, match=r"no event loop is running; without one use pioneer_tunnel\.blocking"):
            coroutine.send(None)
