"""`TlsStream` against records that carry no data: they cost a bounded amount of work and memory."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from rig import HOST, RELAY_NAME, in_background, no_hang, read_exactly, relay_rig, until_it_raises, upload
from tls_records import (
    ALERT,
    CLIENT_HELLO,
    DATA,
    HANDSHAKE,
    KEY_UPDATE_SIZE,
    Handshake,
    Tls12Records,
    Tls13Records,
    secrets_of,
)

from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.visitor_tls import terminate_tls

CA: Final = trustme.CA()
NAME: Final = "site.test"


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    issued = CA.issue_cert(NAME, HOST, RELAY_NAME)
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(tmp_path / "tls.crt"), append=True)
    return Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


def server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(NAME).configure_cert(context)
    context.num_tickets = 0  # the tickets would be the first records
    return context


async def hostile_client(
    stream: trio.abc.Stream, folder: Path, name: str = NAME, *, old: bool = False
) -> tuple[Handshake, Any]:
    """Make a handshake, and return it with what makes the client's further records."""
    context = client_context()
    context.keylog_filename = str(folder / "keys")
    if old:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AES128+AESGCM")
    handshake = Handshake(stream, context, server_hostname=name)
    await handshake.run()
    secrets = secrets_of(folder / "keys")
    if old:
        # A record's header has 5 bytes, a message's 4, and then comes the version.
        randoms = (handshake.sent[11:43], handshake.received[11:43])
        return handshake, Tls12Records(secrets["CLIENT_RANDOM"], *randoms)
    return handshake, Tls13Records(secrets["CLIENT_TRAFFIC_SECRET_0"], _cipher(handshake))


def _cipher(handshake: Handshake) -> str:
    cipher = handshake.tls.cipher()
    assert cipher is not None
    return cipher[0]


@asynccontextmanager
async def hostile_end(
    folder: Path, certificate: Certificate, *, hostile_server: bool = False, old: bool = False, pair: Any = None
) -> AsyncIterator[tuple[TlsStream, Handshake, Any, trio.abc.Stream]]:
    """A `TlsStream`, what the other end made its handshake with, what makes its records, and its side of the wire."""
    ours, theirs = (pair or trio.testing.memory_stream_pair)()
    async with trio.open_nursery() as nursery:
        if hostile_server:
            context = server_context()
            context.keylog_filename = str(folder / "keys")
            secured = TlsStream(ours, client_context(), server_hostname=NAME)
            nursery.start_soon(secured.do_handshake)
            handshake = Handshake(theirs, context)
            await handshake.run()
            records: Any = Tls13Records(secrets_of(folder / "keys")["SERVER_TRAFFIC_SECRET_0"], _cipher(handshake))
        else:
            secured = TlsStream(ours, await certificate.context(), server_side=True, https=True)
            nursery.start_soon(secured.do_handshake)
            handshake, records = await hostile_client(theirs, folder, old=old)
    yield secured, handshake, records, theirs
    await trio.aclose_forcefully(ours)


async def replies_to(secured: TlsStream, wire: trio.testing.MemoryReceiveStream) -> int:
    """How many bytes `secured` sent until it was closed."""
    await trio.aclose_forcefully(secured.transport_stream)
    received = 0
    while data := await wire.receive_some():
        received += len(data)
    return received


# Floods


@pytest.mark.parametrize("hostile_server", [True, False])
@pytest.mark.parametrize("requested", [True, False])
async def test_a_flood_of_key_updates_breaks_the_connection(
    tmp_path: Path, certificate: Certificate, requested: bool, hostile_server: bool
) -> None:
    async with hostile_end(tmp_path, certificate, hostile_server=hostile_server) as (secured, _, records, wire):
        if not hostile_server:
            await wire.receive_some()  # the server's session tickets
        updates = [records.key_update(requested=requested) for _ in range(5000)]
        await wire.send_all(b"".join(updates))
        with pytest.raises(trio.BrokenResourceError, match="without data"):
            await secured.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="without data"):
            await secured.receive_some()
        assert await replies_to(secured, wire) <= 40 * KEY_UPDATE_SIZE * requested  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content"),
    [(DATA, b""), (ALERT, b"\x01\x5a"), (HANDSHAKE, CLIENT_HELLO), (HANDSHAKE, bytes(4))],
    ids=["empty records", "warnings", "attempts to renegotiate", "hello requests"],
)
@pytest.mark.parametrize("old", [True, False], ids=["TLS 1.2", "TLS 1.3"])
async def test_a_flood_of_other_records_without_data_breaks_the_connection(
    tmp_path: Path, certificate: Certificate, old: bool, kind: int, content: bytes
) -> None:
    async with hostile_end(tmp_path, certificate, old=old) as (secured, _, records, wire):
        await wire.send_all(b"".join(records.record(content, kind) for _ in range(5000)))
        with pytest.raises(trio.BrokenResourceError):
            await secured.receive_some()
        assert await replies_to(secured, wire) < 4096  # type: ignore[arg-type]


async def test_data_makes_up_for_one_record_without(tmp_path: Path, certificate: Certificate) -> None:
    """Else one byte in between would let 32 more through each time."""
    async with hostile_end(tmp_path, certificate) as (secured, _, records, wire):
        for _ in range(30):
            await wire.send_all(records.key_update() + records.key_update() + records.record(b"x"))
        assert await read_exactly(secured, 30) == 30 * b"x"
        await wire.send_all(b"".join(records.key_update() for _ in range(3)))
        with pytest.raises(trio.BrokenResourceError, match="without data"):
            await secured.receive_some()


# Key updates that are none


async def test_key_updates_between_data_are_answered_while_nothing_is_sent(
    tmp_path: Path, certificate: Certificate
) -> None:
    async with hostile_end(tmp_path, certificate) as (secured, handshake, records, wire):
        await handshake.receive()  # session tickets
        before = len(handshake.received)
        await wire.send_all(b"".join(records.key_update() + records.record(b"x") for _ in range(1000)))
        received = 0
        while received < 1000:
            data = await secured.receive_some()
            assert len(data) <= 32, "one turn is bounded"
            received += len(data)
        async with in_background(secured.receive_some):
            while len(handshake.received) - before < 999 * KEY_UPDATE_SIZE:  # OpenSSL does not answer the first one
                await handshake.receive()
        await secured.send_all(b"and these are the keys")
        await handshake.receive()
        assert handshake.tls.read() == b"and these are the keys"


async def test_bulk_comes_in_large_pieces(tmp_path: Path, certificate: Certificate) -> None:
    async with hostile_end(tmp_path, certificate) as (secured, _, records, wire):
        sent = bytes(range(256)) * 512
        await wire.send_all(b"".join(records.record(sent[start : start + 16384]) for start in range(0, 131072, 16384)))
        pieces = [await secured.receive_some()]
        while sum(map(len, pieces)) < len(sent):
            pieces.append(await secured.receive_some())
        assert b"".join(pieces) == sent
        assert len(pieces) <= 3, "as much as was received at a time, and the rest"


async def test_replies_that_are_not_taken_hold_up_nobody_and_are_bounded(
    tmp_path: Path, certificate: Certificate, autojump_clock: trio.testing.MockClock
) -> None:
    taken = trio.Event()

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = trio.testing.memory_stream_pair()

        async def stop() -> None:
            if taken.is_set():
                await trio.sleep_forever()

        ours.send_stream.wait_send_all_might_not_block_hook = stop
        return ours, theirs

    async with hostile_end(tmp_path, certificate, pair=pair) as (secured, _, records, wire):
        taken.set()
        await wire.send_all(b"".join(records.key_update() + records.record(b"x") for _ in range(3000)))
        received = 0

        async def receive() -> None:
            nonlocal received
            received += len(await secured.receive_some())

        with trio.CancelScope() as once:
            once.cancel()
            await secured.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="does not take them"):
            await until_it_raises(receive)
        assert 64 * 1024 <= received * KEY_UPDATE_SIZE < 2 * 64 * 1024


# Where it is used


async def test_at_the_relay_a_flood_in_a_body_is_a_reset_and_others_are_served(
    tmp_path: Path, certificate: Certificate
) -> None:
    files: dict[str, Any] = {"tls_certificate": "tls.crt", "tls_private_key": "tls.key", "base_dir": tmp_path}
    async with relay_rig(control_tls=False, **files) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
            async with await rig.visit() as visitor:
                _, records = await hostile_client(visitor, tmp_path, HOST)
                await visitor.send_all(records.record(upload()))
                stream = await tunnel.accept()
                await read_exactly(stream, len(upload()))
                with pytest.raises(trio.BrokenResourceError):
                    await until_it_raises(lambda: visitor.send_all(records.key_update()))
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()


async def test_at_the_control_port_a_flood_ends_the_connection(tmp_path: Path, certificate: Certificate) -> None:
    files: dict[str, Any] = {"tls_certificate": "tls.crt", "tls_private_key": "tls.key", "base_dir": tmp_path}
    async with relay_rig(**files) as rig:
        with no_hang():
            async with await rig.dial(RELAY_NAME, 443) as gateway:
                _, records = await hostile_client(gateway, tmp_path, RELAY_NAME)
                with pytest.raises(trio.BrokenResourceError):
                    await until_it_raises(lambda: gateway.send_all(records.key_update()))


async def test_at_the_gateway_a_flood_is_a_reset(tmp_path: Path, certificate: Certificate) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    broken = trio.Event()

    class Carried:
        usable = True
        receive_some = ours.receive_some
        send_all = ours.send_all
        wait_send_all_might_not_block = ours.wait_send_all_might_not_block
        send_eof = ours.send_eof
        aclose = ours.aclose

        def acknowledge(self) -> None: ...

        def reset(self) -> None: ...

    async def handler(stream: TunnelStream) -> None:
        with pytest.raises(trio.BrokenResourceError, match="without data"):
            await stream.receive_some()
        broken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(terminate_tls(handler, certificate), TunnelStream(Carried()))
        _, records = await hostile_client(theirs, tmp_path)
        await theirs.send_all(b"".join(records.key_update() for _ in range(100)))
        await broken.wait()
