"""A trusted HTTP proxy in front of the relay names the visitor of each request; nobody else can."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from hypothesis import given, strategies as st
from rig import RelayRig, in_background, no_hang, read_all, read_until, relay_rig, request

from pioneer_tunnel._http.head import HeadReader
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._storage.networks import proxy_networks
from pioneer_tunnel.relay.visitors.forwarded_for import named_visitor
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

PROXY: Final = Address("10.0.0.5", 4711)
TRUSTED: Final = proxy_networks(["10.0.0.0/24", "2001:db8:1::/64"])
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def named(*lines: str) -> tuple[Address, bool | None]:
    head = HeadReader().feed(request(*lines))
    assert head is not None
    return named_visitor(head, PROXY, TRUSTED)


@pytest.mark.parametrize(
    ("lines", "visitor"),
    [
        ([], PROXY),
        (["X-Forwarded-For: 203.0.113.9"], Address("203.0.113.9", 0)),
        (["X-Forwarded-For: 203.0.113.9:5555"], Address("203.0.113.9", 5555)),
        (["X-Forwarded-For: 2001:DB8::9"], Address("2001:db8::9", 0)),
        (["X-Forwarded-For: [2001:db8::9]:80"], Address("2001:db8::9", 80)),
        (["X-Forwarded-For: ::ffff:203.0.113.9"], Address("203.0.113.9", 0)),
        (["X-Forwarded-For: 198.51.100.1, 203.0.113.9"], Address("203.0.113.9", 0)),
        (["X-Forwarded-For: 198.51.100.1", "x-forwarded-for: 203.0.113.9"], Address("203.0.113.9", 0)),
        (["X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: 10.0.0.6 , 2001:db8:1::2,"], Address("203.0.113.9", 0)),
        (["X-Forwarded-For: 10.0.0.7, 10.0.0.6"], Address("10.0.0.7", 0)),
        (["X-Forwarded-For: unknown"], PROXY),
        (["X-Forwarded-For: 203.0.113.9, unknown"], PROXY),
        (["X-Forwarded-For: 203.0.113.9, _hidden, 10.0.0.6"], Address("10.0.0.6", 0)),
        (["X-Forwarded-For: 203.0.113.999"], PROXY),
        (["X-Forwarded-For: 203.0.113.9:99999"], PROXY),
        (["X-Forwarded-For: fe80::1%eth0"], PROXY),
        (["X_Forwarded_For: 203.0.113.9", "Forwarded: for=203.0.113.9", "X-Real-IP: 203.0.113.9"], PROXY),
        (["X-Forwarded-For: 203.0.113.9" + ", 10.0.0.6" * 1000], Address("10.0.0.6", 0)),
    ],
)
def test_the_visitor_is_the_rightmost_address_that_is_not_trusted(lines: list[str], visitor: Address) -> None:
    assert named(*lines) == (visitor, None)


@pytest.mark.parametrize(
    ("lines", "tls"),
    [
        ([], None),
        (["X-Forwarded-Proto: https"], True),
        (["X-Forwarded-Proto: HTTP"], False),
        (["X-Forwarded-Proto: wss"], True),
        (["X-Forwarded-Proto: ftp"], None),
        (["X-Forwarded-Proto: http", "X-Forwarded-Proto: https"], True),
        (["X_Forwarded_Proto: https"], None),
    ],
)
def test_the_proxy_says_whether_tls_was_used(lines: list[str], tls: bool | None) -> None:
    assert named(*lines)[1] is tls


@given(
    forged=st.lists(st.one_of(st.text("0123456789.:abcdef[] _-", max_size=20), st.ip_addresses().map(str)), max_size=6),
    visitor=st.ip_addresses().filter(lambda address: not any(address in network for network in TRUSTED)),
    proxies=st.lists(st.sampled_from(["10.0.0.6", "2001:db8:1::7"]), max_size=3),
)
def test_nothing_that_a_visitor_writes_changes_who_it_is(
    forged: list[str], visitor: ipaddress.IPv4Address | ipaddress.IPv6Address, proxies: list[str]
) -> None:
    mapped = visitor.ipv4_mapped if isinstance(visitor, ipaddress.IPv6Address) else None
    named_by_proxies = ", ".join([*forged, str(visitor), *proxies])
    assert named(f"X-Forwarded-For: {named_by_proxies}")[0] == Address(str(mapped or visitor), 0)


# In a relay


@asynccontextmanager
async def proxied(**changes: Any) -> AsyncIterator[tuple[RelayRig, trio.SocketStream, list[TunnelStream]]]:
    """A relay behind an HTTP proxy, a connection of that proxy, and the streams that the gateway gets and answers."""
    came: list[TunnelStream] = []

    async def answer(stream: TunnelStream) -> None:
        came.append(stream)
        async with stream:
            async for data in stream:
                await stream.send_all(OK * data.count(b"\r\n\r\n"))

    changes = {"trust_forwarded_from": ["127.0.0.1"]} | changes
    async with relay_rig(**changes) as rig, rig.tunnel() as tunnel, await rig.visit() as proxy:
        with no_hang():
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(answer, [tunnel])):
                yield rig, proxy, came


async def ask(proxy: trio.SocketStream, *lines: str) -> None:
    await proxy.send_all(request(*lines))
    assert await read_until(proxy, b"\r\n\r\n") == OK


async def test_each_visitor_of_a_kept_connection_has_a_stream() -> None:
    async with proxied() as (_, proxy, came):
        await ask(proxy, "X-Forwarded-For: 203.0.113.1", "X-Forwarded-Proto: https")
        await ask(proxy, "X-Forwarded-For: 203.0.113.1", "X-Forwarded-Proto: https")
        await ask(proxy, "X-Forwarded-For: 203.0.113.2", "X-Forwarded-Proto: https")
        await ask(proxy, "X-Forwarded-For: 203.0.113.2", "X-Forwarded-Proto: http")
        await ask(proxy)
        own = Address("127.0.0.1", proxy.socket.getsockname()[1])
        assert [(stream.visitor, stream.tls) for stream in came] == [
            (Address("203.0.113.1", 0), True),
            (Address("203.0.113.2", 0), True),
            (Address("203.0.113.2", 0), False),
            (own, False),
        ]


async def test_requests_that_come_at_once_are_told_apart_too() -> None:
    async with proxied() as (_, proxy, came):
        visitors = [f"203.0.113.{number}" for number in (1, 1, 2, 1)]
        await proxy.send_all(b"".join(request(f"X-Forwarded-For: {visitor}") for visitor in visitors))
        for _ in visitors:
            assert await read_until(proxy, b"\r\n\r\n") == OK
        hosts = [stream.visitor.host for stream in came if stream.visitor is not None]
        assert hosts == ["203.0.113.1", "203.0.113.2", "203.0.113.1"]


async def test_who_is_not_trusted_names_nobody() -> None:
    async with proxied(trust_forwarded_from=["127.0.0.2"]) as (_, proxy, came):
        await ask(proxy, "X-Forwarded-For: 203.0.113.1", "X-Forwarded-Proto: https")
        await ask(proxy, "X-Forwarded-For: 203.0.113.2", "X-Forwarded-Proto: https")
        assert [(stream.visitor, stream.tls) for stream in came] == [
            (Address("127.0.0.1", proxy.socket.getsockname()[1]), False)
        ]


async def test_limits_per_address_apply_to_the_visitors_of_a_proxy() -> None:
    limits = {"connections_per_address": 1, "connects_per_second_per_address": 0, "exempt": ()}
    async with proxied(limits=limits) as (rig, proxy, _), await rig.visit() as other, await rig.visit() as third:
        await ask(proxy, "X-Forwarded-For: 203.0.113.1")
        await ask(other, "X-Forwarded-For: 203.0.113.2")
        await third.send_all(request("X-Forwarded-For: 203.0.113.1"))
        assert (await read_all(third)).startswith(b"HTTP/1.1 503 ")
        await ask(proxy, "X-Forwarded-For: 203.0.113.3")  # the first visitor has left
        async with await rig.visit() as again:
            await ask(again, "X-Forwarded-For: 203.0.113.1")


async def test_a_balancer_may_name_the_proxy() -> None:
    proxies = {"accept_proxy_from": ["127.0.0.1"], "trust_forwarded_from": ["10.0.0.5"]}
    async with proxied(**proxies) as (rig, proxy, came), await rig.visit() as direct:
        await proxy.send_all(b"PROXY TCP4 10.0.0.5 198.51.100.1 1 2\r\n")
        await ask(proxy, "X-Forwarded-For: 203.0.113.1")
        await direct.send_all(b"PROXY TCP4 203.0.113.7 198.51.100.1 1 2\r\n")
        await ask(direct, "X-Forwarded-For: 203.0.113.1")
        assert [stream.visitor for stream in came] == [Address("203.0.113.1", 0), Address("203.0.113.7", 1)]
