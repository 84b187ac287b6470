"""Each transport through a proxy that alone knows the relay's name, and what the status says when the proxy fails."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from proxies import PASSWORD, USER, ProxyRig, open_proxy, saying
from resolving import resolving
from rig import (
    AT_ONCE,
    HANG,
    KEY,
    RELAY_NAME,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_rig,
    request,
)

from pioneer_tunnel import (
    Address,
    ErrorKind,
    InvalidSettingsError,
    Proxy,
    ProxyCredentials,
    State,
    Status,
    StorageError,
    Tunnel,
    open_tunnel,
)
from pioneer_tunnel.testing import open_pioneer_relay

WANTS: Final = (USER, PASSWORD)
ACCOUNT: Final = ("user", "s3cret")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


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


def server_tls(ca: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)
    return context


def tunnel_options(transport: str, **changes: Any) -> dict[str, Any]:
    relay = f"ws://{RELAY_NAME}" if transport == "websocket" else f"{RELAY_NAME}:2333"
    options = {"relay": relay, "transport": transport, "key": KEY, "restart": AT_ONCE, "connect_timeout": HANG}
    return options | changes


@asynccontextmanager
async def proxied(
    transport: str, scheme: str, ca: trustme.CA, ca_file: Path, **changes: Any
) -> AsyncIterator[tuple[ProxyRig, Tunnel, Address]]:
    """A tunnel through a proxy of this kind; the address is the relay's, for visitors."""
    tls = server_tls(ca, "127.0.0.1") if scheme == "https" else None
    options = tunnel_options(transport, ca_file=ca_file, **changes)
    if transport == "websocket":
        async with (
            relay_rig() as rig,
            open_proxy({(RELAY_NAME, 80): rig.addresses.control}, wants=WANTS, tls=tls) as proxy,
            open_tunnel(proxy=f"{scheme}://{proxy.address}", **options) as tunnel,
        ):
            yield proxy, tunnel, rig.addresses.ingress
        return
    relay_tls = server_tls(ca, RELAY_NAME) if transport == "tls" else None
    async with open_pioneer_relay(key=KEY, tls=relay_tls) as relay:
        place = Address(relay.address.host, relay.address.port)
        async with (
            open_proxy({(RELAY_NAME, 2333): place}, wants=WANTS, tls=tls) as proxy,
            open_tunnel(proxy=f"{scheme}://{proxy.address}", **options) as tunnel,
        ):
            yield proxy, tunnel, relay.visitors


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
@pytest.mark.parametrize("transport", ["websocket", "tcp", "tls"])
async def test_visitors_come_through_a_proxy(
    transport: str, scheme: str, ca: trustme.CA, ca_file: Path, credentials_file: Path
) -> None:
    """The relay's name resolves nowhere but at the proxy."""
    with nothing_left_behind(), no_hang():
        async with proxied(transport, scheme, ca, ca_file, proxy_credentials_file=credentials_file) as (
            proxy,
            tunnel,
            visitors,
        ):
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
                said = request() if transport == "websocket" else b"hello"
                for _ in range(3):
                    async with await trio.open_tcp_stream("127.0.0.1", visitors.port) as stream:
                        await stream.send_all(said)
                        assert await read_exactly(stream, len(said)) == said
                        if scheme != "https":  # the TLS of this proxy has no half-close
                            await stream.send_eof()
                            assert await read_all(stream) == b""
            assert set(proxy.asked) == {(RELAY_NAME, 80 if transport == "websocket" else 2333)}
            if transport != "websocket":
                assert len(proxy.asked) > 3, "each data channel goes through the proxy"


async def failure(**changes: Any) -> Status:
    """The first failure that the status of a tunnel reports."""
    transport = changes.pop("transport", "websocket")
    async with open_tunnel(**tunnel_options(transport, **changes)) as tunnel:
        with no_hang():
            async for status in tunnel.watch():
                if status.state is State.FAILED:
                    return status
    raise AssertionError


@pytest.mark.parametrize("transport", ["websocket", "tcp", "tls"])
async def test_the_status_names_the_proxy_that_fails(transport: str) -> None:
    async with open_proxy({}) as proxy:
        status = await failure(transport=transport, proxy=f"http://{proxy.address}")
        assert status.error_kind is ErrorKind.RELAY_CONNECT_FAILED
        assert status.message is not None
        assert status.message.startswith(f"the proxy http://{proxy.address} refuses {RELAY_NAME}:")


async def test_credentials_that_are_not_accepted_are_tried_seldom(credentials_file: Path) -> None:
    """Many directories lock an account after a few attempts with a wrong password."""
    async with open_proxy({}, wants=("user", "other")) as proxy:
        options = tunnel_options("websocket", proxy=f"http://{proxy.address}", restart=None)
        async with open_tunnel(**options, proxy_credentials_file=credentials_file, wall_clock=lambda: 1000) as tunnel:
            await eventually(lambda: tunnel.status.state is State.FAILED)
            assert tunnel.status.message is not None
            assert "does not accept the credentials" in tunnel.status.message
            assert PASSWORD not in tunnel.status.message
            assert tunnel.status.retry_at_unix is not None
            assert tunnel.status.retry_at_unix >= 1000 + 24, "restart_max, less jitter"


async def test_a_proxy_that_is_busy_says_when_to_retry() -> None:
    async with saying(b"HTTP/1.1 503 Busy\r\nRetry-After: 200\r\n\r\n") as address:
        status = await failure(proxy=f"http://{address}", wall_clock=lambda: 1000)
        assert status.retry_at_unix is not None
        assert status.retry_at_unix >= 1000 + 160


async def test_new_credentials_are_read_for_each_attempt(credentials_file: Path) -> None:
    credentials_file.write_text("user:wrong")
    async with relay_rig() as rig, open_proxy({(RELAY_NAME, 80): rig.addresses.control}, wants=WANTS) as proxy:
        options = tunnel_options("websocket", proxy=f"http://{proxy.address}")
        async with open_tunnel(**options, proxy_credentials_file=credentials_file) as tunnel:
            await eventually(lambda: tunnel.status.state is State.FAILED)
            credentials_file.write_text(f"{USER}:{PASSWORD}")
            tunnel.retry_now()
            with no_hang():
                await tunnel.wait_connected()
            credentials_file.write_text("")  # half written
            await rig.stop()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            assert tunnel.status.error_kind is ErrorKind.RELAY_CONNECT_FAILED, "the last good ones stay in use"


async def test_a_file_of_credentials_that_cannot_be_used_is_final(credentials_file: Path) -> None:
    credentials_file.chmod(0o644)
    options = tunnel_options("websocket", proxy="http://127.0.0.1:9", proxy_credentials_file=credentials_file)
    async with open_tunnel(**options) as tunnel:
        with no_hang(), pytest.raises(StorageError, match="chmod 600"):
            await tunnel.wait_connected()


async def test_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        relay_rig() as rig,
        open_proxy({(RELAY_NAME, 80): rig.addresses.control}, wants=("user", "s3cret")) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:s3cret@{proxy.address}")
        caplog.set_level(logging.DEBUG)
        async with open_tunnel(**tunnel_options("websocket")) as tunnel:
            for _ in range(2):
                with no_hang():
                    await tunnel.wait_connected()
                await rig.stop()
                await eventually(lambda: tunnel.status.state is State.RECONNECTING)
                await rig.start()
                proxy.names[RELAY_NAME, 80] = rig.addresses.control
        assert proxy.asked
        told = [line for line in caplog.messages if "HTTPS_PROXY" in line]
        assert len(told) == 1
        assert f"ws://{RELAY_NAME} is dialled through the proxy http://{proxy.address}, which" in told[0]
        assert "s3cret" not in caplog.text
        # Each of these dials the relay itself, whose name does not resolve here.
        for changes in ({"proxy": "none"}, {"NO_PROXY": "relay.test"}):
            monkeypatch.setenv("NO_PROXY", changes.pop("NO_PROXY", ""))
            with resolving("127.0.0.1") as resolver:
                await failure(connect_timeout=0.05, **changes)
            assert resolver.asked[0] == RELAY_NAME


async def test_a_dialer_of_the_hosts_own_is_not_led_to_the_proxy_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test")
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
    dialled: list[tuple[str, int]] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        dialled.append((host, port))
        raise OSError("no network")

    await failure(dial=dial, proxy="socks5://proxy.test:1081")
    assert set(dialled) == {("proxy.test", 1081)}


async def test_what_cannot_be_used_is_refused_before_anything_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, told in (
        ({"proxy": "http://user:hunter2@proxy.test"}, r"proxy: .*'http://…@proxy\.test' holds credentials"),
        ({"proxy": "gopher://proxy.test"}, "proxy: .*another scheme"),
        ({"proxy_credentials_file": "x"}, "proxy_credentials_file: "),
        ({"proxy": "none", "proxy_credentials_file": "x"}, "proxy_credentials_file: "),
        ({"HTTPS_PROXY": "gopher://user:hunter2@proxy.test"}, "the environment variable HTTPS_PROXY: "),
    ):
        monkeypatch.setenv("HTTPS_PROXY", changes.pop("HTTPS_PROXY", ""))
        with pytest.raises(InvalidSettingsError, match=told) as caught:
            async with open_tunnel(**tunnel_options("websocket", **changes)):
                pass
        assert "hunter2" not in str(caught.value)


async def test_a_program_may_pass_credentials_as_a_value() -> None:
    async with relay_rig() as rig, open_proxy({(RELAY_NAME, 80): rig.addresses.control}, wants=WANTS) as proxy:
        value = Proxy("socks5", proxy.address.host, proxy.address.port, ProxyCredentials(USER, PASSWORD))
        async with open_tunnel(**tunnel_options("websocket", proxy=value)) as tunnel:
            with no_hang():
                await tunnel.wait_connected()


@pytest.mark.parametrize("transport", ["websocket", "tcp"])
async def test_a_link_is_lost_with_the_proxy(
    transport: str, ca: trustme.CA, ca_file: Path, credentials_file: Path
) -> None:
    async with proxied(transport, "http", ca, ca_file, proxy_credentials_file=credentials_file) as (proxy, tunnel, _):
        with no_hang():
            await tunnel.wait_connected()
        proxy.cut()
        await eventually(lambda: State.RECONNECTING in [status.state for status in tunnel.history])
        with no_hang():
            await tunnel.wait_connected()


async def test_a_session_ends_when_the_credentials_have_changed(
    ca: trustme.CA, ca_file: Path, credentials_file: Path
) -> None:
    """Each visitor is a new connection through the proxy. Old credentials are tried once, then the file is read."""
    async with proxied("tcp", "socks5", ca, ca_file, proxy_credentials_file=credentials_file) as (
        proxy,
        tunnel,
        visitors,
    ):
        with no_hang():
            await tunnel.wait_connected()
        proxy.wants = ACCOUNT
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            async with await trio.open_tcp_stream("127.0.0.1", visitors.port):  # which makes the relay ask for one more
                await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            assert any("does not accept the credentials" in (status.message or "") for status in tunnel.history)
            credentials_file.write_text(":".join(ACCOUNT))
            tunnel.retry_now()
            with no_hang():
                await tunnel.wait_connected()
