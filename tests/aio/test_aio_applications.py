"""ASGI applications under asyncio: on the loop of the host, in its context."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest
from aio_rig import URL, ask, hello, options
from rig import RelayRig, request

from pioneer_tunnel import TunnelAuthError, new_relay_key
from pioneer_tunnel.aio import open_tunnel, serve


def test_an_application_that_is_running_already_serves_beside_the_block(
    relay_in_thread: RelayRig, on_loop: Any
) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread), app=hello) as tunnel:
            await tunnel.wait_connected()
            assert (await ask(relay_in_thread, request())).endswith(b"hello")

    on_loop(main())


def test_an_application_sees_the_hosts_context(relay_in_thread: RelayRig, on_loop: Any) -> None:
    name = contextvars.ContextVar[str]("name")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(name.get())
        await hello(scope, receive, send)

    async def main() -> None:
        name.set("of the host")
        async with open_tunnel(URL, **options(relay_in_thread), app=app) as tunnel:
            await tunnel.wait_connected()
            await ask(relay_in_thread, request())

    on_loop(main())
    assert seen == ["of the host"]


def test_serve_raises_why_the_tunnel_has_failed(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main(trigger: Any) -> None:
        async with open_tunnel(URL, **options(relay_in_thread, key=new_relay_key())) as tunnel:
            await serve(hello, tunnel, lifespan="off", shutdown_trigger=trigger)

    for trigger in (None, lambda: asyncio.sleep(60)):
        with pytest.raises(TunnelAuthError):
            on_loop(main(trigger))


def test_serve_raises_what_the_trigger_raises(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def trigger() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread)) as tunnel:
            await serve(hello, tunnel, lifespan="off", shutdown_trigger=trigger)

    with pytest.raises(ZeroDivisionError):
        on_loop(main())
