"""Several services over one link: each visitor reaches the service that it wants, or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from rig import (
    HOST,
    KEY,
    RelayRig,
    ask,
    connect,
    eventually,
    no_hang,
    read_all,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel import (
    Dialer,
    ProxyHeader,
    RemoteAccess,
    RemoteAccessConfig,
    Services,
    SettingsFile,
    SettingsUpdate,
    forward,
)
from pioneer_tunnel._model.addresses import LocalAddress, local_address
from pioneer_tunnel._model.status import State
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.relay.gateways import opening
from pioneer_tunnel.testing import FaultPlan, MemoryRelay, run
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

WIKI: Final = "wiki.test"


def several(*names: str, **changes: Any) -> dict[str, Any]:
    """A tunnel whose services have the URL `http://NAME.test`; `web` has the URL of the tests, and `ssh` a port."""
    ways = {"web": {"url": f"http://{HOST}"}, "ssh": {"bind_addr": "127.0.0.1:0"}}
    services = [{"name": name} | ways.get(name, {"url": f"http://{name}.test"}) for name in names]
    return tunnel_entry(url=None, services=services, **changes)


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


async def say_service(stream: TunnelStream) -> None:
    """Answer with the name of the service."""
    async with stream:
        await read_all(stream)
        body = repr(stream.service).encode()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def answer_from(rig: RelayRig, host: str) -> bytes:
    with no_hang():
        async with await rig.visit() as visitor:
            return await ask(visitor, request("Connection: close", host=host))


async def bound_answer(rig: RelayRig) -> bytes:
    """What the `bind_addr` of the rig's tunnel says to `hello`."""
    with no_hang():
        async with await connect(rig.addresses.tunnels["office"]) as visitor:
            return await ask(visitor, b"hello")


# Who gets whom


async def test_each_visitor_reaches_the_service_that_it_wants() -> None:
    async with (
        relay_rig(tunnels=[several("web", "ssh", "wiki")]) as rig,
        accepting(rig, say_service, services={"web": "127.0.0.1:1", "ssh": "127.0.0.1:2", "wiki": "127.0.0.1:3"}),
    ):
        assert (await answer_from(rig, HOST)).endswith(b"\r\n\r\n'web'")
        assert (await answer_from(rig, WIKI)).endswith(b"\r\n\r\n'wiki'")
        assert (await bound_answer(rig)).endswith(b"\r\n\r\n'ssh'")


async def test_a_gateway_that_knows_no_services_gets_visitors_of_the_first_alone() -> None:
    async with relay_rig(tunnels=[several("web", "ssh", "wiki")]) as rig, accepting(rig, say_service) as tunnel:
        assert (await answer_from(rig, HOST)).endswith(b"\r\n\r\nNone")
        refused = await answer_from(rig, WIKI)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"does not serve this service" in refused
        with pytest.raises(trio.BrokenResourceError):
            await bound_answer(rig)
        assert tunnel.status.services is None


async def test_a_relay_that_knows_no_services_brings_visitors_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "OFFERS", {})
    async with (
        relay_rig(tunnels=[several("web", "wiki")]) as rig,
        accepting(rig, say_service, services={"web": "127.0.0.1:1", "wiki": "127.0.0.1:3"}) as tunnel,
    ):
        assert (await answer_from(rig, HOST)).endswith(b"\r\n\r\nNone")
        assert (await answer_from(rig, WIKI)).startswith(b"HTTP/1.1 503 ")
        assert tunnel.status.services is None


async def test_the_empty_name_takes_the_first_service_whatever_its_name_is() -> None:
    async with (
        relay_rig(tunnels=[several("web", "wiki")]) as rig,
        accepting(rig, say_service, services={"": "127.0.0.1:1", "wiki": "127.0.0.1:3"}) as tunnel,
    ):
        assert (await answer_from(rig, HOST)).endswith(b"\r\n\r\nNone")
        assert (await answer_from(rig, WIKI)).endswith(b"\r\n\r\n'wiki'")
        assert tunnel.status.services == {"web": f"http://{HOST}", "wiki": f"http://{WIKI}"}


async def test_a_gateway_that_names_services_gets_no_other_visitors() -> None:
    async with (
        relay_rig(tunnels=[several("web", "wiki")]) as rig,
        accepting(rig, say_service, services={"wiki": "127.0.0.1:3"}),
    ):
        assert (await answer_from(rig, HOST)).startswith(b"HTTP/1.1 503 ")
        assert (await answer_from(rig, WIKI)).endswith(b"\r\n\r\n'wiki'")


async def test_a_tunnel_that_names_none_is_the_first_service_of_a_gateway_that_names_some() -> None:
    async with (
        relay_rig() as rig,
        accepting(rig, say_service, services={"": "127.0.0.1:1", "b": "127.0.0.1:2"}) as tunnel,
    ):
        assert (await answer_from(rig, HOST)).endswith(b"\r\n\r\nNone")
        assert tunnel.status.services == {"": f"http://{HOST}"}


# Changes


async def test_services_come_and_go_under_load_while_the_others_go_on() -> None:
    names = [f"s{number}" for number in range(30)]
    services = Services(dict.fromkeys(names, "127.0.0.1:1"))
    async with (
        relay_rig(tunnels=[several("web", *names)]) as rig,
        accepting(rig, say_service, services=services) as tunnel,
        await rig.visit() as kept,  # a visitor who stays
    ):
        await kept.send_all(request("Content-Length: 4", host="s0.test"))
        for _ in range(3):
            for name in names[1::2]:
                del services[name]
            await eventually(lambda: set(tunnel.status.services or ()) == {*names[0::2]})
            async with trio.open_nursery() as nursery:
                for index, name in enumerate(names):

                    @nursery.start_soon
                    async def visit(name: str = name, served: bool = not index % 2) -> None:
                        answer = await answer_from(rig, f"{name}.test")
                        assert answer.endswith(repr(name).encode()) if served else answer.startswith(b"HTTP/1.1 503 ")

            for name in names[1::2]:
                services[name] = "127.0.0.1:1"
            await eventually(lambda: set(tunnel.status.services or ()) == {*names})
        assert tunnel.status.attempt == 1
        with no_hang():
            assert (await ask(kept, b"body")).endswith(b"'s0'")


async def test_what_the_operator_changes_shows_in_the_status() -> None:
    async with (
        relay_rig(tunnels=[several("web", "ssh")]) as rig,
        accepting(
            rig, say_service, services={"web": "127.0.0.1:1", "ssh": "127.0.0.1:2", "wiki": "127.0.0.1:3"}
        ) as tunnel,
    ):
        port = rig.addresses.tunnels["office"].port
        assert tunnel.status.services == {"web": f"http://{HOST}", "ssh": f"tcp://127.0.0.1:{port}"}
        assert tunnel.public_url == f"http://{HOST}"
        await rig.apply(tunnels=[several("web", "wiki")])
        await eventually(lambda: tunnel.status.services == {"web": f"http://{HOST}", "wiki": f"http://{WIKI}"})
        assert (await answer_from(rig, WIKI)).endswith(b"\r\n\r\n'wiki'")
        assert tunnel.status.state is State.CONNECTED


async def test_a_port_at_every_address_is_shown_with_the_relays_name() -> None:
    entry = tunnel_entry(url=None, services=[{"name": "ssh", "bind_addr": "0.0.0.0:0"}])
    async with (
        relay_rig(tunnels=[entry]) as rig,
        accepting(rig, say_service, services={"ssh": "127.0.0.1:2"}) as tunnel,
    ):
        port = rig.addresses.tunnels["office"].port
        assert tunnel.public_url == f"tcp://relay.test:{port}"


# Local servers


@asynccontextmanager
async def local_servers(*names: str) -> AsyncIterator[tuple[dict[str, LocalAddress], list[bytes]]]:
    """Servers that each send their name; and all that they have received."""
    received: list[bytes] = []

    async def serve(name: str, stream: trio.SocketStream) -> None:
        async with stream:
            received.append(await read_all(stream))
            await stream.send_all(name.encode())

    async with trio.open_nursery() as nursery:
        addresses: dict[str, LocalAddress] = {}
        for name in names:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, partial(serve, name), [listener])
            addresses[name] = local_address(f"127.0.0.1:{listener.socket.getsockname()[1]}")
        yield addresses, received
        nursery.cancel_scope.cancel()


async def test_forward_finds_the_local_server_of_each_service() -> None:
    async with local_servers("web", "ssh") as (servers, received), relay_rig(tunnels=[several("web", "ssh")]) as rig:
        handler = partial(forward, local=servers, proxy_protocol="v2")
        async with accepting(rig, handler, services=servers):
            assert (await bound_answer(rig)) == b"ssh"
            parsed = ProxyHeader.parse(received[0])
            assert parsed is not None
            assert received[0][parsed[1] :] == b"hello"
            assert parsed[0].service is None  # it is between the relay and the gateway
            assert parsed[0].visitor is not None


async def test_remote_access_offers_the_services_of_its_configuration(tmp_path: Path) -> None:
    async with local_servers("local", "ssh") as (servers, _), relay_rig(tunnels=[several("web", "ssh", "wiki")]) as rig:
        config = RemoteAccessConfig(
            relay_addr="ws://relay.test",
            local_addr=servers["local"],
            services={"ssh": str(servers["ssh"])},
            runtime_dir=tmp_path,
        )
        remote_access = RemoteAccess(
            config,
            settings=SettingsFile(tmp_path / "settings.toml"),
            keystore=MemoryKeystore(),
            dial=dial_relay_or_local(rig),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(remote_access.run)
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
            await eventually(lambda: remote_access.status.state is State.CONNECTED)
            assert await bound_answer(rig) == b"ssh"
            assert set(remote_access.status.services or ()) == {"web", "ssh"}
            assert (await answer_from(rig, WIKI)).startswith(b"HTTP/1.1 503 ")
            assert await answer_from(rig, HOST) == b"local"
            nursery.cancel_scope.cancel()


def dial_relay_or_local(rig: RelayRig) -> Dialer:
    async def dial(host: str, port: int) -> trio.SocketStream:
        return await (rig.dial(host, port) if host == "relay.test" else trio.open_tcp_stream(host, port))

    return dial


async def of_the_kit(relay: MemoryRelay) -> None:
    relay.register("home", KEY, services=["web", "ssh"])
    async with (
        open_tunnel(relay.url, key=KEY, dial=relay.dial, services={"ssh": "127.0.0.1:22"}) as tunnel,
        trio.open_nursery() as nursery,
    ):
        await tunnel.wait_connected()
        assert tunnel.status.services == {"ssh": "http://ssh.home.test"}
        nursery.start_soon(accept_visitors, tunnel, say_service, nursery)
        assert (await ask(await relay.visit("home", service="ssh"), b"")).endswith(b"'ssh'")
        with pytest.raises(trio.BrokenResourceError):
            await ask(await relay.visit("home"), b"")
        nursery.cancel_scope.cancel()


def test_the_relay_of_the_test_kit_has_services() -> None:
    run(FaultPlan(), of_the_kit)
