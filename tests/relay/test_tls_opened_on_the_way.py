"""A proxy that opens TLS between a gateway and its relay is noticed by the relay's certificate."""

from __future__ import annotations

import functools
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from rig import HOST, RELAY_NAME, RelayRig, connect, eventually, no_hang, relay_rig

from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel._net.dialing import Dialer
from pioneer_tunnel._net.tls.certificate import Certificate, certificate_hash
from pioneer_tunnel._net.tls.client import client_tls

CA: Final = trustme.CA()
"""Trusted by the gateway: the relay's authority, and that of a company that opens TLS."""


def write(folder: Path, issued: trustme.LeafCert) -> None:
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    (folder / "relay.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    write(tmp_path, CA.issue_cert(RELAY_NAME, HOST))
    (tmp_path / "identity").write_text("11" * 32)
    (tmp_path / "identity").chmod(0o600)
    return tmp_path


PINNED: Final = SigningIdentity.from_seed(bytes.fromhex("11" * 32)).public_key


@asynccontextmanager
async def tls_relay(folder: Path, **changes: Any) -> AsyncIterator[RelayRig]:
    files: dict[str, Any] = {
        "tls_certificate": "relay.crt",
        "tls_private_key": "relay.key",
        "identity_key_file": "identity",
        "base_dir": folder,
    }
    async with relay_rig(**(files | changes)) as rig:
        yield rig


@asynccontextmanager
async def opening_proxy(rig: RelayRig, folder: Path) -> AsyncIterator[Dialer]:
    """Ends the TLS of gateways with a certificate of its own, and speaks TLS to the relay."""
    issued = CA.issue_cert(RELAY_NAME)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issued.configure_cert(context)

    async def carry(connected: trio.SocketStream) -> None:
        ours = trio.SSLStream(connected, context, server_side=True, https_compatible=True)
        theirs = trio.SSLStream(
            await connect(rig.addresses.control),
            client_tls(folder / "ca.pem"),
            server_hostname=RELAY_NAME,
            https_compatible=True,
        )

        async def move(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            try:
                while data := await source.receive_some():
                    await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(move, ours, theirs)
            nursery.start_soon(move, theirs, ours)
        for stream in (ours, theirs):
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, carry, 0, host="127.0.0.1"))
        at = listeners[0].socket.getsockname()[1]

        async def dial(host: str, port: int) -> trio.SocketStream:
            return await trio.open_tcp_stream("127.0.0.1", at)

        yield dial
        nursery.cancel_scope.cancel()


def tunnel(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"relay": f"wss://{RELAY_NAME}", "ca_file": folder / "ca.pem"} | changes


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
async def test_without_a_proxy_nothing_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, shared: bool, pinned: bool
) -> None:
    """Also at an address that gateways and visitors share, and after the certificate was renewed."""
    address = "127.0.0.1:0"
    options = tunnel(folder, relay_identity=PINNED if pinned else None)
    async with tls_relay(folder, **({"ingress_addr": address, "control_addr": address} if shared else {})) as rig:
        for renewed in (False, True):
            if renewed:
                write(folder, CA.issue_cert(RELAY_NAME, HOST))
                await trio.sleep(1.1)  # the relay checks its files every second
            with no_hang():
                async with rig.tunnel(**options) as opened:
                    await opened.wait_connected()
    assert "opens TLS" not in caplog.text
    assert "opened on the way" not in caplog.text


async def test_a_proxy_that_opens_tls_is_told_of_at_both_ends(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with tls_relay(folder) as rig, opening_proxy(rig, folder) as dial:
        with no_hang():
            async with rig.tunnel(**tunnel(folder, dial=dial)) as opened:
                await opened.wait_connected()
    assert "opens TLS, such as a proxy of this network" in caplog.text
    assert "tunnel office: its gateway sees another certificate" in caplog.text


async def test_a_gateway_that_pins_the_relay_refuses_it(folder: Path) -> None:
    async with (
        tls_relay(folder) as rig,
        opening_proxy(rig, folder) as dial,
        rig.tunnel(**tunnel(folder, dial=dial, relay_identity=PINNED)) as opened,
    ):
        await eventually(lambda: "opens TLS" in (opened.status.message or ""))
        assert "relay_identity" in str(opened.status.message)
        assert opened.public_url is None


async def test_a_relay_behind_such_a_proxy_of_its_own_does_not_announce_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with tls_relay(folder, announce_certificate=False) as rig, opening_proxy(rig, folder) as dial:
        with no_hang():
            async with rig.tunnel(**tunnel(folder, dial=dial, relay_identity=PINNED)) as opened:
                await opened.wait_connected()
    assert "opens TLS" not in caplog.text


def test_the_hash_is_that_of_the_first_certificate(tmp_path: Path) -> None:
    issued = CA.issue_cert(RELAY_NAME)
    write(tmp_path, issued)
    text = (tmp_path / "relay.crt").read_bytes() + CA.cert_pem.bytes()
    (tmp_path / "relay.crt").write_bytes(b"a comment\n" + text)
    context = Certificate(tmp_path / "relay.crt", tmp_path / "relay.key")._context
    leaf = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())
    assert certificate_hash(context) == hashlib.sha256(leaf).digest()
    assert certificate_hash(ssl.create_default_context()) is None
