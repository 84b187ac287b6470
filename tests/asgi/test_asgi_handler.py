"""An ASGI application as the handler of `RemoteAccess`, and what the scope says of a visitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from asgi_rig import Browser, echo, head
from gateway import Gateway
from rig import KEY, no_hang, read_all, relay_rig, tunnel_entry

from pioneer_tunnel import Address, ProxyHeader, SettingsUpdate, State, TunnelStream
from pioneer_tunnel.asgi import open_handler
from pioneer_tunnel.asgi.on_trio import visitor_of
from pioneer_tunnel.asgi.scope import Visitor
from pioneer_tunnel.testing import open_memory_relay
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.tunnel.tunnel import open_tunnel


async def test_remote_access_serves_an_application(tmp_path: Path) -> None:
    with no_hang():
        async with (
            relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as rig,
            open_handler(echo) as handler,
            trio.open_nursery() as nursery,
        ):
            remote_access = Gateway(tmp_path).remote_access(
                {"relay_addr": "ws://relay.test"}, handler=handler, transports=TRANSPORTS, dial=rig.dial
            )
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
            await nursery.start(remote_access.run)
            await remote_access.settled()
            assert remote_access.status.state is State.CONNECTED
            async with await trio.open_tcp_stream("127.0.0.1", rig.addresses.tunnels["office"].port) as stream:
                assert (await Browser(stream).ask("POST", "/", "Content-Length: 2", body=b"ok")).body == b"ok"
            nursery.cancel_scope.cancel()


async def test_the_end_of_the_block_lets_requests_finish() -> None:
    async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
        await tunnel.wait_connected()
        asked, go = trio.Event(), trio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            asked.set()
            await go.wait()
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"whole"})

        async with trio.open_nursery() as nursery:
            visitor = await relay.visit()
            async with open_handler(app, lifespan="off") as handler:
                await visitor.send_all(head("GET", "/"))
                nursery.start_soon(handler, await tunnel.accept())
                await asked.wait()
                nursery.start_soon(_set_later, go)
            assert go.is_set()
        assert b"whole" in await read_all(visitor)


async def _set_later(event: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    event.set()


@pytest.mark.parametrize(
    ("tls", "public_url", "scheme"),
    [
        (True, None, "https"),
        (True, "http://h", "https"),
        (False, "https://h", "http"),
        (None, "https://h", "https"),
        (None, "http://h", "http"),
        (None, None, "http"),
    ],
)
async def test_the_scheme_is_what_the_relay_says_or_else_the_public_url(
    tls: bool | None, public_url: str | None, scheme: Any
) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    header = ProxyHeader(Address("192.0.2.1", 1), Address("192.0.2.2", 443), tls)
    stream = TunnelStream(ours, header)  # type: ignore[arg-type]  # nothing is carried
    assert visitor_of(stream, public_url) == Visitor(Address("192.0.2.1", 1), Address("192.0.2.2", 443), scheme)
    assert visitor_of(TunnelStream(ours)) == Visitor(None, None, "http")  # type: ignore[arg-type]
