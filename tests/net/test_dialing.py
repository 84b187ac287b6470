"""`dialer`: whatever goes wrong on the way to an address leaves as an error that names it."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing
import trustme
from rig import HANG, free_port, nothing_left_behind, run_until_it_waits

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import LocalGatewayError, RelayConnectError, RelayResolveError
from pioneer_tunnel._net.adopted import Watched
from pioneer_tunnel._net.dialing import dial_local, dial_relay, dial_tcp
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel._net.tls.stream import TlsStream

RELAY = RelayAddress.parse("wss://relay.test:8443")


def raising(error: Exception) -> Callable[[str, int], NoReturn]:
    async def dial(host: str, port: int) -> NoReturn:
        raise error

    return dial  # type: ignore[return-value]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_dial_tcp_takes_addresses_and_names(host: str) -> None:
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1" if host == "localhost" else host)
    except OSError:
        pytest.skip(f"{host} is not there")
    async with listener:
        port = listener.socket.getsockname()[1]
        async with await dial_tcp(host, port) as stream, await listener.accept() as accepted:
            await stream.send_all(b"x")
            assert await accepted.receive_some() == b"x"
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_dial_tcp_leaves_no_socket_behind_when_it_fails() -> None:
    port = free_port()
    with nothing_left_behind():
        with pytest.raises(ConnectionRefusedError):
            await dial_tcp("127.0.0.1", port)
        with trio.CancelScope() as scope:
            scope.cancel()
            await dial_tcp("127.0.0.1", port)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (socket.gaierror(-2, "Name or service not known"), RelayResolveError, "'relay.test' does not resolve: Name or"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), RelayConnectError, "relay.test:8443: Connection refused"),
        (OSError(errno.ENETUNREACH, "x"), RelayConnectError, "Network is unreachable"),
        (OSError("no number"), RelayConnectError, "no number"),
    ],
)
async def test_a_relay_that_cannot_be_dialled(error: OSError, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        await dial_relay(RELAY, dial=raising(error), tls=None, timeout=1)  # type: ignore[arg-type]


async def test_of_several_attempts_the_last_is_told() -> None:
    port = free_port()
    address = RelayAddress.parse(f"ws://localhost:{port}")
    with pytest.raises(RelayConnectError, match=f"localhost:{port}: Connection refused"):
        await dial_relay(address, dial=dial_tcp, tls=None, timeout=HANG)


async def test_a_local_gateway_that_is_not_there() -> None:
    port = free_port()
    with pytest.raises(LocalGatewayError, match=f"127.0.0.1:{port} does not answer: Connection refused"):
        await dial_local(Address("127.0.0.1", port), dial=dial_tcp, timeout=HANG)


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no such limit")
async def test_a_local_gateway_that_does_not_read_is_sent_little() -> None:
    """The system took 4 MB for it, which a last word then had to wait for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address(*listener.getsockname())
        async with await dial_local(address, dial=dial_tcp, timeout=HANG) as stream:
            assert isinstance(stream, TcpStream)
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 256 * 1024
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            with trio.CancelScope() as scope:
                scope.cancel()
                await dial_local(address, dial=dial_tcp, timeout=HANG)
            assert scope.cancelled_caught


async def test_a_local_gateway_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(LocalGatewayError, match="within 3 seconds"):
        await dial_local(Address("127.0.0.1", 1), dial=dial, timeout=3)
    assert trio.current_time() == 3


async def test_tls_is_watched_from_below(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("relay.test").configure_cert(server)
    ours, theirs = trio.testing.memory_stream_pair()
    peer = trio.SSLStream(theirs, server, server_side=True)

    async def dial(host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("relay.test", 8443)
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.do_handshake)
        stream, watched = await dial_relay(RELAY, dial=dial, tls=client_tls(tmp_path / "ca.pem"), timeout=HANG)
    assert isinstance(stream, TlsStream)
    assert isinstance(watched, Watched)
    assert stream.transport_stream is watched
    assert peer.selected_alpn_protocol() is None


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_tls_handshake_that_comes_to_nothing_closes_the_connection(cancelled: bool) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        return ours

    if cancelled:
        await run_until_it_waits(lambda: dial_relay(RELAY, dial=dial, tls=client_tls(), timeout=HANG))
    else:
        await theirs.send_all(b"SSH-2.0-what\r\n")
        with pytest.raises(RelayConnectError, match="does it speak TLS at all"):
            await dial_relay(RELAY, dial=dial, tls=client_tls(), timeout=HANG)
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()
