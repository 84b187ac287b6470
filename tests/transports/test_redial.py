"""`redial`: what an attempt learns from those before it."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import pytest
import trio
import trustme
from resolving import resolving
from rig import AT_ONCE, HANG, KEY, RELAY_NAME, RelayRig, connect, eventually, no_hang, nothing_left_behind, relay_rig

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import InvalidSettingsError, RelayConnectError
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.dialing import dial_relay, dial_tcp, first_to_connect
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.testing import ScriptedPioneerRelay, open_pioneer_relay
from pioneer_tunnel.transports.process.config import ProbeUrl
from pioneer_tunnel.transports.process.http_probe import ask_for_status
from pioneer_tunnel.transports.redial import Redial
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

BAD, GOOD, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
CA: Final = trustme.CA()
RELAY: Final = RelayAddress.parse(f"wss://{RELAY_NAME}")


@final
class BadServer:
    """Accepts, and does not do what a relay does.

    Attributes:
        port: its port.
        connections: how many it has accepted.
    """

    def __init__(self, behaviour: str) -> None:
        self.port = 0
        self.connections = 0
        self._behaviour = behaviour

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream:
            if self._behaviour != "closes at once":
                try:
                    await stream.receive_some()
                    if self._behaviour == "another protocol":
                        await stream.send_all(b"SSH-2.0-what\r\n")
                    elif self._behaviour == "silent":
                        await trio.sleep_forever()
                except trio.BrokenResourceError:
                    pass


@asynccontextmanager
async def bad_server(behaviour: str) -> AsyncIterator[BadServer]:
    server = BadServer(behaviour)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host=BAD)
        server.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()


def server_tls(*names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


@asynccontextmanager
async def tunnel_to_the_good_one(transport: str, port: int, ca_file: Path) -> AsyncIterator[Tunnel]:
    """A tunnel to a relay at `GOOD`, by a name."""
    bare = f"{RELAY_NAME}:{port}"
    settings: dict[str, Any] = {"key": KEY, "restart": AT_ONCE, "connect_timeout": 1.0, "ca_file": ca_file}
    if transport in {"ws", "wss"}:
        files: dict[str, Any] = {}
        if transport == "wss":
            issued = CA.issue_cert(RELAY_NAME)
            issued.cert_chain_pems[0].write_to_path(str(ca_file.parent / "relay.crt"))
            issued.private_key_pem.write_to_path(str(ca_file.parent / "relay.key"))
            files = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": ca_file.parent}
        changes: dict[str, Any] = {
            "control_addr": f"{GOOD}:{port}",
            "public_names": [bare],
            "control_tls": transport == "wss",
        }
        async with (
            relay_rig(**changes, ingress_tls=False, **files),
            open_tunnel(f"{transport}://{bare}", **settings) as tunnel,
        ):
            yield tunnel
    else:
        relay = ScriptedPioneerRelay(key=KEY, tls=server_tls(RELAY_NAME) if transport == "tls" else None)
        relay.address = Address(GOOD, port)
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            async with open_tunnel(bare, transport=transport, **settings) as tunnel:
                yield tunnel
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("behaviour", ["silent", "closes at once", "closes later", "another protocol"])
@pytest.mark.parametrize("transport", ["ws", "wss", "tcp", "tls"])
async def test_after_a_failure_above_tcp_the_next_address_comes_first(
    transport: str, behaviour: str, ca_file: Path
) -> None:
    async with bad_server(behaviour) as bad, tunnel_to_the_good_one(transport, bad.port, ca_file) as tunnel:
        with resolving(BAD, GOOD), no_hang():
            await tunnel.wait_connected()
            assert bad.connections >= 1, "it was tried, or this tests nothing"


async def test_a_probe_asks_the_next_address_too() -> None:
    async with bad_server("silent") as bad, trio.open_nursery() as nursery:

        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")

        listeners = await trio.open_tcp_listeners(bad.port, host=GOOD)
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        url, redial = ProbeUrl.parse(f"http://site.test:{bad.port}/"), Redial()

        async def ask(timeout: float) -> int | str:
            return await ask_for_status(
                url, dial=dial_tcp, make_tls=ssl.create_default_context, timeout=timeout, redial=redial
            )

        with resolving(BAD, GOOD):
            assert "did not answer" in str(await ask(1))
            assert await ask(HANG) == 204
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def relay_with_tls(ca_file: Path) -> AsyncIterator[RelayRig]:
    issued = CA.issue_cert(RELAY_NAME)
    issued.private_key_and_cert_chain_pem.write_to_path(str(ca_file.parent / "relay.pem"))
    files: dict[str, Any] = {"tls_certificate": "relay.pem", "tls_private_key": "relay.pem", "base_dir": ca_file.parent}
    async with relay_rig(**files, control_tls=True, ingress_tls=False) as rig:
        yield rig


async def dial_again(rig: RelayRig, redial: Redial, make_tls: Callable[[], ssl.SSLContext]) -> bool:
    """Connect, hear something and lose the connection; whether it has resumed the TLS session of the one before."""
    tls = await redial.tls(make_tls, RELAY, timeout=HANG)
    stream, watched = await dial_relay(RELAY, dial=rig.dial, tls=tls, timeout=HANG, resumption=redial.resumption)
    assert isinstance(stream, TlsStream)
    await stream.send_all(b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n")
    assert await stream.receive_some()
    reused = stream.session_reused
    assert len(stream.peer_certificates) >= 1
    await abandon(watched)
    await trio.aclose_forcefully(stream)
    return reused


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_redial_resumes_the_session_of_tls(ca_file: Path, version: ssl.TLSVersion) -> None:
    def make_tls() -> ssl.SSLContext:
        context = client_tls(ca_file)
        context.minimum_version = context.maximum_version = version
        return context

    async with relay_with_tls(ca_file) as rig:
        redial = Redial()
        with no_hang():
            assert [await dial_again(rig, redial, make_tls) for _ in range(4)] == [False, True, True, True]
            await rig.stop()
            await rig.start()  # with other keys for tickets
            assert [await dial_again(rig, redial, make_tls) for _ in range(3)] == [False, True, True]
            assert not await dial_again(rig, Redial(), make_tls), "another tunnel has its own"


async def test_a_session_of_tls_is_not_resumed_after_what_is_trusted_has_changed(ca_file: Path) -> None:
    make_tls = partial(client_tls, ca_file)
    async with relay_with_tls(ca_file) as rig:
        redial = Redial()
        with no_hang():
            assert [await dial_again(rig, redial, make_tls) for _ in range(2)] == [False, True]
            with ca_file.open("ab") as file:
                file.write(trustme.CA().cert_pem.bytes())
            assert [await dial_again(rig, redial, make_tls) for _ in range(2)] == [False, True]
            trustme.CA().cert_pem.write_to_path(str(ca_file))
            with pytest.raises(RelayConnectError, match="not trusted"):
                await dial_again(rig, redial, make_tls)


@asynccontextmanager
async def listening(*hosts: str) -> AsyncIterator[int]:
    """Listeners at one port of each of `hosts`; they accept by themselves, as the kernel does."""
    listeners = await trio.open_tcp_listeners(0, host=hosts[0])
    port: int = listeners[0].socket.getsockname()[1]
    for host in hosts[1:]:
        listeners += await trio.open_tcp_listeners(port, host=host)
    yield port
    for listener in listeners:
        await listener.aclose()


async def reached(dial: Any, port: int) -> str:
    async with await dial("relay.test", port) as stream:
        return str(stream.socket.getpeername()[0])


async def test_addresses_take_turns_until_one_works() -> None:
    redial = Redial()
    dial = redial.dialer(dial_tcp, timeout=HANG)
    async with listening(BAD, GOOD, THIRD) as port:
        with resolving(BAD, GOOD, THIRD):
            assert [await reached(dial, port) for _ in range(5)] == [BAD, GOOD, THIRD, BAD, GOOD]
            redial.note_up()
            assert [await reached(dial, port) for _ in range(2)] == [GOOD, THIRD], "that one works"
            redial.note_up()
            assert await reached(dial, port) == THIRD
        with resolving("127.0.0.4"), pytest.raises(OSError, match="all attempts"):
            await dial("relay.test", port)


async def test_links_go_to_different_addresses_of_one_name() -> None:
    one = Redial()
    other = Redial(one)
    third = Redial(other)
    async with listening(BAD, GOOD) as port:
        with resolving(BAD, GOOD):
            assert await reached(one.dialer(dial_tcp, timeout=HANG), port) == BAD
            one.note_up()
            assert await reached(other.dialer(dial_tcp, timeout=HANG), port) == GOOD
            other.note_up()
            assert await reached(third.dialer(dial_tcp, timeout=HANG), port) == BAD, "both are in use"
            assert sorted(one.addresses) == sorted(third.addresses) == [BAD, BAD, GOOD]
            one.note_down()
            third.note_down()
            assert await reached(other.dialer(dial_tcp, timeout=HANG), port) == BAD


async def test_an_address_that_is_tried_is_better_than_none() -> None:
    redial = Redial()
    dial = redial.dialer(dial_tcp, timeout=HANG)
    async with listening(BAD) as port:
        with resolving(BAD, GOOD):
            assert [await reached(dial, port) for _ in range(3)] == [BAD] * 3


async def test_the_first_to_connect_leaves_no_other_behind() -> None:
    async with listening(BAD, GOOD, THIRD) as port:
        with nothing_left_behind():
            stream = await first_to_connect([THIRD, BAD, GOOD], port, [0, 0, 0])
            await stream.aclose()
            with trio.CancelScope() as scope:
                scope.cancel()
                await first_to_connect([THIRD, BAD, GOOD], port, [0, 0, 0])
    with pytest.raises(OSError, match="no address"):
        await first_to_connect([BAD, GOOD], port, [60, 60])


async def test_a_dialer_of_the_hosts_own_chooses_by_itself() -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError

    assert Redial().dialer(dial, timeout=1) is dial


# Files that are read again


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: Final[dict[str, Callable[[Path], object]]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "partial": truncate,
    "something else": lambda file: file.write_bytes(b"what is this?"),
    "a folder": make_folder,
}


@asynccontextmanager
async def relay_and_tunnel(transport: str, ca_file: Path) -> AsyncIterator[tuple[Tunnel, Any]]:
    """A tunnel over TLS, and what cuts its link."""
    settings: dict[str, Any] = {"key": KEY, "restart": AT_ONCE, "ca_file": ca_file}
    if transport == "tls":
        async with open_pioneer_relay(key=KEY, tls=server_tls(RELAY_NAME)) as relay:

            async def dial(host: str, port: int) -> trio.SocketStream:
                return await connect(relay.address)

            async def cut() -> None:
                relay.drop_gateway()

            async with open_tunnel(f"{RELAY_NAME}:1", transport="tls", dial=dial, **settings) as tunnel:
                yield tunnel, cut
    else:
        issued = CA.issue_cert(RELAY_NAME)
        issued.cert_chain_pems[0].write_to_path(str(ca_file.parent / "relay.crt"))
        issued.private_key_pem.write_to_path(str(ca_file.parent / "relay.key"))
        files: dict[str, Any] = {
            "tls_certificate": "relay.crt",
            "tls_private_key": "relay.key",
            "base_dir": ca_file.parent,
        }
        async with relay_rig(**files, control_tls=True, ingress_tls=False) as rig:

            async def cut() -> None:
                await rig.stop()
                await rig.start()

            async with rig.tunnel(relay=f"wss://{RELAY_NAME}", **settings) as tunnel:
                yield tunnel, cut


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("transport", ["websocket", "tls"])
async def test_a_file_that_is_damaged_at_a_reconnect_does_not_end_the_tunnel(
    transport: str, damage: str, ca_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with relay_and_tunnel(transport, ca_file) as (tunnel, cut):
        with no_hang():
            await tunnel.wait_connected()
            DAMAGES[damage](ca_file)
            await cut()
            await eventually_connected(tunnel, times=2)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED, State.RECONNECTING}
        assert f"{str(ca_file)!r} cannot be used" in caplog.text


async def eventually_connected(tunnel: Tunnel, *, times: int) -> None:
    """Wait until the tunnel has come up so often."""
    async for _ in tunnel.watch():
        attempts = {status.attempt for status in tunnel.history if status.state is State.CONNECTED}
        if len(attempts) >= times:
            return


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("transport", ["websocket", "tls"])
async def test_before_the_first_connect_it_is_final(transport: str, damage: str, ca_file: Path) -> None:
    DAMAGES[damage](ca_file)
    async with relay_and_tunnel(transport, ca_file) as (tunnel, _):
        with no_hang(), pytest.raises(InvalidSettingsError, match="cannot be used"):
            await tunnel.accept()


async def test_before_the_first_connect_a_context_that_was_good_does_not_stand_in() -> None:
    redial, contexts = Redial(), iter([ssl.create_default_context()])

    def make() -> ssl.SSLContext:
        for context in contexts:
            return context
        raise InvalidSettingsError("it is not there")

    good = await redial.tls(make, RELAY, timeout=HANG)
    with pytest.raises(InvalidSettingsError):
        await redial.tls(make, RELAY, timeout=HANG)
    redial.note_up()
    assert await redial.tls(make, RELAY, timeout=HANG) is good


async def test_a_file_that_hangs_is_waited_for_in_one_thread(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A FIFO, or a network file system that is away."""
    os.mkfifo(tmp_path / "fifo")
    threads: list[int] = []

    def make() -> ssl.SSLContext:
        threads.append(threading.get_ident())
        (tmp_path / "fifo").read_bytes()
        return ssl.create_default_context()

    redial = Redial()
    try:
        for _ in range(3):
            with pytest.raises(RelayConnectError, match=r"wss://relay\.test could not be read within 0\.1 seconds"):
                await redial.tls(make, RELAY, timeout=0.1)
        await eventually(lambda: threads)
        assert len(threads) == 1
        redial._context._value = good = ssl.create_default_context()
        redial.note_up()
        assert await redial.tls(make, RELAY, timeout=HANG) is good
    finally:
        (tmp_path / "fifo").write_bytes(b"")
    await eventually(lambda: not redial._context._making)
    assert await redial.tls(ssl.create_default_context, RELAY, timeout=HANG) is not good


# Paths that drop large packets


def segment_of(stream: trio.abc.Stream) -> int:
    assert isinstance(stream, trio.SocketStream)
    return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


@pytest.mark.skipif(not hasattr(socket, "TCP_MAXSEG"), reason="this system has no such limit")
async def test_packets_become_smaller_when_links_are_lost() -> None:
    redial = Redial()
    dial = redial.dialer(dial_tcp, timeout=HANG)
    (listener,) = await trio.open_tcp_listeners(0, host=GOOD)
    async with listener:

        async def next_segment() -> int:
            async with await dial(RELAY_NAME, listener.socket.getsockname()[1]) as stream:
                redial.note_up()
                return segment_of(stream)

        with resolving(GOOD):
            sizes = [await next_segment()]
            for stuck in (False, False, True, True):
                redial.note_lost(stuck=stuck)
                sizes.append(await next_segment())
    assert sizes[0] > 1220
    assert [size <= limit for size, limit in zip(sizes[1:], (1220, 1220, 536, 536), strict=True)] == [True] * 4
    assert sizes[2] > 536


@pytest.mark.skipif(not hasattr(socket, "TCP_MAXSEG"), reason="this system has no such limit")
async def test_packets_become_smaller_when_an_opening_fails() -> None:
    """The relay's certificates are the first large packets."""
    redial = Redial()
    dial = redial.dialer(dial_tcp, timeout=HANG)
    (listener,) = await trio.open_tcp_listeners(0, host=GOOD)
    async with listener:
        sizes = []
        with resolving(GOOD):
            for _ in range(2):
                async with await dial(RELAY_NAME, listener.socket.getsockname()[1]) as stream:
                    sizes.append(segment_of(stream))
    assert sizes[1] <= 1220 < sizes[0]
