"""HAProxy and nginx in front of a relay: the gateway learns who visits, whatever the visitor says."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from example_programs import running_program
from rig import HOST, RelayRig, eventually, free_port, in_background, no_hang, read_until, relay_rig, request

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

pytestmark = pytest.mark.slow

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")

VISITORS: Final = ["127.0.0.2", "127.0.0.3", "127.0.0.2"]
FORGED: Final = ["X-Forwarded-For: 198.51.100.66", "X_Forwarded_For: 198.51.100.66", "X-Forwarded-Proto: ws"]
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
CA: Final = trustme.CA()


@asynccontextmanager
async def serving(**changes: Any) -> AsyncIterator[tuple[RelayRig, list[TunnelStream]]]:
    """A relay, and the streams that its gateway has got and answers."""
    came: list[TunnelStream] = []

    async def answer(stream: TunnelStream) -> None:
        came.append(stream)
        async with stream:
            async for data in stream:
                await stream.send_all(OK * data.count(b"\r\n\r\n"))

    async with relay_rig(**changes) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(answer, [tunnel])):
                yield rig, came


async def visit(port: int, visitor: str, *, tls: bool = False) -> int:
    """Send a request from an address; returns the port that it came from."""
    connected = await trio.open_tcp_stream("127.0.0.1", port, local_address=visitor)
    stream: trio.abc.Stream = connected
    if tls:
        context = ssl.create_default_context()
        CA.configure_trust(context)
        stream = trio.SSLStream(connected, context, server_hostname=HOST, https_compatible=True)
    async with stream:
        own_port: int = connected.socket.getsockname()[1]
        await stream.send_all(request(*FORGED))
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        return own_port


@asynccontextmanager
async def in_front(*command: str | Path, port: int) -> AsyncIterator[None]:
    async with running_program(*command) as program:

        async def ready() -> bool:
            assert program.process.returncode is None, program.said
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                return False
            return True

        await eventually(ready)
        yield


HAPROXY_CFG: Final = """
defaults
    mode {mode}
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen visitors
    bind 127.0.0.1:{port} {bind}
    server relay 127.0.0.1:{relay} {server}
"""


@asynccontextmanager
async def haproxied(
    folder: Path, server: str, *, bind: str = "", mode: str = "tcp", **changes: Any
) -> AsyncIterator[tuple[int, list[TunnelStream]]]:
    """A relay behind HAProxy; yields the port of HAProxy."""
    port = free_port()
    async with serving(**changes) as (rig, came):
        relay = rig.addresses.ingress.port
        config = HAPROXY_CFG.format(mode=mode, port=port, bind=bind, relay=relay, server=server)
        (folder / "haproxy.cfg").write_text(config)
        async with in_front("haproxy", "-db", "-f", folder / "haproxy.cfg", port=port):
            yield port, came


BY_CONNECTION: Final[dict[str, Any]] = {"accept_proxy_from": ["127.0.0.1"]}


@needs_haproxy
@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl", "send-proxy check inter 100ms"])
async def test_haproxy_names_the_visitor_of_a_connection(server: str, tmp_path: Path) -> None:
    async with haproxied(tmp_path, server, **BY_CONNECTION) as (port, came):
        for visitor in VISITORS:
            own_port = await visit(port, visitor)
            assert came[-1].visitor == Address(visitor, own_port)
            assert came[-1].tls is (False if server.endswith("ssl") else None)


@needs_haproxy
async def test_haproxy_says_whether_it_has_ended_tls(tmp_path: Path) -> None:
    CA.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "haproxy.pem"))
    bind = f"ssl crt {tmp_path}/haproxy.pem"
    async with haproxied(tmp_path, "send-proxy-v2-ssl", bind=bind, **BY_CONNECTION) as (port, came):
        await visit(port, VISITORS[0], tls=True)
        assert came[-1].tls is True


@needs_haproxy
async def test_tls_that_haproxy_passes_on_ends_at_the_relay(tmp_path: Path) -> None:
    CA.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "relay.pem"))
    names = {"tls_certificate": "relay.pem", "tls_private_key": "relay.pem"}
    files: dict[str, Any] = {**names, "control_tls": False, "base_dir": tmp_path}
    async with haproxied(tmp_path, "send-proxy-v2-ssl", **BY_CONNECTION, **files) as (port, came):
        own_port = await visit(port, VISITORS[0], tls=True)
        assert came[-1].visitor == Address(VISITORS[0], own_port)
        assert came[-1].tls is True


@needs_haproxy
async def test_haproxy_names_the_visitor_of_each_request(tmp_path: Path) -> None:
    options = "\n    option forwardfor\n    http-request set-header X-Forwarded-Proto https\n    http-reuse always"
    changes: dict[str, Any] = {"bind": options, "mode": "http", "trust_forwarded_from": ["127.0.0.1"]}
    async with haproxied(tmp_path, "", **changes) as (port, came):
        for visitor in VISITORS:
            await visit(port, visitor)
    assert [stream.visitor for stream in came] == [Address(visitor, 0) for visitor in VISITORS]
    assert all(stream.tls for stream in came)


NGINX_CONF: Final = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream relay {{
        server 127.0.0.1:{relay};
        keepalive 1;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://relay;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
    }}
}}
"""


@needs_nginx
async def test_nginx_names_the_visitor_of_each_request(tmp_path: Path) -> None:
    port = free_port()
    async with serving(trust_forwarded_from=["127.0.0.1"]) as (rig, came):
        conf = NGINX_CONF.format(port=port, relay=rig.addresses.ingress.port)
        (tmp_path / "nginx.conf").write_text(conf)
        async with in_front("nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", "stderr", port=port):
            for visitor in VISITORS:
                await visit(port, visitor)
    assert [stream.visitor for stream in came] == [Address(visitor, 0) for visitor in VISITORS]
    assert not any(stream.tls for stream in came)
