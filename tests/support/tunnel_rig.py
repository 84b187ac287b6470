"""Tunnels through a real relay, for tests."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import trio
import trio.testing
from rig import (
    RelayRig,
    connect,
    no_hang,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel._model.errors import (
    TunnelError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.transports.interface import Deliver, Report, Serve, Session, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import EngineName

WRONG_KEY = RelayKey("ptk1_a-key-that-nobody-has-registered")
BOUND = [tunnel_entry(bind_addr="127.0.0.1:0")]


@asynccontextmanager
async def connected(engine: EngineName | None, **changes: object) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    async with relay_rig(engine) as rig, rig.tunnel(**changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield rig, tunnel


Come = Callable[[], Awaitable[trio.SocketStream]]


@asynccontextmanager
async def bound(engine: EngineName | None, **changes: object) -> AsyncIterator[tuple[Come, Tunnel]]:
    """A tunnel whose visitors come to a port of their own, so that every byte is theirs."""
    async with relay_rig(engine, tunnels=BOUND) as rig, rig.tunnel(**changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield functools.partial(connect, rig.addresses.tunnels["office"]), tunnel


async def pair(rig: RelayRig, tunnel: Tunnel, asked: bytes = b"") -> tuple[trio.SocketStream, TunnelStream]:
    """A visitor, and its stream at the gateway with the request read."""
    visitor, asked = await rig.visit(), asked or request()
    await visitor.send_all(asked)
    stream = await tunnel.accept()
    assert await read_exactly(stream, len(asked)) == asked
    return visitor, stream


def failing(error: TunnelError) -> Serve:
    """A transport that comes to nothing."""

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        raise error

    return serve
