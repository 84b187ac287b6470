"""`dialer`: whatever goes wrong on the way to an address leaves as an error that names it."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, final

import pytest
import trio
import trio.testing
import trustme
from resolving import resolving
from rig import HANG, KEY, free_port, nothing_left_behind, run_until_it_waits

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import LocalGatewayError, RelayConnectError, RelayResolveError
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.adopted import Watched
from pioneer_tunnel._net.dialing import ResolvingDialer, dial_local, dial_relay, dial_tcp, ip_address_of, resolve
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.relay.listeners import open_listeners
from pioneer_tunnel.tunnel.tunnel import open_tunnel

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


async def silent(host: str, port: int) -> trio.abc.Stream:
    await trio.sleep_forever()
    raise AssertionError


@final
class SilentNetwork(ResolvingDialer):
    """Names resolve, and no address answers."""

    async def connect(self, addresses: Sequence[str], port: int) -> trio.abc.Stream:
        assert addresses == ["192.0.2.1"]
        return await silent("192.0.2.1", port)


async def test_each_step_to_a_relay_has_a_deadline_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    with resolving(), pytest.raises(RelayResolveError, match=r"'relay.test' does not resolve: no name server.* 10 sec"):
        await dial_relay(RELAY, dial=SilentNetwork(), tls=None, timeout=10)
    assert trio.current_time() == 10
    with resolving("192.0.2.1", after=9), pytest.raises(RelayConnectError, match="did not answer within 10 seconds"):
        await dial_relay(RELAY, dial=SilentNetwork(), tls=None, timeout=10)
    assert trio.current_time() == 10 + 9 + 10
    with pytest.raises(RelayConnectError, match="did not answer within 10 seconds"):
        await dial_relay(RELAY, dial=silent, tls=None, timeout=10)
    assert trio.current_time() == 29 + 10


async def test_without_a_name_server_the_status_says_so(autojump_clock: trio.testing.MockClock) -> None:
    with resolving():
        async with open_tunnel("ws://relay.test", key=KEY) as tunnel:
            await trio.sleep(15)
            assert (tunnel.status.state, tunnel.status.error_kind) == (State.FAILED, ErrorKind.RELAY_RESOLVE_FAILED)
            assert "no name server answered within 10 seconds" in (tunnel.status.message or "")


async def test_a_local_gateway_whose_name_does_not_resolve(autojump_clock: trio.testing.MockClock) -> None:
    with resolving(), pytest.raises(LocalGatewayError, match=r"gateway\.test:1 .*not resolve: no name server.* 3 sec"):
        await dial_local(Address("gateway.test", 1), dial=dial_tcp, timeout=3)
    assert trio.current_time() == 3


async def test_a_relay_does_not_wait_forever_for_a_name_to_listen_at(autojump_clock: trio.testing.MockClock) -> None:
    with resolving(), pytest.raises(OSError, match=r"cannot listen at relay\.test:443: no name server"):
        await open_listeners(Address("relay.test", 443))


@pytest.mark.parametrize(
    ("found", "tried"),
    [
        (["192.0.2.1"], ["192.0.2.1"]),
        (["192.0.2.1", "192.0.2.1", "192.0.2.2"], ["192.0.2.1", "192.0.2.2"]),
        (["::1", "::2", "::3", "192.0.2.1", "::4"], ["::1", "192.0.2.1", "::2", "::3", "::4"]),
        (["192.0.2.1", "192.0.2.2", "::1"], ["192.0.2.1", "::1", "192.0.2.2"]),
    ],
)
async def test_the_second_attempt_uses_the_other_family(found: list[str], tried: list[str]) -> None:
    with resolving(*found):
        assert await resolve("relay.test") == tried


async def test_an_address_needs_no_resolver() -> None:
    with resolving("192.0.2.9"):
        assert await resolve("192.0.2.1") == ["192.0.2.1"]
        assert await resolve("fe80::1%2") == ["fe80::1%2"]
    assert ip_address_of(("fe80::1", 443, 0, 2)) == "fe80::1%2"


async def test_a_local_gateway_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(LocalGatewayError, match="within 3 seconds"):
        await dial_local(Address("127.0.0.1", 1), dial=silent, timeout=3)
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
