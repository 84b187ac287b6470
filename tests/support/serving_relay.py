"""A relay with a gateway that echoes, and a visitor of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from rig import (
    RelayRig,
    ask,
    echo,
    in_background,
    no_hang,
    relay_rig,
)

from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import EngineName


@asynccontextmanager
async def serving(engine: EngineName | None = None, **changes: Any) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    """A relay, and a gateway behind it that echoes."""
    async with relay_rig(engine, **changes) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            yield rig, tunnel


async def answer_to(rig: RelayRig, data: bytes) -> bytes:
    async with await rig.visit() as visitor:
        with no_hang():
            return await ask(visitor, data)
