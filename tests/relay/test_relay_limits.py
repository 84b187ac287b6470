"""The limits of a relay: the counting by itself, and in a real relay."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, Final, final

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hostile import PING, TEXT, GatewayOfBytes, frame
from hypothesis import given, settings, strategies as st
from raw_gateways import accept
from rig import (
    KEY,
    RELAY_NAME,
    RelayRig,
    ask,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    open_sockets,
    read_all,
    read_exactly,
    read_until,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
    upload,
)

from pioneer_tunnel._model import keys as identity
from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.exception_groups import leaves
from pioneer_tunnel._model.keys import PublicKey, RelayKey
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.descriptor_limit import descriptor_limit
from pioneer_tunnel._net.log_limiter import LINES_IN_FULL
from pioneer_tunnel._storage.networks import proxy_networks
from pioneer_tunnel._wire.handshake import AGENT, SUBPROTOCOL, Claim, GatewayHandshake, Rejection, RelayHandshake
from pioneer_tunnel.relay import RelayConfig, RelayLimits, TunnelEntry, accept_loop as accepting, rates
from pioneer_tunnel.relay.accept_loop import AcceptLoop
from pioneer_tunnel.relay.admission import MOST_LEAVING, Admission, Arrival, OverLimit
from pioneer_tunnel.relay.connection import Connection
from pioneer_tunnel.relay.gateways.endpoint import GatewayEndpoint
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.listeners import open_listeners
from pioneer_tunnel.relay.rates import FailureBackoff, TokenBuckets
from pioneer_tunnel.testing import open_memory_relay
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import ENGINES, EngineName, Opening, load_engine

WRONG_KEY: Final = RelayKey("ptk1_a-key-that-no-relay-knows-0123456789")


# The table


def limits(**values: Any) -> RelayLimits:
    """Limits without exemptions."""
    return RelayLimits(**({"exempt": ()} | values))


def test_limits_stand_in_a_table_of_the_relays_file() -> None:
    table = {
        "control_addr": "127.0.0.1:0",
        "ingress_addr": "127.0.0.1:0",
        "id": "relay",
        "public_names": ["relay.test"],
        "limits": {"connections_per_address": 0, "exempt": ["10.0.0.1", "2001:db8::/32"]},
    }
    config = RelayConfig.from_table(table)
    assert config.limits.connections_per_address == 0
    assert list(map(str, config.limits.exempt)) == ["10.0.0.1/32", "2001:db8::/32"]
    assert RelayConfig.from_table({key: table[key] for key in table if key != "limits"}).limits == RelayLimits()


def test_everything_that_is_wrong_with_them_is_told_at_once() -> None:
    wrong: dict[str, Any] = {
        "connections": 3,
        "pending": True,
        "streams_per_tunel": 5,
        "failed_auth_delay_ms": 300,
        "failed_auth_delay_max_ms": 200,
        "exempt": ["10.0.0.1/8", 7],
    }
    with pytest.raises(InvalidSettingsError) as refused:
        relay_config(limits=wrong)
    assert {problem.key for problem in refused.value.problems} == {
        "limits.connections",
        "limits.pending",
        "limits.streams_per_tunel",
        "limits.failed_auth_delay_max_ms",
        "limits.exempt[0]",
        "limits.exempt[1]",
    }
    with pytest.raises(InvalidSettingsError, match="array"):
        RelayLimits(exempt="10.0.0.1")


# How often


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=200),
)
def test_a_bucket_gives_no_more_than_its_rate_and_a_burst(rate: int, takes: list[tuple[str, float]]) -> None:
    buckets, now, taken = TokenBuckets(rate), 0.0, {"a": 0, "b": 0}
    for key, later in takes:
        now += later
        taken[key] += buckets.take(key, now)
    assert max(taken.values()) <= rate * (now + rates.BURST_SECONDS) + 1e-6


def test_a_bucket_fills_again_and_none_is_no_limit() -> None:
    buckets = TokenBuckets(2, remembered=2)
    assert [buckets.take("a", 0) for _ in range(9)] == [True] * 8 + [False]
    assert buckets.take("b", 0)
    assert [buckets.take("a", 1) for _ in range(3)] == [True, True, False]
    assert all(TokenBuckets(0).take("a", 0) for _ in range(1000))


def test_each_failure_waits_twice_as_long_up_to_a_bound_and_is_forgotten() -> None:
    failures = FailureBackoff(0.25, 5)
    assert [failures.failed("a", 0) for _ in range(7)] == [0.25, 0.5, 1, 2, 4, 5, 5]
    assert failures.failed("b", 0) == 0.25
    assert [failures.failed("a", 0) for _ in range(2000)][-1] == 5
    assert failures.failed("a", rates.FORGET_AFTER) == 0.25
    assert FailureBackoff(0, 5).failed("a", 0) == 0


def test_only_so_many_keys_are_remembered() -> None:
    failures, buckets = FailureBackoff(1, 8, remembered=3), TokenBuckets(0.25, remembered=3)
    for key in range(100):
        failures.failed(key, 0)
        buckets.take(key, 0)
    assert [failures.failed(key, 0) for key in (99, 98, 97, 96)] == [2, 2, 2, 1]
    assert [buckets.take(key, 0) for key in (99, 98, 97, 96)] == [False, False, False, True]


# How many


def never() -> None:
    raise AssertionError("nobody has to make way")


def test_connections_are_counted_in_all_and_for_each_address() -> None:
    admission = Admission(limits(connections=16, connections_per_address=3))
    first = [admission.arrive("192.0.2.1", 0, never) for _ in range(3)]
    for arrival in first:
        arrival.settle()
    with pytest.raises(OverLimit, match="one address"):
        admission.arrive("192.0.2.1", 0, never)
    with pytest.raises(OverLimit, match="one address"):
        admission.arrive("::ffff:192.0.2.1", 0, never)
    first.pop().leave()
    admission.arrive("192.0.2.1", 0, never).settle()
    for number in range(13):
        admission.arrive(f"198.51.100.{number}", 0, never).settle()
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive("203.0.113.1", 0, never)


def test_64_bits_of_an_ipv6_address_are_an_address() -> None:
    admission = Admission(limits(connections_per_address=2))
    admission.arrive("2001:db8::1", 0, never)
    admission.arrive("2001:db8::2:0:0:1", 0, never)
    with pytest.raises(OverLimit):
        admission.arrive("2001:db8::3", 0, never)
    admission.arrive("2001:db8:0:1::1", 0, never)
    admission.arrive("fe80::1%eth0", 0, never)


def test_who_is_exempt_is_counted_in_all_only() -> None:
    few = RelayLimits(connections=20, connections_per_address=1, pending_per_address=1)
    admission = Admission(few)
    for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", None):
        for _ in range(5):
            arrival = admission.arrive(host, 0, never)
            assert arrival.failed(0) == 0
            arrival.settle()
    with pytest.raises(OverLimit):
        admission.arrive("127.0.0.1", 0, never)


def test_descriptors_bound_connections_whatever_the_limits_say() -> None:
    assert Admission(limits(connections=5000), descriptors=1024).most_connections == 960
    assert Admission(limits(connections=500), descriptors=1024).most_connections == 500
    assert Admission(limits(), descriptors=10).most_connections == 1
    assert Admission(limits(), descriptors=None).most_connections == 8192


def test_who_pends_never_takes_all_there_is() -> None:
    evicted: list[int] = []
    admission = Admission(limits(), descriptors=64 + 20)
    for number in range(12):
        admission.arrive(None, 0, partial(evicted.append, number))
    assert evicted == [0, 1]


def test_the_oldest_that_pends_makes_way() -> None:
    evicted: list[str] = []
    admission = Admission(limits(pending=3, pending_per_address=2))

    def arrive(host: str, name: str) -> Arrival:
        return admission.arrive(host, 0, partial(evicted.append, name))

    arrive("192.0.2.1", "settled").settle()
    for name in ("first", "second"):
        arrive(f"198.51.100.{len(name)}", name)
    arrive("192.0.2.1", "third")
    assert evicted == []
    arrive("192.0.2.1", "fourth")
    assert evicted == ["first"]
    arrive("192.0.2.1", "fifth")
    assert evicted == ["first", "third"], "the oldest of that address, and nobody else"


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "identify", "settle", "settle as a visitor", "leave"]), st.integers(0, 30)
        ),
        max_size=120,
    )
)
def test_the_books_balance(steps: list[tuple[str, int]]) -> None:
    few = limits(connections=16, connections_per_address=9, pending=5, pending_per_address=4)
    balancer = "10.0.0.1"
    admission = Admission(few, proxies=proxy_networks([balancer]))
    present: dict[int, Arrival] = {}
    pending: dict[int, str] = {}
    for number, (step, choice) in enumerate(steps):
        if step == "arrive":
            host = f"192.0.2.{choice % 3}" if choice % 4 else balancer
            with suppress(OverLimit):
                present[number] = admission.arrive(host, number, partial(pending.pop, number))
                pending[number] = host
        elif present:
            key = list(present)[choice % len(present)]
            if step == "identify":
                if present[key].source is not None:
                    continue
                try:
                    present[key].identify(f"192.0.2.{choice % 3}", number)
                except OverLimit:
                    present.pop(key).leave()
                    pending.pop(key, None)
                else:
                    pending |= {key: f"192.0.2.{choice % 3}"} if key in pending else {}
                    continue
            elif step == "settle":
                present[key].settle()
            elif step == "settle as a visitor":
                with suppress(OverLimit):
                    present[key].settle_as_visitor()
                assert admission._visitors <= 14
                if not present[key].is_visitor:
                    continue
            else:
                present.pop(key).leave()
            pending.pop(key, None)
        hosts = list(pending.values())
        assert len(present) <= 16 + MOST_LEAVING
        assert len(hosts) <= 5
        assert all(hosts.count(host) <= 4 for host in hosts if host != balancer)
    for arrival in present.values():
        arrival.leave()
    kept = (
        admission._connections,
        admission._visitors,
        admission._by_source,
        admission._pending,
        admission._pending_by_source,
    )
    assert not any(kept), "nothing is kept of those who have left"


def test_visitors_leave_room_for_gateways() -> None:
    admission = Admission(limits(connections=32))
    visitors = []
    for _ in range(28):
        visitors.append(admission.arrive(None, 0, never, only_visitors=True))
        visitors[-1].settle_as_visitor()
        visitors[-1].settle_as_visitor()  # for a later request of the same connection
    with pytest.raises(OverLimit, match="as many visitors"):
        admission.arrive(None, 0, never, only_visitors=True)
    gateways = [admission.arrive(None, 0, never) for _ in range(4)]
    with pytest.raises(OverLimit, match="as many visitors"):
        gateways[0].settle_as_visitor()
    for gateway in gateways:
        gateway.settle()
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive(None, 0, never)
    visitors[0].leave()
    admission.arrive(None, 0, never, only_visitors=True).settle_as_visitor()


def test_when_all_is_full_the_oldest_that_pends_makes_way() -> None:
    evicted: list[str] = []
    admission = Admission(limits(connections=16, reserved_for_gateways=0))
    for _ in range(14):
        admission.arrive(None, 0, never).settle_as_visitor()
    for name in ("first", "second", "third"):
        admission.arrive(None, 0, partial(evicted.append, name))
    assert evicted == ["first"]
    for _ in range(MOST_LEAVING - 1):
        admission.arrive(None, 0, partial(evicted.append, "more"))
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive(None, 0, never)


def test_shares_of_the_connections_are_bounded_and_have_defaults() -> None:
    def most(**values: int) -> tuple[int, int]:
        admission = Admission(limits(**values), descriptors=1024 + 64)
        return admission._most_visitors, admission._most_visits

    assert most() == (896, 192), "shares of what the process may have"
    assert most(connections=160) == (140, 30)
    assert most(connections=160, reserved_for_gateways=100, streams_per_tunnel=0) == (80, 0)
    assert most(reserved_for_gateways=0, streams_per_tunnel=4096) == (1024, 4096)


def test_visitors_of_a_tunnel_are_counted() -> None:
    admission = Admission(limits(streams_per_tunnel=2, opens_per_second_per_tunnel=1))
    for _ in range(2):
        admission.begin_visit("office", 0)
    with pytest.raises(OverLimit, match="as many visitors"):
        admission.begin_visit("office", 0)
    admission.begin_visit("home", 0)
    for tunnel in ("home", "office", "office"):
        admission.end_visit(tunnel)
    for _ in range(2):
        admission.begin_visit("office", 0)
        admission.end_visit("office")
    with pytest.raises(OverLimit, match="new visitors"):
        admission.begin_visit("office", 0)
    assert not admission._visits


# In a real relay


@asynccontextmanager
async def limited(**values: Any) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    """A relay with these limits, and a gateway behind it that echoes, which counts as one connection."""
    async with relay_rig(limits=limits(**values)) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            yield rig, tunnel


async def visitor_is_served(rig: RelayRig) -> None:
    with no_hang():
        async with await rig.visit() as visitor:
            assert await ask(visitor, request()) == request()


async def is_served(rig: RelayRig) -> bool:
    """Whether a visitor is served now. The relay may have to notice first that another one has left."""
    try:
        async with await rig.visit() as visitor:
            return await ask(visitor, request()) == request()
    except (OSError, trio.BrokenResourceError):
        return False


async def is_reset(stream: trio.SocketStream) -> None:
    with no_hang(), pytest.raises(trio.BrokenResourceError):
        await read_all(stream)


async def is_turned_away(address: Address) -> None:
    """It may be reset before it knows that it is connected."""
    with suppress(OSError):
        async with await connect(address) as visitor:
            await is_reset(visitor)


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nHost: off"])
async def test_visitors_get_through_while_others_never_come_to_the_point(begin: bytes) -> None:
    """Slowloris at both listeners: there are never more than may pend, and the oldest are evicted."""
    with nothing_left_behind():
        async with limited(pending=20, pending_per_address=0, connects_per_second_per_address=0) as (rig, _):
            before = len(open_sockets())
            with ExitStack() as stack:
                for number in range(300):
                    address = rig.addresses.ingress if number % 2 else rig.addresses.control
                    slow = await connect(address)
                    stack.callback(slow.socket.close)
                    if begin:
                        await slow.send_all(begin)
                    if number == 0:
                        first = slow
                    if not number % 50:
                        await visitor_is_served(rig)
                await is_reset(first)
                await eventually(lambda: len(open_sockets()) <= before + 300 + 20)
                await visitor_is_served(rig)


OPENING: Final = request(
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
    host=RELAY_NAME,
)


async def test_a_gateway_that_was_challenged_pends_until_it_has_proved_itself() -> None:
    async with limited(pending=3, pending_per_address=0) as (rig, tunnel):
        challenged = []
        for _ in range(6):
            challenged.append(await connect(rig.addresses.control))
            await challenged[-1].send_all(OPENING)
            received = b""
            while b"challenge" not in received:
                received += await challenged[-1].receive_some()
        for gateway in challenged[:3]:
            await is_reset(gateway)
        await visitor_is_served(rig)
        assert tunnel.status.state is State.CONNECTED
        for gateway in challenged:
            await gateway.aclose()


async def test_a_stranger_makes_the_relay_hold_little(engine: EngineName) -> None:
    """A message may have 1 MiB, but only after the gateway's proof."""
    async with relay_rig(engine) as rig, await connect(rig.addresses.control) as stranger:
        await stranger.send_all(OPENING)
        await stranger.send_all(b"\x82\xff" + (1024 * 1024).to_bytes(8, "big") + bytes(4))  # its length and its mask

        async def go_on() -> None:
            await stranger.send_all(bytes(512 * 1024))
            await read_all(stranger)

        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await go_on()


async def test_an_address_has_so_many_connections_and_no_more() -> None:
    async with limited(connections_per_address=4) as (rig, tunnel):  # one of them is the gateway's
        visitors = []
        for _ in range(3):
            visitors.append(await rig.visit())
            await visitors[-1].send_all(request())
            await read_exactly(visitors[-1], len(request()))
        await is_turned_away(rig.addresses.ingress)
        await visitors.pop().aclose()
        await eventually(partial(is_served, rig))
        for visitor in visitors:
            await visitor.aclose()
        assert tunnel.status.state is State.CONNECTED


@pytest.mark.parametrize("listeners", ["two listeners", "one listener"])
async def test_at_a_full_limit_a_gateway_comes_back(listeners: str) -> None:
    other = RelayKey("ptk1_the-key-of-another-tunnel-012345")
    tunnels = [tunnel_entry(), tunnel_entry(id="home", url="http://home.test", key=str(other.identity().public_key))]
    one_address: dict[str, Any] = (
        {} if listeners == "two listeners" else {"control_addr": "localhost:0", "ingress_addr": "localhost:0"}
    )
    full = limits(connections=16, connects_per_second_per_address=0, streams_per_tunnel=0)
    async with relay_rig(tunnels=tunnels, limits=full, **one_address) as rig, rig.tunnel() as office:
        with no_hang():
            await office.wait_connected()
            async with in_background(lambda: trio.serve_listeners(echo, [office])), trio.open_nursery() as nursery:
                visitors = []
                for _ in range(14):
                    visitors.append(await rig.visit())
                    await visitors[-1].send_all(upload())
                    await read_exactly(visitors[-1], len(upload()))
                if listeners == "two listeners":
                    await is_turned_away(rig.addresses.ingress)
                else:
                    async with await rig.visit() as visitor:
                        assert (await ask(visitor, request())).startswith(b"HTTP/1.1 503 ")
                for _ in range(3):
                    async with rig.tunnel(key=other) as home:
                        await home.wait_connected()
                assert office.status.state is State.CONNECTED
                for visitor in visitors:
                    nursery.start_soon(visitor.aclose)


async def test_who_connects_too_often_is_reset(mock_clock: trio.testing.MockClock) -> None:
    """By a clock that stands still, or the machine might take the second that earns another connection."""
    async with limited(connects_per_second_per_address=1) as (rig, _):
        for _ in range(3):  # and the gateway
            await visitor_is_served(rig)
        await is_turned_away(rig.addresses.ingress)


async def test_a_tunnel_with_enough_visitors_is_503() -> None:
    async with limited(streams_per_tunnel=1) as (rig, _), await rig.visit() as first:
        await first.send_all(request())
        await read_exactly(first, len(request()))
        async with await rig.visit() as second:
            assert (await ask(second, request())).startswith(b"HTTP/1.1 503 ")
        await first.send_eof()
        assert await read_all(first) == b""
        await eventually(partial(is_served, rig))


async def test_a_tunnel_of_its_own_address_with_enough_visitors_resets() -> None:
    tunnels = [tunnel_entry(bind_addr="127.0.0.1:0")]
    async with relay_rig(limits=limits(streams_per_tunnel=1), tunnels=tunnels) as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await connect(rig.addresses.tunnels["office"]), await tunnel.accept():
            await is_turned_away(rig.addresses.tunnels["office"])


def never_comes(_connection: Connection) -> None:
    raise AssertionError("nobody has connected")


async def test_a_system_without_descriptors_is_asked_again_and_complained_of_seldom(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """`trio.serve_listeners` logs a traceback ten times a second."""
    asked_at: list[float] = []

    class Exhausted(trio.abc.Listener[trio.SocketStream]):
        async def accept(self) -> trio.SocketStream:
            await trio.lowlevel.checkpoint()
            asked_at.append(trio.current_time())
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(150):
            await AcceptLoop(Admission(limits())).serve([Exhausted()], never_comes, nursery)  # type: ignore[list-item]
    assert len(asked_at) == pytest.approx(150 / accepting.ACCEPT_RETRY, abs=10)
    assert len(caplog.records) == LINES_IN_FULL + 2
    assert "599 more" in caplog.text or "600 more" in caplog.text


async def test_an_accept_is_repeated_unless_the_listener_is_broken(autojump_clock: trio.testing.MockClock) -> None:
    failures = [errno.ECONNABORTED, errno.ENFILE, errno.EPROTO]

    async def accept() -> str:
        await trio.lowlevel.checkpoint()
        if failures:
            raise OSError(failures.pop(), "no")
        return "accepted"

    assert await accepting.accept_next(accept) == "accepted"
    failures.append(errno.EBADF)
    with pytest.raises(OSError, match="no"):
        await accepting.accept_next(accept)


async def test_a_listener_that_is_broken_is_an_error() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.close()
    with pytest.raises(ExceptionGroup) as raised:
        async with trio.open_nursery() as nursery:
            await AcceptLoop(Admission(limits())).serve([listener], never_comes, nursery)
    (error,) = leaves(raised.value)
    assert isinstance(error, trio.ClosedResourceError)


async def test_a_connection_has_the_options_that_it_needs() -> None:
    """Where the event loop accepts, it inherits them from the listener."""
    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    address = Address.of_socket(listener.socket.getsockname())
    connections: list[Connection] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AcceptLoop(Admission(limits())).serve, [listener], connections.append, nursery)
        async with await connect(address):
            await eventually(lambda: connections)
            (connection,) = connections
            accepted = connection.stream.lowest_socket
            assert accepted is not None
            tcp = socket.IPPROTO_TCP
            assert accepted.socket.getsockopt(tcp, socket.TCP_NODELAY)
            assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert accepted.socket.getsockopt(tcp, socket.TCP_KEEPIDLE) == accepting.KEEPALIVE_IDLE
                assert accepted.socket.getsockopt(tcp, socket.TCP_KEEPINTVL) == accepting.KEEPALIVE_INTERVAL
            assert connection.local == address
            connection.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_gateway_that_leaves_in_its_opening_is_no_fault_of_the_relay(
    engine: EngineName, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    upgrade = (
        "GET / HTTP/1.1\r\nHost: relay.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    )
    for steps in range(30):
        async with open_memory_relay(engine=engine) as relay:
            stream = await relay.dial("relay.test", 80)
            await stream.send_all(upgrade.encode())
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            await trio.aclose_forcefully(stream)
            await trio.sleep(1)
    assert "unforeseen" not in caplog.text


async def test_a_handler_that_fails_costs_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    address = Address.of_socket(listener.socket.getsockname())

    async def fail_at_the_first(connected: trio.abc.Stream) -> None:
        if await connected.receive_some(1) == b"1":
            raise RuntimeError("a bug")
        await connected.send_all(b"served")
        await connected.aclose()

    def serve(connection: Connection) -> None:
        connection.start(fail_at_the_first, connection.stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(AcceptLoop(Admission(limits())).serve, [listener], serve, nursery)
        with no_hang():
            async with await connect(address) as first:
                await first.send_all(b"1")
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(first)
            async with await connect(address) as second:
                await second.send_all(b"2")
                assert await read_all(second) == b"served"
        nursery.cancel_scope.cancel()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "unforeseen" in record.getMessage()


async def test_a_stranger_may_say_little_before_its_proof(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        with no_hang():
            async with await connect(rig.addresses.control) as stranger:
                await stranger.send_all(OPENING + frame(PING, masked=True) * 17)
                with suppress(trio.BrokenResourceError):
                    await read_all(stranger)
            async with await connect(rig.addresses.control) as stranger:
                await stranger.send_all(OPENING)
                await read_until(stranger, b"challenge")
                await stranger.send_all(frame(TEXT, b'{"type":"weather"}', masked=True) * 5)
                await read_until(stranger, (1002).to_bytes(2) + b"more than 4 texts")


async def test_what_deployed_gateways_and_proxies_send_before_the_proof_is_taken(engine: EngineName) -> None:
    """A large proof, texts of unknown type before it, and pings of a proxy on the way."""
    async with relay_rig(engine) as rig, await connect(rig.addresses.control) as stream:
        gateway = GatewayOfBytes(stream)
        extra = frame(PING, b"proxy", masked=True) * 6 + frame(TEXT, b'{"type":"weather"}', masked=True) * 3
        with no_hang():
            await gateway.open(b"X-Forwarded-For: " + b"203.0.113.7, " * 200 + b"203.0.113.8\r\n", before_proof=extra)
            for _ in range(100):  # proved: nothing is counted any more
                await gateway.say(frame(PING, b"!", masked=True))


async def test_a_relay_says_when_descriptors_are_few(caplog: pytest.LogCaptureFixture) -> None:
    most = descriptor_limit()
    assert most is not None
    async with relay_rig(limits=limits(connections=most)):
        pass
    assert "ulimit -n" in caplog.text


# Proofs that are none


async def refused_after(arrival: Arrival | None, key: RelayKey, registered: str | None, **said: str) -> float:
    """Seconds from a gateway's proof with `key` to its rejection, where the relay knows the key `registered`.

    Args:
        said: fields of its answer that it changes after it was signed.
    """
    tunnels = [] if registered is None else [TunnelEntry(**tunnel_entry(key=registered))]
    endpoint = GatewayEndpoint(relay_config(), LocalRegistry(tunnels), LocalDirectory())
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    opening = GatewayHandshake(key.identity(), audience=RELAY_NAME, service="any")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.serve_request, watched, watched, arrival)
        address = RelayAddress.parse(f"ws://{RELAY_NAME}")
        async with load_engine().connect(ours, Opening(subprotocol=SUBPROTOCOL, address=address)) as websocket:
            (challenge,) = await websocket.receive()
            assert isinstance(challenge, str)
            answer = opening.receive(challenge)
            assert isinstance(answer, str)
            if registered is not None:  # the right key id, and another one's proof
                named = PublicKey.parse(registered).key_id
                answer = answer.replace(key.identity().key_id, named)
            answer = json.dumps(json.loads(answer) | said)
            started = trio.current_time()
            await websocket.send([answer])
            (rejected,) = await websocket.receive()
            assert isinstance(rejected, str)
            assert '"auth_failed"' in rejected
            return trio.current_time() - started


async def test_failed_proofs_of_an_address_are_slowed_down_alike(autojump_clock: trio.testing.MockClock) -> None:
    """An unknown key and a wrong proof wait equally long: the time counts failures, and nothing else."""
    known = str(KEY.identity().public_key)
    for first, second in ((None, known), (known, None)):
        admission = Admission(limits(failed_auth_delay_ms=100, failed_auth_delay_max_ms=400))
        waits = []
        for number in range(5):
            arrival = admission.arrive("192.0.2.1", trio.current_time(), never)
            waits.append(await refused_after(arrival, WRONG_KEY, first if number % 2 else second))
            arrival.leave()
        assert waits == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
        other = admission.arrive("192.0.2.2", trio.current_time(), never)
        assert await refused_after(other, WRONG_KEY, first) == pytest.approx(0.1)
    assert await refused_after(None, WRONG_KEY, known) == 0


def test_an_unknown_key_and_a_wrong_proof_take_the_same_path() -> None:
    """No statistics: the very calls are the same, in the same order, with arguments of the same sizes."""

    def calls_of(key: PublicKey | None) -> list[str]:
        relay = RelayHandshake("relay", public_names=[RELAY_NAME], nonce=bytes(32))
        gateway = GatewayHandshake(WRONG_KEY.identity(), audience=RELAY_NAME, service="any", nonce=bytes(32))
        answer = gateway.receive(relay.challenge)
        assert isinstance(answer, str)
        claim = relay.receive(answer)
        assert isinstance(claim, Claim)
        calls: list[str] = []

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event in {"call", "c_call"}:
                name = frame.f_code.co_qualname if event == "call" else getattr(argument, "__qualname__", "?")
                calls.append(f"{event} {name}")

        sys.setprofile(note)
        try:
            relay.verify(claim, key)
        except Rejection as rejection:
            told = rejection.text
        finally:
            sys.setprofile(None)
        return [*calls, told]

    calls_of(None)  # caches are warm after that
    unknown, wrong = calls_of(None), calls_of(KEY.identity().public_key)
    assert any("verify" in call for call in unknown)
    assert unknown == wrong


@final
class CountedVerifications:
    """Replaces `Ed25519PublicKey`, and counts the signatures that are verified with real points of the curve."""

    def __init__(self) -> None:
        self.count = 0

    def from_public_bytes(self, raw: bytes) -> Any:
        key = Ed25519PublicKey.from_public_bytes(raw)
        PublicKey.parse(f"ed25519:{raw.hex()}")  # with anything else the library is done at once

        class Counted:
            def verify(_, signature: bytes, message: bytes) -> None:  # noqa: N805  # `self` is the one around it
                self.count += 1
                key.verify(signature, message)

        return Counted()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"audience": "another.test"},
        {"audience": ""},
        {"service": "another"},
        {"key_id": "00"},
        {"key_id": "\u00e9"},
    ],
    ids=repr,
)
async def test_an_unknown_key_costs_the_relay_the_same_work(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One verification in any case, so that timing does not reveal which keys exist."""
    counted = CountedVerifications()
    monkeypatch.setattr(identity, "Ed25519PublicKey", counted)
    for registered in (None, str(KEY.identity().public_key)):
        counted.count = 0
        await refused_after(None, WRONG_KEY, registered, **said)
        assert counted.count == 1


# The log


async def test_nothing_that_others_say_forges_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    evil = "a\r\n2026-01-01 INFO forged\x1b[31m\u202e\x00\u2028"
    async with relay_rig(limits=limits(failed_auth_delay_ms=0)) as rig:
        for host in (b"no\rbody.test", b"nobody\x1b[31m.test", b"nobody.test\x00", b"xn--\xff.test"):
            async with await rig.visit() as visitor:
                await ask(visitor, b"GET /\x1b HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
        for changes in ({"agent": evil}, {"key_id": evil}, {"service": evil}, {"instance": evil}, {"audience": evil}):
            await open_by_hand(rig, changes)
        for first in (b"\x16\x03\x01forged\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: \x1bforged\r\n\r\n"):
            async with await connect(rig.addresses.control) as stranger:
                await ask(stranger, first)
    assert any("is connected" in record.getMessage() for record in caplog.records)
    assert any("was rejected" in record.getMessage() for record in caplog.records)
    for record in caplog.records:
        if record.name.startswith("pioneer_tunnel"):
            assert record.getMessage().isprintable(), record.getMessage()


async def open_by_hand(rig: RelayRig, changes: dict[str, str]) -> None:
    """An opening that proves KEY, with these changes of its claim."""
    fields: dict[str, Any] = {"audience": RELAY_NAME, "service": "any", "instance": "x"}
    fields |= {name: value for name, value in changes.items() if name in fields}
    opening = GatewayHandshake(KEY.identity(), **fields)
    address = RelayAddress.parse(f"ws://{RELAY_NAME}")
    stream = await connect(rig.addresses.control)
    wanted = Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT)
    with no_hang(), suppress(trio.BrokenResourceError):
        async with load_engine().connect(stream, wanted) as websocket:
            (challenge,) = await websocket.receive()
            assert isinstance(challenge, str)
            answer = opening.receive(challenge)
            assert isinstance(answer, str)
            await websocket.send([json.dumps(json.loads(answer) | changes)])
            await websocket.receive()
            await accept(websocket)
