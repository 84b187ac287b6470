"""A balancer in front of the relay names visitors by PROXY headers; nobody else can."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from relay_problems import only_problem_of, relay
from rig import (
    HOST,
    RELAY_NAME,
    RelayRig,
    ask,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
    upload,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._storage.networks import proxy_networks
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay.admission import Admission, OverLimit
from pioneer_tunnel.relay.config import RelayConfig
from pioneer_tunnel.relay.limits import RelayLimits
from pioneer_tunnel.relay.visitors.proxy_header import introduce
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

VISITOR: Final = Address("203.0.113.9", 5555)
PUBLIC: Final = Address("198.51.100.1", 443)
V1: Final = b"PROXY TCP4 203.0.113.9 198.51.100.1 5555 443\r\n"
V2: Final = ProxyHeader(VISITOR, PUBLIC).encode()
BALANCER: Final = "127.0.0.1"
STRANGER: Final = "127.0.0.2"
BALANCERS: Final = proxy_networks([BALANCER])
SHARED: Final[dict[str, Any]] = {"control_addr": "127.0.0.1:0", "ingress_addr": "127.0.0.1:0"}
BOUND: Final = {"tunnels": [tunnel_entry(bind_addr="127.0.0.1:0")]}
CA: Final = trustme.CA()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("relay")
    CA.issue_cert(HOST, RELAY_NAME).private_key_and_cert_chain_pem.write_to_path(str(folder / "relay.pem"))
    return {"tls_certificate": "relay.pem", "tls_private_key": "relay.pem", "control_tls": False, "base_dir": folder}


@asynccontextmanager
async def balanced(**changes: Any) -> AsyncIterator[tuple[RelayRig, list[TunnelStream]]]:
    """A relay behind a balancer, and the visitors that its gateway gets, which it greets."""
    came: list[TunnelStream] = []

    async def greet(stream: TunnelStream) -> None:
        async with stream:
            came.append(stream)
            await stream.send_all(await stream.receive_some())

    async with (
        relay_rig(**({"accept_proxy_from": [BALANCER]} | changes)) as rig,
        rig.tunnel() as tunnel,
    ):
        with no_hang():
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(greet, [tunnel])):
                yield rig, came


async def connect(rig: RelayRig, peer: str = BALANCER, *, bound: bool = False) -> trio.SocketStream:
    address = rig.addresses.tunnels["office"] if bound else rig.addresses.ingress
    return await trio.open_tcp_stream("127.0.0.1", address.port, local_address=peer)


async def test_a_balancer_names_the_visitor_at_the_ingress() -> None:
    async with balanced() as (rig, came):
        for header in (V1, V2):
            async with await connect(rig) as visitor:
                await visitor.send_all(header + request())
                assert (await visitor.receive_some()).startswith(b"GET / ")
                assert came.pop().proxy_header == ProxyHeader(VISITOR, PUBLIC)


async def test_a_balancer_names_the_visitor_at_a_bound_port_and_one_byte_at_a_time() -> None:
    async with balanced(**BOUND) as (rig, came):
        for header in (V1, V2):
            async with await connect(rig, bound=True) as visitor:
                for byte in header:
                    await visitor.send_all(bytes([byte]))
                await visitor.send_all(b"hello")
                assert await visitor.receive_some() == b"hello"
                assert came.pop().proxy_header == ProxyHeader(VISITOR, PUBLIC)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_balancer_names_the_visitor_before_tls(files: dict[str, Any], shared: bool) -> None:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    changes = files | (SHARED | {"control_tls": True} if shared else {})
    async with relay_rig(accept_proxy_from=[STRANGER], **changes) as rig:
        CA.cert_pem.write_to_path(str(files["base_dir"] / "ca.pem"))
        scheme = "wss" if shared else "ws"
        options: dict[str, Any] = {"relay": f"{scheme}://{RELAY_NAME}", "ca_file": files["base_dir"] / "ca.pem"}
        async with rig.tunnel(**options) as tunnel, await connect(rig, STRANGER) as visitor:
            with no_hang():
                await tunnel.wait_connected()
                await visitor.send_all(V2)
                tls = trio.SSLStream(visitor, context, server_hostname=HOST)
                await tls.send_all(request())
                async with await tunnel.accept() as stream:
                    assert stream.proxy_header == ProxyHeader(VISITOR, PUBLIC, tls=True)


async def test_tls_that_passes_through_has_the_visitor_too() -> None:
    entry = tunnel_entry(url=f"https://{HOST}", tls="passthrough")
    context = ssl.create_default_context()
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST).do_handshake()
    hello = outgoing.read()
    async with (
        relay_rig(accept_proxy_from=[STRANGER], tunnels=[entry]) as rig,
        rig.tunnel() as tunnel,
        await connect(rig, STRANGER) as visitor,
    ):
        with no_hang():
            await tunnel.wait_connected()
            await visitor.send_all(V1 + hello)
            async with await tunnel.accept() as stream:
                assert stream.proxy_header == ProxyHeader(VISITOR, PUBLIC, tls=True)
                assert await read_exactly(stream, len(hello)) == hello


async def test_the_header_says_whether_the_balancer_ended_tls() -> None:
    async with balanced() as (rig, came), await connect(rig) as visitor:
        await visitor.send_all(ProxyHeader(VISITOR, PUBLIC, tls=True).encode() + request())
        assert await visitor.receive_some()
        assert came.pop().tls is True


@pytest.mark.parametrize("header", [ProxyHeader(None).encode(), b"PROXY UNKNOWN\r\n"])
async def test_a_header_without_a_visitor_leaves_the_balancer(header: bytes) -> None:
    async with balanced() as (rig, came), await connect(rig) as visitor:
        name, port = visitor.socket.getsockname()
        await visitor.send_all(header + request())
        assert await visitor.receive_some()
        assert came.pop().visitor == Address(name, port)


@pytest.mark.parametrize("header", [b"", ProxyHeader(None).encode(), V1])
async def test_a_health_check_that_says_no_more_leaves_nothing_behind(
    header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_left_behind():
        async with balanced() as (rig, _), await connect(rig) as visitor:
            await visitor.send_all(header)
            await visitor.send_eof()
            with pytest.raises(trio.BrokenResourceError) if not header else no_hang():
                assert await read_all(visitor) == b""
    assert "PROXY" not in caplog.text


@pytest.mark.parametrize("header", [V1, V2])
async def test_at_the_ingress_a_stranger_names_nobody(header: bytes) -> None:
    async with balanced() as (rig, came), await connect(rig, STRANGER) as visitor:
        await visitor.send_all(header + request())
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 400 ")
        assert not came


@pytest.mark.parametrize("header", [V1, V2])
async def test_at_a_bound_port_the_header_of_a_stranger_is_data(header: bytes) -> None:
    async with balanced(**BOUND) as (rig, came), await connect(rig, STRANGER, bound=True) as visitor:
        await visitor.send_all(header)
        assert await visitor.receive_some() == header
        (stream,) = came
        assert stream.visitor is not None
        assert stream.visitor.host == STRANGER


async def test_at_a_port_with_tls_the_header_of_a_stranger_is_refused(files: dict[str, Any]) -> None:
    async with relay_rig(accept_proxy_from=[BALANCER], **files) as rig, await connect(rig, STRANGER) as visitor:
        with no_hang():
            await visitor.send_all(V1 + request())
            assert (await read_all(visitor))[:1] == b"\x15"  # an alert


async def test_at_an_address_for_gateways_alone_no_header_is_taken() -> None:
    async with balanced():  # its gateway has connected from the balancer's address, without a header
        pass


async def test_a_gateway_behind_a_balancer_connects_at_a_shared_address() -> None:
    async with relay_rig(accept_proxy_from=[BALANCER], **SHARED) as rig:

        async def dial(_host: str, _port: int) -> trio.SocketStream:
            stream = await rig.dial("", 0)
            await stream.send_all(V1)
            return stream

        async with rig.tunnel(dial=dial) as tunnel:
            with no_hang():
                await tunnel.wait_connected()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (request(), "signature is wrong"),
        (b"PROXY TCP4 nonsense\r\n", "two addresses"),
        (V1[:10], "ended within"),
        (V2[:14], "ended within"),
        (V2[:12] + b"\x11", "version"),
        (b"\x16\x03\x01", "signature is wrong"),
    ],
)
async def test_what_a_balancer_sends_without_a_header_is_reset(
    sent: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with balanced() as (rig, came), await connect(rig) as visitor:
        with pytest.raises(trio.BrokenResourceError):
            await ask(visitor, sent)
        assert not came
    (line,) = [record.getMessage() for record in caplog.records if "PROXY header" in record.getMessage()]
    assert line.startswith("a connection from 127.0.0.1 needs a PROXY header")
    assert why in line


async def test_a_balancer_that_sends_nothing_has_ten_seconds(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    stream, _ = trio.testing.memory_stream_pair()
    visit = Visit(stream=stream, visitor=Address(BALANCER, 1), local=None, tls=False)
    arrival = Admission(RelayLimits(), proxies=BALANCERS).arrive(BALANCER, 0, lambda: None)
    with pytest.raises(trio.BrokenResourceError):
        await introduce(visit, arrival, BALANCERS)
    assert trio.current_time() == pytest.approx(10)
    assert "none came within 10 seconds" in caplog.text


# Limits


def limited(**values: Any) -> Admission:
    return Admission(RelayLimits(**({"exempt": ()} | values)), proxies=BALANCERS)


def test_the_balancer_itself_has_no_limits_per_address() -> None:
    admission = limited(connections_per_address=1, pending_per_address=1, connects_per_second_per_address=1)
    arrivals = [admission.arrive(BALANCER, 0, lambda: pytest.fail("it was evicted")) for _ in range(20)]
    assert all(arrival.source is None for arrival in arrivals)


def test_visitors_are_counted_for_their_own_address() -> None:
    admission = limited(connections_per_address=2)
    one, two, three = (admission.arrive(BALANCER, 0, lambda: None) for _ in range(3))
    one.identify("203.0.113.9", 0)
    two.identify("203.0.113.9", 0)
    with pytest.raises(OverLimit):
        three.identify("203.0.113.9", 0)
    three.leave()
    with pytest.raises(OverLimit):  # the same visitor, past the balancer
        admission.arrive("203.0.113.9", 0, lambda: None)
    one.leave()
    admission.arrive("203.0.113.9", 0, lambda: None)


def test_the_oldest_pending_connection_of_a_visitor_makes_way() -> None:
    evicted: list[int] = []
    admission = limited(pending_per_address=2)
    arrivals = [admission.arrive(BALANCER, 0, partial(evicted.append, number)) for number in range(4)]
    arrivals[3].identify("203.0.113.1", 0)
    for arrival in arrivals[:3]:
        arrival.identify("203.0.113.9", 0)
    assert evicted == [0]


def test_one_that_was_evicted_before_it_was_identified_is_forgotten() -> None:
    admission = limited(pending=1)
    first, second = (admission.arrive(BALANCER, 0, lambda: None) for _ in range(2))
    first.identify("203.0.113.9", 0)
    for arrival in (first, second):
        arrival.leave()
    assert not admission._pending_by_source
    assert not admission._by_source


async def test_a_visitor_over_its_limit_is_reset_and_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    limits = {"connections_per_address": 1, "exempt": ()}
    async with balanced(limits=limits) as (rig, _), await connect(rig) as first:
        await first.send_all(V1 + upload())
        assert await first.receive_some()
        async with await connect(rig) as second:
            await second.send_all(V1 + request())
            with pytest.raises(trio.BrokenResourceError):
                await read_all(second)
        async with await connect(rig) as other:
            await other.send_all(V1.replace(b"203.0.113.9", b"203.0.113.10") + request())
            assert await other.receive_some()
    assert "turned away: one address has as many connections" in caplog.text


# The configuration


def test_networks_of_proxies_are_configured(tmp_path: Path) -> None:
    names = {"accept_proxy_from": ["10.0.0.5", "2001:db8::/64"], "trust_forwarded_from": ["10.0.0.6"]}
    config = RelayConfig.from_table(relay(**names))
    assert [*map(str, config.accept_proxy_from)] == ["10.0.0.5/32", "2001:db8::/64"]
    assert [*map(str, config.trust_forwarded_from)] == ["10.0.0.6/32"]
    assert RelayConfig.from_table(relay()).accept_proxy_from == ()


@pytest.mark.parametrize("key", ["accept_proxy_from", "trust_forwarded_from"])
@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "::/0"])
def test_nobody_trusts_everybody(key: str, everybody: str) -> None:
    problem = only_problem_of(relay(**{key: ["10.0.0.5", everybody]}))
    assert problem.key == f"relay.{key}[1]"
    assert "has all addresses" in problem.message
