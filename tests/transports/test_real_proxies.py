"""Proxies that others wrote: tinyproxy, squid and microsocks. A test is skipped where its proxy is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from real_proxies import PASSWORD, PROXIES, USER, RealProxy, real_proxy
from rig import (
    AT_ONCE,
    HANG,
    KEY,
    echo,
    eventually,
    free_port,
    in_background,
    no_hang,
    read_exactly,
    relay_rig,
    request,
)

from pioneer_tunnel import ErrorKind, State, Tunnel, open_tunnel
from pioneer_tunnel.testing import open_pioneer_relay


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=[*PROXIES, "squid with TLS"], scope="module")
def proxy(request: pytest.FixtureRequest, ca: trustme.CA) -> Iterator[RealProxy]:
    name, _, tls = request.param.partition(" with ")
    certificate = ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes() if tls else None
    with real_proxy(name, authenticates=True, certificate=certificate) as running:
        yield running


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    return file


@pytest.fixture
def credentials_file(tmp_path: Path) -> Path:
    file = tmp_path / "proxy-credentials"
    file.write_text(f"{USER}:{PASSWORD}\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def unknown(proxy: RealProxy, ca_file: Path) -> dict[str, Any]:
    """Options of a tunnel that gives the proxy no credentials."""
    return {"key": KEY, "restart": AT_ONCE, "connect_timeout": HANG, "proxy": proxy.url, "ca_file": ca_file}


@pytest.fixture
def known(unknown: dict[str, Any], credentials_file: Path) -> dict[str, Any]:
    return unknown | {"proxy_credentials_file": credentials_file}


async def serves(tunnel: Tunnel, port: int, said: bytes) -> None:
    with no_hang():
        await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            for _ in range(3):
                async with (
                    await trio.open_tcp_stream("127.0.0.1", port) as visitor,
                    in_background(lambda: visitor.send_all(said)),  # it ends with the block
                ):
                    # No half-close: each of them closes both directions when one ends.
                    assert await read_exactly(visitor, len(said)) == said


async def test_websocket(known: dict[str, Any]) -> None:
    place = f"127.0.0.1:{free_port()}"
    async with relay_rig(control_addr=place, public_names=[place]) as rig:
        relay = f"ws://{place}"
        async with open_tunnel(relay, **known) as tunnel:
            await serves(tunnel, rig.addresses.ingress.port, request())


async def test_a_connection_for_each_visitor(known: dict[str, Any]) -> None:
    async with (
        open_pioneer_relay(key=KEY) as relay,
        open_tunnel(
            str(relay.address),
            **known,
            transport="tcp",
        ) as tunnel,
    ):
        await serves(tunnel, relay.visitors.port, bytes(range(256)) * 4000)


async def test_without_credentials(proxy: RealProxy, unknown: dict[str, Any]) -> None:
    async with open_tunnel("ws://127.0.0.1:9", **unknown) as tunnel:
        await eventually(lambda: tunnel.status.state is State.FAILED)
        assert tunnel.status.error_kind is ErrorKind.RELAY_CONNECT_FAILED
        assert f"the proxy {proxy.url} wants credentials" in str(tunnel.status.message)


async def test_with_the_wrong_password(known: dict[str, Any], credentials_file: Path) -> None:
    credentials_file.write_text("user:other")
    async with open_tunnel("ws://127.0.0.1:9", **known) as tunnel:
        await eventually(lambda: tunnel.status.state is State.FAILED)
        assert "credentials" in str(tunnel.status.message)


async def test_a_relay_that_is_not_there(proxy: RealProxy, known: dict[str, Any]) -> None:
    relay = f"ws://127.0.0.1:{free_port()}"
    async with open_tunnel(relay, **known) as tunnel:
        await eventually(lambda: tunnel.status.state is State.FAILED)
        assert tunnel.status.message is not None
        assert proxy.url in tunnel.status.message
        assert "reach" in tunnel.status.message or "refuses the connection" in tunnel.status.message


async def test_a_name_that_the_proxy_does_not_resolve(proxy: RealProxy, known: dict[str, Any]) -> None:
    async with open_tunnel("ws://relay.invalid", **known) as tunnel:
        await eventually(lambda: tunnel.status.state is State.FAILED)
        assert proxy.url in str(tunnel.status.message)
        assert tunnel.status.error_kind is ErrorKind.RELAY_CONNECT_FAILED
