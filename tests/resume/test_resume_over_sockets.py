"""Resumed sessions over real sockets, with both engines: connections are cut under bulk traffic in both directions."""

from __future__ import annotations

import functools
import math
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from cutting_proxy import CuttingProxy
from rig import (
    HOST,
    RELAY_NAME,
    RelayRig,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_rig,
    request,
    seeds,
    talk,
    tunnel_entry,
    upload,
)

from pioneer_tunnel import RelayKey, Services, State, Tunnel, TunnelStream
from pioneer_tunnel._net.tls.resumption import Resumption
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.relay.gateways import resuming
from pioneer_tunnel.websocket import ENGINES, EngineName

each_engine = pytest.mark.parametrize("engine", ENGINES)


@asynccontextmanager
async def cut_links(
    engine: EngineName | None, bytes_until_cut: Callable[[], float]
) -> AsyncIterator[tuple[RelayRig, CuttingProxy, Tunnel]]:
    async with (
        relay_rig(engine) as rig,
        cutting(rig, bytes_until_cut) as proxy,
        rig.tunnel(dial=proxy.dial) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        yield rig, proxy, tunnel


@asynccontextmanager
async def cutting(rig: RelayRig, bytes_until_cut: Callable[[], float]) -> AsyncIterator[CuttingProxy]:
    async with trio.open_nursery() as nursery:
        proxy = CuttingProxy(lambda: connect(rig.addresses.control), bytes_until_cut)
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()


@each_engine
@seeds(3, quick=1)
async def test_no_byte_is_lost_under_bulk_traffic(engine: EngineName, seed: int) -> None:
    dice = random.Random(seed)
    with no_hang(), nothing_left_behind():
        async with cut_links(engine, lambda: dice.randint(3_000, 1_500_000)) as (rig, proxy, tunnel):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(talk, rig.visit, 1_500_000, number)
            assert proxy.connections > 5
            assert tunnel.status.attempt == 1


async def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each connection after the first one resumes the session of TLS, too."""
    connections: list[TlsStream] = []
    note = Resumption.note

    def note_and_keep(self: Resumption, context: ssl.SSLContext, host: str, stream: TlsStream) -> None:
        connections.append(stream)
        note(self, context, host, stream)

    monkeypatch.setattr(Resumption, "note", note_and_keep)
    authority = trustme.CA()
    certificate = authority.issue_cert(RELAY_NAME)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "relay.pem")
    dice = random.Random(5)
    changes: dict[str, Any] = {
        "tls_certificate": tmp_path / "relay.pem",
        "tls_private_key": tmp_path / "relay.pem",
        "ingress_tls": False,
        "public_names": [RELAY_NAME],
    }
    with no_hang():
        async with (
            relay_rig(None, **changes) as rig,
            cutting(rig, lambda: dice.randint(6_000, 1_000_000)) as proxy,
            rig.tunnel(relay=f"wss://{RELAY_NAME}", ca_file=tmp_path / "ca.pem", dial=proxy.dial) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            await tunnel.wait_connected()
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(talk, rig.visit, 1_000_000, number)
            assert proxy.connections > 3
            assert tunnel.status.attempt == 1
    # The first ones may be cut before the relay has sent what a session needs.
    reused = [connection.session_reused for connection in connections]
    assert not reused[0]
    assert sum(reused) >= len(reused) - 2


async def test_a_visitor_waits_while_the_link_is_away() -> None:
    with no_hang():
        async with cut_links(None, lambda: math.inf) as (rig, proxy, tunnel):
            await talk(rig.visit, 1_000, 1)
            proxy.open = False
            proxy.cut()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk, rig.visit, 1_000, 2)
                await trio.sleep(0.2)
                proxy.open = True
            assert tunnel.status.public_url is not None


def has_lost(tunnel: Tunnel) -> bool:
    return tunnel.status.state is State.RECONNECTING


def has_dialled(proxy: CuttingProxy, times: int) -> bool:
    return proxy.connections == times


async def test_an_idle_tunnel_comes_back_at_once() -> None:
    """Without traffic nothing is sent again, and nothing but the loss itself tells both ends."""
    with no_hang():
        async with cut_links(None, lambda: math.inf) as (rig, proxy, tunnel):
            for number in range(3):
                await eventually(lambda: tunnel.status.state is State.CONNECTED)
                proxy.cut()
                await eventually(functools.partial(has_dialled, proxy, number + 2))
            await talk(rig.visit, 1_000, 1)


async def test_services_that_change_meanwhile_are_told_with_the_resume() -> None:
    """At both ends: the gateway offers another one, and the operator moves one."""
    ways = {"web": f"http://{HOST}", "wiki": "http://wiki.test", "db": "http://db.test"}

    def entry(**changes: str) -> dict[str, Any]:
        return tunnel_entry(url=None, services=[{"name": name, "url": url} for name, url in (ways | changes).items()])

    services = Services({"web": "127.0.0.1:1", "wiki": "127.0.0.1:2"})
    with no_hang():
        async with (
            relay_rig(tunnels=[entry()]) as rig,
            cutting(rig, lambda: math.inf) as proxy,
            rig.tunnel(dial=proxy.dial, services=services) as tunnel,
        ):
            await tunnel.wait_connected()
            assert tunnel.status.services == {"web": ways["web"], "wiki": ways["wiki"]}
            proxy.open = False
            proxy.cut()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            services["db"] = "127.0.0.1:3"
            await rig.apply(tunnels=[entry(wiki="http://moved.test")])
            proxy.open = True
            wanted = ways | {"wiki": "http://moved.test"}
            await eventually(lambda: tunnel.status.services == wanted)
            assert (tunnel.status.state, tunnel.status.attempt) == (State.CONNECTED, 1)
            async with await rig.visit() as visitor:
                await visitor.send_all(request(host="db.test"))
                async with await tunnel.accept() as stream:
                    assert stream.service == "db"


async def test_a_visitor_who_has_waited_gets_the_services_of_now() -> None:
    ways = [{"name": "web", "url": f"http://{HOST}"}, {"name": "wiki", "url": "http://wiki.test"}]
    services = Services({"web": "127.0.0.1:1"})
    with no_hang():
        async with (
            relay_rig(tunnels=[tunnel_entry(url=None, services=ways)]) as rig,
            cutting(rig, lambda: math.inf) as proxy,
            rig.tunnel(dial=proxy.dial, services=services) as tunnel,
            AsyncExitStack() as visitors,
        ):
            await tunnel.wait_connected()
            proxy.open = False
            proxy.cut()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            waiting = []
            for host in (HOST, "wiki.test"):
                waiting.append(await visitors.enter_async_context(await rig.visit()))
                await waiting[-1].send_all(request(host=host))
            await eventually(lambda: rig.relay._ingress.opening == 2)
            del services["web"]
            services["wiki"] = "127.0.0.1:2"
            proxy.open = True
            async with await tunnel.accept() as stream:
                assert stream.service == "wiki"
            assert b"does not serve this service" in await read_all(waiting[0])


# Limits of a relay


async def test_a_visitor_who_waits_for_a_gateway_counts_once() -> None:
    limits = {"connects_per_second_per_address": 0, "opens_per_second_per_tunnel": 1}  # 4 at once
    with no_hang():
        async with (
            relay_rig(None, limits=limits) as rig,
            cutting(rig, lambda: math.inf) as proxy,
            rig.tunnel(dial=proxy.dial) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            await tunnel.wait_connected()
            proxy.open = False
            proxy.cut()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(talk, rig.visit, 1_000, number)
                await eventually(lambda: rig.relay._ingress.opening == 3)
                proxy.open = True


OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789")


async def test_too_many_suspended_sessions_end_the_one_that_waits_longest() -> None:
    other = tunnel_entry(id="other", url="http://other.test", key=str(OTHER_KEY.identity().public_key))
    changes: dict[str, Any] = {
        "tunnels": [tunnel_entry(), other],
        "limits": {"connects_per_second_per_address": 0, "suspended_sessions": 1},
    }
    with no_hang():
        async with (
            relay_rig(None, **changes) as rig,
            cutting(rig, lambda: math.inf) as first,
            cutting(rig, lambda: math.inf) as second,
            rig.tunnel(dial=first.dial, resume_timeout=30) as one,
            rig.tunnel(dial=second.dial, key=OTHER_KEY) as two,
        ):
            await one.wait_connected()
            await two.wait_connected()
            visitors, streams = [], []
            for host, tunnel in ((HOST, one), ("other.test", two)):
                visitors.append(await rig.visit())
                await visitors[-1].send_all(upload(host))
                streams.append(await tunnel.accept())
                await read_exactly(streams[-1], len(upload(host)))
            for proxy, tunnel in ((first, one), (second, two)):
                proxy.open = False
                proxy.cut()
                await eventually(functools.partial(has_lost, tunnel))
            await read_all(visitors[0])  # the answer that the gateway broke off
            second.open = True
            await visitors[1].send_all(b"again")
            assert await read_exactly(streams[1], 5) == b"again"
            for stream in (*visitors, *streams):
                await trio.aclose_forcefully(stream)


async def test_a_suspended_session_that_holds_too_much_ends() -> None:
    limits = {"connects_per_second_per_address": 0, "suspended_bytes": 1024 * 1024}
    with no_hang():
        async with (
            relay_rig(None, limits=limits) as rig,
            cutting(rig, lambda: math.inf) as proxy,
            rig.tunnel(dial=proxy.dial) as tunnel,
        ):
            await tunnel.wait_connected()
            async with AsyncExitStack() as open_visitors, trio.open_nursery() as nursery:
                visitors = [await open_visitors.enter_async_context(await rig.visit()) for _ in range(8)]
                for visitor in visitors:  # they take nothing of what the gateway answers
                    await visitor.send_all(upload())
                    nursery.start_soon(send_for_ever, await tunnel.accept())
                [session] = rig.relay._gateways._sessions
                before = -1
                while not before == session.held > 1024 * 1024:  # until visitors' sockets are full, and it stays so
                    before = session.held
                    await trio.sleep(0.1)
                proxy.open = False
                proxy.cut()
                for visitor in visitors:
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(visitor)
                assert tunnel.status.state is State.RECONNECTING
                nursery.cancel_scope.cancel()


async def test_a_session_ends_that_holds_too_much_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is suspended it holds nothing, but its visitors go on sending."""
    monkeypatch.setattr(resuming, "LOOK_INTERVAL", 0.05)
    limits = {"connects_per_second_per_address": 0, "suspended_bytes": 1024 * 1024}
    with no_hang():
        async with (
            relay_rig(None, limits=limits) as rig,
            cutting(rig, lambda: math.inf) as proxy,
            rig.tunnel(dial=proxy.dial) as tunnel,
        ):
            await tunnel.wait_connected()
            async with AsyncExitStack() as open_visitors:
                visitors = [await open_visitors.enter_async_context(await rig.visit()) for _ in range(8)]
                for visitor in visitors:
                    await visitor.send_all(upload())
                    await read_exactly(await tunnel.accept(), len(upload()))
                proxy.open = False
                proxy.cut()
                await eventually(lambda: tunnel.status.state is State.RECONNECTING)
                with trio.fail_after(20):  # long before the session ends anyway
                    async with trio.open_nursery() as nursery:
                        for visitor in visitors:
                            nursery.start_soon(send_until_reset, visitor)
            assert tunnel.status.state is State.RECONNECTING


async def send_until_reset(stream: trio.abc.Stream) -> None:
    with suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(bytes(64 * 1024))


async def send_for_ever(stream: TunnelStream) -> None:
    async with stream:
        while True:
            await stream.send_all(bytes(256 * 1024))
