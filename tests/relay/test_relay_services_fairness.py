"""Services of one link share it: downloads of one do not delay another, and what bounds a link bounds all of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from rig import RelayRig, ask, eventually, no_hang, read_until, relay_rig, request, tunnel_entry
from slow_line import SlowLine

from pioneer_tunnel import Services, Tunnel
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

DOWNLOADS: Final = 8
FILE: Final = bytes(64 * 1024) * 1024
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def entry(*names: str) -> dict[str, Any]:
    return tunnel_entry(url=None, services=[{"name": name, "url": f"http://{name}.test"} for name in names])


@asynccontextmanager
async def accepting(
    rig: RelayRig, handler: Callable[[TunnelStream], Awaitable[None]], **options: Any
) -> AsyncIterator[Tunnel]:
    async with rig.tunnel(**options) as tunnel, trio.open_nursery() as nursery:
        with no_hang():
            await tunnel.wait_connected()
        nursery.start_soon(accept_visitors, tunnel, handler, nursery)
        yield tunnel
        nursery.cancel_scope.cancel()


async def serve_by_service(stream: TunnelStream) -> None:
    """`files` sends much, `web` answers each request, and any other is taken and kept."""
    try:
        while await stream.receive_some():
            if stream.service == "files":
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(FILE))
                await stream.send_all(FILE)
            elif stream.service == "web":
                await stream.send_all(ANSWER)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        stream.reset()


def waiting(tunnel: Tunnel) -> int:
    """Bytes that wait in the gateway."""
    (session,) = tunnel.stats().sessions
    assert session.unsent_bytes is not None
    return session.unsent_bytes


async def download(rig: RelayRig) -> None:
    async with await rig.visit() as visitor:
        await visitor.send_all(request(host="files.test"))
        while await visitor.receive_some(64 * 1024):
            pass


async def test_downloads_of_one_service_do_not_delay_another() -> None:
    """Counted in bytes: how much the slow line carries between a request and its answer."""
    async with relay_rig(tunnels=[entry("files", "web")]) as rig, trio.open_nursery() as nursery:
        line = SlowLine(rig.addresses.control)
        await nursery.start(line.run)
        offered = dict.fromkeys(["files", "web"], "127.0.0.1:1")
        async with accepting(rig, serve_by_service, services=offered, dial=line.dial) as tunnel:
            for _ in range(DOWNLOADS):
                nursery.start_soon(download, rig)
            with no_hang():
                await eventually(lambda: waiting(tunnel) > DOWNLOADS * 128 * 1024)
                between, waited = [], waiting(tunnel)
                async with await rig.visit() as visitor:
                    for _ in range(7):
                        before = line.carried
                        await visitor.send_all(request(host="web.test"))
                        assert await read_until(visitor, b"hi") == ANSWER
                        between.append(line.carried - before)
            assert tunnel.stats().services["files"].open == DOWNLOADS
            # In the order in which it was queued, each answer would come after all that waits.
            assert sorted(between)[len(between) // 2] < waited / 3
            assert tunnel.stats().losses_total == 0
            nursery.cancel_scope.cancel()


async def test_visitors_of_all_services_count_for_one_limit() -> None:
    limits = {"streams_per_tunnel": 4, "connects_per_second_per_address": 0}
    async with relay_rig(tunnels=[entry("one", "two")], limits=limits) as rig:
        async with accepting(rig, serve_by_service, services=dict.fromkeys(["one", "two"], "127.0.0.1:1")) as tunnel:
            with no_hang():
                visitors = [await rig.visit() for _ in range(4)]
                for number, visitor in enumerate(visitors):
                    await visitor.send_all(request(host=f"{['one', 'two'][number % 2]}.test"))
                await eventually(lambda: tunnel.stats().streams.open == 4)
                async with await rig.visit() as another:
                    assert (await ask(another, request("Connection: close", host="two.test"))).startswith(
                        b"HTTP/1.1 503 "
                    )
                for visitor in visitors:
                    await visitor.aclose()
                await eventually(lambda: rig.relay.stats().streams.open == 0)
        of_tunnel = rig.relay.stats().tunnels["office"]
        assert of_tunnel.refusals_total["streams_per_tunnel"] == 1
        assert [of_tunnel.services[name].opened_total for name in ("one", "two")] == [2, 2]


async def echo(stream: TunnelStream) -> None:
    """Send back what comes, after the head of an answer that ends with the stream."""
    async with stream:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        body = b""
        while data := await stream.receive_some():
            body += data
        await stream.send_all(body.partition(b"\r\n\r\n")[2])


async def test_thirty_services_are_added_and_removed_while_all_carry_data() -> None:
    """What comes back is what was sent, to the last byte, also of a service that is removed meanwhile."""
    names = [f"s{number}" for number in range(30)]
    services = Services(dict.fromkeys(names, "127.0.0.1:1"))
    source = random.Random(17)  # data, no secret
    sent: dict[str, list[str]] = {name: [] for name in names}
    came: dict[str, list[str]] = {name: [] for name in names}
    refused = 0
    changing = True

    async def visit(name: str) -> None:
        nonlocal refused
        while changing:
            body = source.randbytes(source.randrange(1, 200_000))
            async with await rig.visit() as visitor:
                head = request(f"Content-Length: {len(body)}", host=f"{name}.test")
                try:
                    await visitor.send_all(head + body)
                    await visitor.send_eof()
                except trio.BrokenResourceError:
                    refused += 1  # it got a 503 and was closed while it still sent
                    continue
                answer = b""
                try:
                    while data := await visitor.receive_some(64 * 1024):
                        answer += data
                except trio.BrokenResourceError:
                    assert answer.startswith(b"HTTP/1.1 503 ") or not answer
                if not answer.startswith(b"HTTP/1.1 200 "):
                    refused += 1
                    await trio.sleep(0.01)
                    continue
                sent[name].append(hashlib.sha256(body).hexdigest())
                came[name].append(hashlib.sha256(answer.partition(b"\r\n\r\n")[2]).hexdigest())

    async with relay_rig(tunnels=[entry("web", *names)]) as rig, accepting(rig, echo, services=services) as tunnel:

        async def offers(wanted: set[str]) -> None:
            await eventually(lambda: {*(tunnel.status.services or ())} == wanted)

        async def one_is_refused() -> None:
            """On a busy machine, few visitors come by chance while a service is away."""
            before = refused
            await eventually(lambda: refused > before)

        with no_hang():
            async with trio.open_nursery() as visitors:
                for name in names:
                    visitors.start_soon(visit, name)
                for number in range(10):
                    name = names[source.randrange(1, 30)]
                    del services[name]
                    await offers({*names} - {name})
                    if number % 5 == 0:
                        await one_is_refused()
                    services[name] = "127.0.0.1:1"
                    await offers({*names})
                await eventually(lambda: all(came.values()))
                changing = False
        stats = tunnel.stats()
        assert tunnel.status.attempt == 1
    assert came == sent
    assert stats.losses_total == 0
    assert {*stats.services} >= {*names}
