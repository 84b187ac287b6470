"""A tunnel that can resume, over a relay in memory, and visitors who talk with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from rig import echo, in_background

from pioneer_tunnel import Tunnel, open_tunnel
from pioneer_tunnel.testing import FaultPlan, MemoryRelay, MemoryStream, open_memory_relay

TIMEOUT: Final = 60.0
PATTERN: Final = bytes(range(251)) * 5


@asynccontextmanager
async def resumable(
    plan: FaultPlan | None = None,
    *,
    timeout: float = TIMEOUT,
    engine: Any = None,
    heartbeat: float = 15.0,
    told: bool = False,
    **options: Any,
) -> AsyncIterator[tuple[MemoryRelay, Tunnel]]:
    """A relay and a tunnel that can resume; the gateway sends back what visitors send.

    Args:
        told: whether the gateway's system tells it of changes of its network.
        options: of `open_tunnel`.
    """
    async with open_memory_relay(plan, resume_timeout=timeout, engine=engine, heartbeat=heartbeat) as relay:
        if told:
            options["watch_network"] = relay.watch_network
        async with (
            open_tunnel(relay.url, key=relay.key, dial=relay.dial, websocket_engine=engine, **options) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            await tunnel.wait_connected()
            yield relay, tunnel


async def talk(visitor: MemoryStream, amount: int, pause: float = 0.0) -> None:
    """Send so many bytes, and check that the same bytes come back, and then EOF."""
    pieces = [PATTERN[number % 251 :][:1000] for number in range(amount // 1000)]

    async def send() -> None:
        for piece in pieces:
            await visitor.send_all(piece)
            await trio.sleep(pause)
        await visitor.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = b"".join([data async for data in visitor])
    assert received == b"".join(pieces)


async def seconds_until_dialled(relay: MemoryRelay) -> float:
    dials, started = len(relay.dials), trio.current_time()
    while len(relay.dials) == dials:
        await trio.sleep(0.1)
    return relay.dials[dials].at - started
