"""TLS at a relay: for gateways and visitors, how it ends, and certificates that cannot be used."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from rig import (
    HOST,
    RELAY_NAME,
    RelayRig,
    ask,
    connect,
    no_hang,
    read_all,
    read_exactly,
    relay_config,
    relay_rig,
    request,
)

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.relay.visitors import tls as visitors_tls
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, and a certificate of `RELAY_NAME` and `HOST`."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued = authority.issue_cert(RELAY_NAME, HOST)
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(folder / "relay.crt"), append=True)
    return folder


async def visit_with_tls(rig: RelayRig, certificates: Path, **changes: Any) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    return trio.SSLStream(await rig.visit(), context, server_hostname=HOST, **changes)


@pytest.mark.parametrize("control_tls", [True, False])
@pytest.mark.parametrize("ingress_tls", [True, False])
async def test_tls_for_gateways_or_visitors_or_both(
    engine: EngineName, certificates: Path, control_tls: bool, ingress_tls: bool
) -> None:
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": certificates}
    scheme = "wss" if control_tls else "ws"
    async with relay_rig(engine, **files, control_tls=control_tls, ingress_tls=ingress_tls) as rig:
        with no_hang():
            tunnel_options = {"relay": f"{scheme}://{RELAY_NAME}", "ca_file": certificates / "ca.pem"}
            async with rig.tunnel(**tunnel_options) as tunnel:
                await tunnel.wait_connected()
                visitor = await visit_with_tls(rig, certificates) if ingress_tls else await rig.visit()
                async with visitor:
                    asked = request(body=bytes(100_000))
                    await visitor.send_all(asked)
                    async with await tunnel.accept() as stream:
                        assert stream.tls is ingress_tls
                        assert await read_exactly(stream, len(asked)) == asked
                        await stream.send_all(b"the answer")
                    assert await read_exactly(visitor, 10) == b"the answer"


@asynccontextmanager
async def behind_tls(certificates: Path) -> AsyncIterator[tuple[trio.SSLStream[trio.SocketStream], TunnelStream]]:
    """A visitor over TLS that has sent its request, and its stream at the gateway."""
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": certificates}
    async with relay_rig(None, **files, control_tls=False) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
            visitor = await visit_with_tls(rig, certificates)
            await visitor.send_all(request())
            stream = await tunnel.accept()
            await read_exactly(stream, len(request()))
            yield visitor, stream
        await trio.aclose_forcefully(visitor)


async def test_a_whole_answer_over_tls_ends_with_a_close_notify(certificates: Path) -> None:
    """Without it a visitor cannot tell the answer from a truncated one; trio.SSLStream, curl and others require it."""
    async with behind_tls(certificates) as (visitor, stream):
        await stream.send_all(bytes(300_000))
        await stream.aclose()
        assert await read_all(visitor) == bytes(300_000)


async def test_a_broken_answer_over_tls_is_no_orderly_end(certificates: Path) -> None:
    async with behind_tls(certificates) as (visitor, stream):
        await stream.send_all(b"half of ")
        await read_exactly(visitor, 8)
        stream.reset()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()


async def test_a_visitor_over_tls_that_just_closes_has_ended(certificates: Path) -> None:
    """Many clients close TCP without a close_notify; that is no reset."""
    async with behind_tls(certificates) as (visitor, stream):
        await visitor.transport_stream.send_eof()
        assert await stream.receive_some() == b""


async def test_a_refusal_over_tls_comes_after_the_answers_before_it(certificates: Path) -> None:
    async with behind_tls(certificates) as (visitor, stream):
        await visitor.send_all(b"GET / HTTP/1.1\r\n\r\n")
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nthe answer"
        await stream.send_all(answer)
        told = await read_all(visitor)
        assert told.startswith(answer + b"HTTP/1.1 400 ")
        assert await stream.receive_some() == b""


async def test_a_later_upgrade_over_tls_gets_a_stream_of_its_own(certificates: Path) -> None:
    asked = request("Upgrade: websocket", "Connection: Upgrade")
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nthe answer"
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": certificates}
    async with relay_rig(None, **files, control_tls=False) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
            visitor = await visit_with_tls(rig, certificates)
            for said in (request(), asked, asked):
                await visitor.send_all(said)
                stream = await tunnel.accept()
                assert await read_exactly(stream, len(said)) == said
                await stream.send_all(answer)
                assert await read_exactly(visitor, len(answer)) == answer
        await trio.aclose_forcefully(visitor)


async def test_plain_text_where_tls_is_expected_is_just_closed(certificates: Path) -> None:
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": certificates}
    async with relay_rig(None, **files) as rig, await rig.visit() as visitor:
        with no_hang():
            try:
                answer = await ask(visitor, request())
            except trio.BrokenResourceError:
                answer = b""
        assert not answer.startswith(b"HTTP")


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02"])
@pytest.mark.parametrize("listener", ["control", "ingress"])
async def test_a_tls_handshake_that_does_not_come_to_its_end_is_let_go(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, listener: str, said: bytes
) -> None:
    monkeypatch.setattr(visitors_tls, "HANDSHAKE_TIMEOUT", 0.1)
    monkeypatch.setattr(visitors_tls, "HELLO_TIMEOUT", 0.1)
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": certificates}
    async with relay_rig(None, **files) as rig, await connect(getattr(rig.addresses, listener)) as visitor:
        if said:
            await visitor.send_all(said)
        with no_hang(), suppress(trio.BrokenResourceError):
            assert await read_all(visitor) == b""


@pytest.mark.parametrize(
    ("certificate", "key"), [("missing.crt", "relay.key"), ("relay.key", "relay.key"), ("relay.crt", "ca.pem")]
)
def test_a_certificate_that_cannot_be_used_is_named(certificates: Path, certificate: str, key: str) -> None:
    config = relay_config(tls_certificate=certificate, tls_private_key=key, base_dir=certificates)
    with pytest.raises(InvalidSettingsError, match=certificate):
        Relay(config)
