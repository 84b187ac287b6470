"""Where a relay listens: both address families at one entry, several addresses, and one address for each visitor."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
from relay_problems import only_problem_of, problems_of, relay, tunnel
from rig import ask, in_background, relay_config, relay_rig, request, tunnel_entry

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.config import RelayConfig
from pioneer_tunnel.transports.tunnel_stream import TunnelStream


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


# The configuration


@pytest.mark.parametrize("name", ["control_addr", "ingress_addr"])
def test_a_list_of_addresses_is_taken(name: str) -> None:
    config = RelayConfig.from_table(relay(**{name: ["127.0.0.1:80", "[::1]:80"]}))
    assert getattr(config, name) == (Address("127.0.0.1", 80), Address("::1", 80))


def test_a_tunnel_may_have_a_list_too_and_all_addresses_are_known() -> None:
    config = RelayConfig.from_table(relay(tunnel(1, bind_addr=["127.0.0.1:22", "[::1]:22"])))
    assert config.tunnels[0].bind_addr == (Address("127.0.0.1", 22), Address("::1", 22))
    assert config.all_addresses == {
        Address("0.0.0.0", 8443),
        Address("::", 443),
        Address("127.0.0.1", 22),
        Address("::1", 22),
    }


def test_each_entry_that_is_wrong_is_named() -> None:
    problems = problems_of(relay(control_addr=["127.0.0.1:80", "nowhere", 7, "127.0.0.1:80"]))
    assert [problem.key for problem in problems] == [f"relay.control_addr[{index}]" for index in (1, 2, 3)]
    assert "no port" in problems[0].message
    assert "stands in [0] too" in problems[2].message


@pytest.mark.parametrize("value", [[], b"127.0.0.1:80", {"a": 1}, True])
def test_what_is_neither_an_address_nor_a_list_is_refused(value: Any) -> None:
    assert "array" in only_problem_of(relay(control_addr=value)).message


def test_an_address_in_two_lists_is_taken_twice() -> None:
    problem = only_problem_of(
        relay(tunnel(1, bind_addr=["[::1]:21", "[::1]:22"]), tunnel(2, bind_addr=["[::1]:23", "[0::1]:22"]))
    )
    assert problem.key == "relay.tunnels[1].bind_addr[1]"
    assert "tunnels[0]" in problem.message
    own = only_problem_of(relay(tunnel(1, bind_addr=["[::1]:21"]), control_addr=["[::1]:20", "[::1]:21"]))
    assert "control_addr" in own.message


def test_one_shared_address_has_one_kind_of_tls() -> None:
    problem = only_problem_of(
        relay(
            control_addr=["127.0.0.1:1", "127.0.0.1:2"],
            ingress_addr="127.0.0.1:2",
            tls_certificate="a",
            tls_private_key="b",
            control_tls=False,
        )
    )
    assert problem.key == "relay.ingress_tls"


# Listening


async def connect(address: Address, host: str) -> trio.SocketStream:
    return await trio.open_tcp_stream(host, address.port)


async def tell_visitor(stream: TunnelStream) -> None:
    async with stream:
        await stream.receive_some()
        await stream.send_all(f"{stream.visitor} at {stream.proxy_header.local}".encode())


@needs_ipv6
async def test_one_entry_serves_both_families_and_ipv4_visitors_have_ipv4_addresses() -> None:
    entries = [tunnel_entry(bind_addr="[::]:0")]
    async with (
        relay_rig(control_addr="[::]:0", ingress_addr="[::]:0", tunnels=entries) as rig,
        rig.tunnel() as tunnel,
        in_background(lambda: trio.serve_listeners(tell_visitor, [tunnel])),
    ):
        await tunnel.wait_connected()
        for host in ("127.0.0.1", "::1"):
            async with await connect(rig.addresses.tunnels["office"], host) as visitor:
                ours, theirs = (Address(*end()[:2]) for end in (visitor.socket.getsockname, visitor.socket.getpeername))
                assert ours.host == host
                assert await ask(visitor, b"") == f"{ours} at {theirs}".encode()
        for host in ("127.0.0.1", "::1"):
            async with await connect(rig.addresses.ingress, host) as visitor:
                assert b" 404 " in await ask(visitor, request(host="nobody.test"))


@needs_ipv6
async def test_limits_know_an_ipv4_visitor_of_such_an_entry_by_its_own_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = []
    arrive = Admission.arrive

    def note(self: Admission, host: str | None, *arguments: Any, **named: Any) -> Any:
        hosts.append(host)
        return arrive(self, host, *arguments, **named)

    monkeypatch.setattr(Admission, "arrive", note)
    async with relay_rig(control_addr="[::]:0", ingress_addr="[::]:0") as rig:
        async with await connect(rig.addresses.ingress, "127.0.0.1") as visitor:
            await ask(visitor, request())
        async with await connect(rig.addresses.ingress, "::1") as visitor:
            await ask(visitor, request())
    assert hosts == ["127.0.0.1", "::1"]


@needs_ipv6
async def test_an_ipv4_entry_with_the_same_port_has_the_ipv4_half() -> None:
    async with relay_rig() as finding:
        port = finding.addresses.control.port
    both = [f"[::]:{port}", f"0.0.0.0:{port}"]
    async with relay_rig(control_addr=both) as rig:
        assert [str(address) for address in rig.addresses.all_control] == both
        for host in ("127.0.0.1", "::1"):
            async with await connect(rig.addresses.control, host) as visitor:
                assert b" 404 " in await ask(visitor, request())


@needs_ipv6
async def test_where_another_process_has_the_ipv4_half_it_serves_ipv6_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        async with (
            relay_rig(control_addr=f"[::]:{port}") as rig,
            await connect(rig.addresses.control, "::1") as visitor,
        ):
            assert b" 404 " in await ask(visitor, request())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum(warning.startswith(f"[::]:{port} serves IPv6 alone") for warning in warnings) == 1


@needs_ipv6
async def test_an_address_that_is_taken_in_both_families_is_an_error_that_names_it() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at \[::\]:{port}: "):
            await Relay(relay_config(control_addr=f"[::]:{port}")).serve()


async def test_each_address_of_a_list_is_served_and_one_may_be_for_both() -> None:
    control, ingress = ["127.0.0.1:0", "127.0.0.2:0"], ["127.0.0.3:0", "127.0.0.1:0"]
    async with (
        relay_rig(control_addr=control, ingress_addr=ingress) as rig,
        rig.tunnel() as tunnel,
        in_background(lambda: trio.serve_listeners(tell_visitor, [tunnel])),
    ):
        await tunnel.wait_connected()
        addresses = rig.addresses
        assert [address.host for address in addresses.all_control] == ["127.0.0.1", "127.0.0.2"]
        assert [address.host for address in addresses.all_ingress] == ["127.0.0.3", "127.0.0.1"]
        assert addresses.ingress == addresses.all_ingress[0]
        assert addresses.all_ingress[1] == addresses.all_control[0], "it is for both"
        for address in addresses.all_ingress:
            async with await connect(address, address.host) as visitor:
                assert (await ask(visitor, request())).startswith(b"127.0.0.1:")
        async with await connect(addresses.all_control[1], "127.0.0.2") as visitor:
            assert b" 404 " in await ask(visitor, request())


async def test_a_tunnels_list_can_grow_and_shrink_and_what_stays_is_not_closed() -> None:
    async with (
        relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as rig,
        rig.tunnel() as tunnel,
        in_background(lambda: trio.serve_listeners(tell_visitor, [tunnel])),
    ):
        await tunnel.wait_connected()
        first = rig.addresses.tunnels["office"]
        await rig.apply(tunnels=[tunnel_entry(bind_addr=["127.0.0.2:0", "127.0.0.1:0"])])
        second, same = rig.addresses.all_tunnels["office"]
        assert (second.host, same) == ("127.0.0.2", first)
        for address in (first, second):
            async with await connect(address, address.host) as visitor:
                assert (await ask(visitor, b"")).startswith(b"127.0.0.1:")
        await rig.apply(tunnels=[tunnel_entry(bind_addr=["127.0.0.2:0"])])
        assert rig.addresses.all_tunnels == {"office": (second,)}
        with pytest.raises(OSError, match="failed"):
            await connect(first, first.host)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (("::ffff:192.0.2.1", 80, 0, 0), Address("192.0.2.1", 80)),
        (("192.0.2.1", 80), Address("192.0.2.1", 80)),
        (("::ffff:0:1", 80, 0, 0), Address("::ffff:0:1", 80)),
        (("2001:db8::1", 80, 0, 0), Address("2001:db8::1", 80)),
        (("fe80::1%eth0", 80, 0, 2), Address("fe80::1%eth0", 80)),
    ],
)
def test_an_ipv4_peer_has_one_name_whichever_socket_it_came_to(name: tuple[Any, ...], address: Address) -> None:
    assert Address.of_socket(name) == address
