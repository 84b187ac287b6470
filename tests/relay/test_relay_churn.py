"""Hundreds of visitors of each kind come and go, over a link that is cut; then the relay counts nobody any more."""

from __future__ import annotations

import functools
import gc
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import pytest
import trio
from cutting_proxy import CuttingProxy
from rig import (
    RelayRig,
    connect,
    eventually,
    no_hang,
    read_all,
    read_exactly,
    relay_rig,
    request,
    seeds,
    tunnel_entry,
)

from pioneer_tunnel import Address, TunnelStream
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.tunnel.accepting import forward_visitors

ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
LIMITS: Final = {
    "connects_per_second_per_address": 0,
    "exempt": [],
    "connections": 64,
    "pending": 12,
    "streams_per_tunnel": 40,
    "suspended_sessions": 4,
}


async def answer(chance: random.Random, stream: TunnelStream) -> None:
    """A server that answers, or not, or breaks off."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            received = b""
            async for data in stream:
                received += data
                while b"\r\n\r\n" in received:
                    _, _, received = received.partition(b"\r\n\r\n")
                    match chance.randrange(8):
                        case 0:
                            await stream.send_all(ANSWER[: chance.randrange(len(ANSWER))])
                            stream.reset()
                            return
                        case 1:
                            await stream.send_all(ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                            return
                        case 2:
                            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(300_000))
                            return
                        case _:
                            await stream.send_all(ANSWER)


async def visit(chance: random.Random, dial: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """A visitor that does one of all things, and leaves in one of all ways."""
    heads = [
        request(),
        request(f"Content-Length: {chance.randrange(4)}") + b"ab",
        request(host="nobody.test"),
        request(f"Content-Length: {10**6}") + bytes(100_000),
        request("Connection: close"),
        b"GET  / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        request() + request() + request(host="another.test"),
    ]
    with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
        stream = await dial()
        try:
            for _ in range(chance.randrange(4)):
                said = chance.choice(heads)
                await stream.send_all(said[: chance.randrange(len(said))] if not chance.randrange(4) else said)
                with trio.move_on_after(chance.choice([0, 0.001, 0.01, 0.05])):
                    await stream.receive_some(chance.choice([1, 100, 100_000]))
            if chance.randrange(2):
                await stream.send_eof()
                with trio.move_on_after(0.05):
                    await stream.receive_some()
        finally:
            await (abandon(stream) if chance.randrange(2) else stream.aclose())


async def come_and_go(rig: RelayRig, chance: random.Random, proxy: CuttingProxy) -> None:
    """Many visitors, a few dozen at once, at each address; meanwhile the link is cut."""
    ways: list[Callable[[], Awaitable[trio.SocketStream]]] = [
        rig.visit,
        functools.partial(connect, rig.addresses.tunnels["office"]),
    ]
    turns = trio.CapacityLimiter(80)

    async def visit_in_turn() -> None:
        async with turns:
            await visit(chance, chance.choice(ways))

    async def cut() -> None:
        while True:
            await trio.sleep(0.05)
            proxy.open = bool(chance.randrange(4))
            proxy.cut()

    async with trio.open_nursery() as cutting:
        cutting.start_soon(cut)
        async with trio.open_nursery() as visitors:
            for _ in range(600):
                visitors.start_soon(visit_in_turn)
        cutting.cancel_scope.cancel()


async def connect_anyhow(rig: RelayRig) -> trio.SocketStream:
    """A full relay resets connections, perhaps before the system has told of them."""
    while True:
        try:
            return await connect(rig.addresses.control)
        except OSError:
            await trio.sleep(0.01)


def counts_of(rig: RelayRig) -> dict[str, object]:
    """Everything by which a relay knows a visitor."""
    relay = rig.relay
    admission, ingress, carrier = relay._admission, relay._ingress, relay._carrier
    return {
        "connections": admission.connections,
        "pending": admission.pending,
        "by source": sum(admission._by_source.values()),
        "visits": sum(admission._visits.values()),
        "visitors": admission._visitors,
        "followed": len(ingress._passages._followed),
        "opening": ingress.opening,
        "carried": len(carrier._carried),
        "owned": len(carrier._owned),
    }


GATEWAY: Final = {"connections": 1, "by source": 1}


@pytest.mark.parametrize("ingress", ["127.0.0.1:0", "localhost:0"], ids=["shared", "apart"])
@seeds(2, quick=1)
async def test_nobody_is_left(seed: int, ingress: str) -> None:
    chance = random.Random(seed)
    with no_hang():
        async with (
            relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")], limits=LIMITS, ingress_addr=ingress) as rig,
            trio.open_nursery() as proxies,
        ):
            proxy = CuttingProxy(
                functools.partial(connect_anyhow, rig), lambda: chance.choice([math.inf, 400_000, 3_000])
            )
            await proxies.start(proxy.run)
            async with rig.tunnel(dial=proxy.dial) as tunnel, trio.open_nursery() as serving:
                serving.start_soon(trio.serve_listeners, functools.partial(answer, chance), [tunnel])
                await tunnel.wait_connected()
                await come_and_go(rig, chance, proxy)
                proxy.open = True
                await eventually(lambda: {name: count for name, count in counts_of(rig).items() if count} == GATEWAY)
                serving.cancel_scope.cancel()
            await eventually(lambda: not any(counts_of(rig).values()))
            proxies.cancel_scope.cancel()


def garbage() -> list[str]:
    """The objects of this library that only the garbage collector frees, by their classes."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [type(found).__qualname__ for found in gc.garbage if type(found).__module__.startswith("pioneer_tunnel")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


async def answer_once(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(ANSWER)
    await read_all(stream)


@pytest.mark.parametrize("bound", [False, True], ids=["followed", "bound"])
async def test_a_visitor_that_has_left_is_no_work_for_the_garbage_collector(bound: bool) -> None:
    """Each collection looks at all that lives. So reference cycles of those who have left cost the others time."""
    with no_hang():
        async with (
            relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0" if bound else None)]) as rig,
            rig.tunnel() as tunnel,
            trio.open_nursery() as serving,
        ):
            (server,) = await serving.start(functools.partial(trio.serve_tcp, answer_once, 0, host="127.0.0.1"))
            local = Address(*server.socket.getsockname())
            serving.start_soon(
                functools.partial(forward_visitors, tunnel, local, serving, proxy_protocol=None, certificate=None)
            )
            await tunnel.wait_connected()
            gc.collect()
            gc.disable()
            try:
                for _ in range(3):
                    address = rig.addresses.tunnels["office"] if bound else rig.addresses.ingress
                    async with await connect(address) as visitor:
                        await visitor.send_all(request())
                        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
                await eventually(lambda: rig.relay._admission.connections == 1)  # the gateway's
                await eventually(lambda: not tunnel.stats().sessions[0].streams_open)
                assert garbage() == []
            finally:
                gc.enable()
            serving.cancel_scope.cancel()
