"""Idle links: what they send, and boxes on the way that cut them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from memory_relay import MemoryRelay
from rig import KEY, RELAY_NAME, connect, no_hang, relay_rig
from trio.testing import MockClock
from yamux_rig import PipeEnd, pipe

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.dialing import Dialer
from pioneer_tunnel._wire.handshake import RelayHandshake
from pioneer_tunnel.relay.gateways import opening
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel


@asynccontextmanager
async def balancer(dial: Dialer, cuts_after: float) -> AsyncIterator[Dialer]:
    """Dials through a box that closes a connection when nothing has passed for so many seconds."""
    async with trio.open_nursery() as nursery:

        async def dial_through(host: str, port: int) -> PipeEnd:
            ours, theirs = pipe()
            nursery.start_soon(carry, theirs, await dial(host, port))
            return ours

        async def carry(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
            with trio.CancelScope(deadline=trio.current_time() + cuts_after) as idle:

                async def move(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
                    while data := await source.receive_some():
                        idle.deadline = trio.current_time() + cuts_after
                        await sink.send_all(data)
                    idle.cancel()

                async with trio.open_nursery() as directions:
                    directions.start_soon(move, one, other)
                    directions.start_soon(move, other, one)
            await trio.aclose_forcefully(one)
            await trio.aclose_forcefully(other)

        yield dial_through
        nursery.cancel_scope.cancel()


def times_lost(tunnel: Tunnel) -> int:
    return sum(status.state is State.RECONNECTING for status in tunnel.history if status.retry_at_unix is not None)


HOUR: Final = 3600


@pytest.mark.parametrize("heartbeat", [15.0, 40.0])
async def test_a_gateway_may_ask_for_a_shorter_heartbeat(autojump_clock: MockClock, heartbeat: float) -> None:
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, {"heartbeat_ms": 60_000})
        async with (
            balancer(relay.dial, 50) as dial,
            relay.tunnel("i", dial=dial, heartbeat=heartbeat) as tunnel,
        ):
            await tunnel.wait_connected()
            await trio.sleep(HOUR)
            assert times_lost(tunnel) == 0
        nursery.cancel_scope.cancel()


async def test_after_a_cut_of_an_idle_link_a_gateway_asks_for_the_default(autojump_clock: MockClock) -> None:
    """So a balancer costs one link, whatever the operators know of it."""
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, {"heartbeat_ms": 60_000})
        async with balancer(relay.dial, 50) as dial, relay.tunnel("i", dial=dial) as tunnel:
            await tunnel.wait_connected()
            await trio.sleep(HOUR)
            assert times_lost(tunnel) == 1
        nursery.cancel_scope.cancel()


async def test_the_gateway_pings_more_often_if_the_relay_cannot_be_asked(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay of an older version."""

    def without_offers(*arguments: Any, offers: object, **options: Any) -> RelayHandshake:
        return RelayHandshake(*arguments, **options)

    monkeypatch.setattr(opening, "RelayHandshake", without_offers)
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, {"heartbeat_ms": 60_000})
        async with balancer(relay.dial, 50) as dial, relay.tunnel("i", dial=dial, heartbeat=20) as tunnel:
            await tunnel.wait_connected()
            await trio.sleep(HOUR)
            assert times_lost(tunnel) == 0
        nursery.cancel_scope.cancel()


async def test_both_ends_ping_at_the_shorter_heartbeat_over_sockets() -> None:
    async with relay_rig(heartbeat_ms=60_000) as rig:

        async def dial_relay(host: str, port: int) -> trio.SocketStream:
            return await connect(rig.addresses.control)

        async with (
            balancer(dial_relay, 2.5) as dial,
            open_tunnel(f"ws://{RELAY_NAME}", key=KEY, dial=dial, heartbeat=1) as tunnel,
        ):
            with no_hang():
                await tunnel.wait_connected()
            await trio.sleep(6)
            assert times_lost(tunnel) == 0
            assert tunnel.status.state is State.CONNECTED


@pytest.mark.parametrize("heartbeat", [0.9, 60.1, 0, -1, float("nan")])
async def test_a_heartbeat_out_of_range_is_refused(heartbeat: float) -> None:
    with pytest.raises(InvalidSettingsError, match="allowed are 1 to 60"):
        async with open_tunnel("wss://relay.test", key=KEY, heartbeat=heartbeat):
            pass


async def test_a_heartbeat_is_for_websocket() -> None:
    with pytest.raises(InvalidSettingsError, match="heartbeat: only a relay of transport websocket"):
        async with open_tunnel("relay.test:1", key=KEY, transport="tls", heartbeat=15):
            pass
