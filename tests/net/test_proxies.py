"""Which proxy leads to a relay, and the handshakes with one: without I/O, over memory, and on loopback."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from proxies import PASSWORD, USER, in_pieces, open_proxy, saying
from resolving import resolving
from rig import HANG, free_port, nothing_left_behind

from pioneer_tunnel import Address, InvalidSettingsError, Proxy, ProxyCredentials, RelayAddress
from pioneer_tunnel._model.errors import RelayConnectError, RelayResolveError, StorageError
from pioneer_tunnel._net.dialing import dial_relay, dial_tcp
from pioneer_tunnel._net.proxies.choice import ChosenProxy, ProxyChoice, no_proxy_matches
from pioneer_tunnel._net.proxies.credentials_file import read_credentials
from pioneer_tunnel._net.proxies.entering import Via
from pioneer_tunnel._net.proxies.handshake import Handshake, ProxyRefusal
from pioneer_tunnel._net.proxies.http_connect import HttpConnect
from pioneer_tunnel._net.proxies.socks5 import Socks5
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel._net.tls.client import client_tls

RELAY: Final = RelayAddress.parse("ws://relay.test")
CREDENTIALS: Final = ProxyCredentials(USER, PASSWORD)

# Which proxy


def chosen(host: str, /, **environment: str) -> str | None:
    found = ProxyChoice(environment=environment).proxy_for(host, 443)
    return None if found is None else f"{found.variable} {found.proxy}"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://a"}, "HTTPS_PROXY http://a:80"),
        ({"HTTPS_PROXY": "http://a", "https_proxy": "http://b"}, "https_proxy http://b:80"),
        ({"HTTPS_PROXY": "http://a", "https_proxy": " "}, "HTTPS_PROXY http://a:80"),
        ({"ALL_PROXY": "socks5://a"}, "ALL_PROXY socks5://a:1080"),
        ({"ALL_PROXY": "socks5://a", "HTTPS_PROXY": "b:3128"}, "HTTPS_PROXY http://b:3128"),
        ({"all_proxy": "socks5h://a", "HTTPS_PROXY": ""}, "all_proxy socks5://a:1080"),
        ({"HTTP_PROXY": "http://a", "http_proxy": "http://a"}, None),
        ({"HTTPS_PROXY": "http://a", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://a", "NO_PROXY": "relay.test"}, None),
        ({"HTTPS_PROXY": "http://a", "no_proxy": "other.test", "NO_PROXY": "*"}, "HTTPS_PROXY http://a:80"),
    ],
)
def test_the_environment_names_a_proxy(environment: Mapping[str, str], expected: str | None) -> None:
    assert chosen("relay.test", **environment) == expected


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_relay_on_loopback_has_no_proxy_of_the_environment(host: str) -> None:
    assert chosen(host, HTTPS_PROXY="http://a") is None
    configured = ProxyChoice(configured=Proxy.parse("http://b")).proxy_for(host, 1)
    assert configured == ChosenProxy(Proxy.parse("http://b"))


def test_a_configured_proxy_wins_over_the_environment() -> None:
    environment = {"HTTPS_PROXY": "http://a", "NO_PROXY": "*"}
    choice = ProxyChoice(configured=Proxy.parse("http://b"), environment=environment)
    assert choice.proxy_for("relay.test", 443) == ChosenProxy(Proxy.parse("http://b"))
    assert ProxyChoice(configured="none", environment={"HTTPS_PROXY": "http://a"}).proxy_for("relay.test", 443) is None


def test_the_environment_may_hold_credentials_and_errors_do_not_show_them() -> None:
    found = ProxyChoice(environment={"HTTPS_PROXY": "http://user:secret@a"}).proxy_for("relay.test", 443)
    assert found is not None
    assert found.proxy.credentials == ProxyCredentials("user", "secret")
    assert "secret" not in repr(found)
    with pytest.raises(InvalidSettingsError, match=r'HTTPS_PROXY: .*another scheme.*"none"') as caught:
        chosen("relay.test", HTTPS_PROXY="socks4://user:secret@a")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "host", "port", "expected"),
    [
        ("relay.test", "relay.test", 443, True),
        ("Relay.Test", "relay.test", 443, True),
        ("relay.test.", "relay.test", 443, True),
        ("test", "relay.test", 443, True),
        (".test", "relay.test", 443, True),
        ("*.test", "relay.test", 443, True),
        (".relay.test", "relay.test", 443, True),
        ("elay.test", "relay.test", 443, False),
        ("my.relay.test", "relay.test", 443, False),
        ("*", "relay.test", 443, True),
        ("a,*", "10.0.0.1", 443, True),
        ("a, relay.test\tb", "relay.test", 443, True),
        ("a relay.test", "relay.test", 443, True),
        ("relay.test:443", "relay.test", 443, True),
        ("relay.test:444", "relay.test", 443, False),
        (".test:443", "relay.test", 443, True),
        ("relay.test:99999", "relay.test", 443, False),
        ("10.0.0.1", "10.0.0.1", 443, True),
        ("10.0.0.1:443", "10.0.0.1", 443, True),
        ("10.0.0.1:444", "10.0.0.1", 443, False),
        ("10.0.0.10", "10.0.0.1", 443, False),
        (".0.0.1", "10.0.0.1", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.1.2.3/8", "10.9.9.9", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.0.0.0/33", "10.1.2.3", 443, False),
        ("10.0.0.0/8", "relay.test", 443, False),
        ("2001:db8::1", "2001:db8::1", 443, True),
        ("2001:DB8:0::1", "2001:db8::1", 443, True),
        ("[2001:db8::1]", "2001:db8::1", 443, True),
        ("[2001:db8::1]:443", "2001:db8::1", 443, True),
        ("[2001:db8::1]:444", "2001:db8::1", 443, False),
        ("2001:db8::/32", "2001:db8::1", 443, True),
        ("2001:db8::/32", "10.0.0.1", 443, False),
        ("", "relay.test", 443, False),
        (", ,", "relay.test", 443, False),
        (".", "relay.test", 443, False),
        ("[", "relay.test", 443, False),
        ("[]", "2001:db8::1", 443, False),
        ("[]", "relay.test", 443, False),
        (":443", "relay.test", 443, False),
    ],
)
def test_no_proxy(entries: str, host: str, port: int, expected: bool) -> None:
    assert no_proxy_matches(entries, host, port) is expected


@given(st.text(st.sampled_from("ab.:*/[]0123%, \t"), max_size=30), st.sampled_from(["a.b", "10.0.0.1", "::1"]))
def test_any_no_proxy_has_an_answer(entries: str, host: str) -> None:
    assert no_proxy_matches(entries, host, 443) in {True, False}
    assert no_proxy_matches(f"{entries} {host}", host, 443) is True


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"user:pass:word\n", 0o600, None),
        (b"user:pass:word\r\n", 0o400, None),
        (b"user:hunter2\n", 0o640, "chmod 600"),
        (b"hunter2\n", 0o600, "one line, user:password"),
        (b"user:hunter2\nuser:hunter2\n", 0o600, "control character"),
        (b"user:hunter2\xff\n", 0o600, "not UTF-8"),
        (b"user:" + b"hunter2" * 1000, 0o600, "larger than"),
        (None, 0, "does not exist"),
    ],
)
def test_the_file_of_credentials(content: bytes | None, mode: int, told: str | None, tmp_path: Path) -> None:
    file = tmp_path / "proxy-credentials"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    if told is None:
        assert read_credentials(file) == ProxyCredentials("user", "pass:word")
        return
    with pytest.raises(StorageError, match=told) as caught:
        read_credentials(file)
    assert str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


# Without I/O


def talk(handshake: Handshake, pieces: list[bytes]) -> bytes:
    """What it sends in answer to `pieces`."""
    return b"".join([handshake.receive(piece) for piece in pieces if piece])


def test_connect_names_the_relay_and_no_other_header_than_it_needs() -> None:
    hello = HttpConnect("relay.test", 2333, None).hello
    lines = hello.decode().split("\r\n")
    assert lines[0] == "CONNECT relay.test:2333 HTTP/1.1"
    assert lines[1] == "Host: relay.test:2333"
    assert lines[2].startswith("User-Agent: pioneer-tunnel/")
    assert lines[3:] == ["", ""]
    assert HttpConnect("2001:db8::1", 443, None).hello.startswith(b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n")


def test_basic_authentication_is_that_of_the_rfc() -> None:
    """RFC 7617, 2 and 2.1: the second has a pound sign, as UTF-8."""
    for user, password, token in (
        ("Aladdin", "open sesame", b"QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
        ("test", "123£", b"dGVzdDoxMjPCow=="),
    ):
        hello = HttpConnect("relay.test", 443, ProxyCredentials(user, password)).hello
        assert b"\r\nProxy-Authorization: Basic " + token + b"\r\n" in hello


ANSWERS: Final = [
    b"HTTP/1.1 200 Connection established\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nVia: 1.0 proxy\r\n\r\n",
    b"HTTP/1.1 200\r\n\r\n",
    b"HTTP/1.1 299 Odd\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 \xff\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
]


@pytest.mark.parametrize("answer", ANSWERS)
@given(cuts=st.lists(st.integers(0, 100)), surplus=st.sampled_from([b"", b"\0early\r\n"]))
def test_an_answer_counts_the_same_in_any_pieces(answer: bytes, cuts: list[int], surplus: bytes) -> None:
    handshake = HttpConnect("relay.test", 443, None)
    pieces = in_pieces(answer + surplus, cuts)
    surplus_seen = b""
    for piece in pieces:
        if handshake.done:
            surplus_seen += piece
        else:
            assert handshake.receive(piece) == b""
    assert handshake.done
    assert handshake.surplus + surplus_seen == surplus


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("403 Forbidden", "refuses relay.test:2333 with HTTP status 403 'Forbidden': its rules forbid"),
        ("405 Not Allowed", "is it a proxy at all"),
        ("502 Bad Gateway", "it cannot reach the relay"),
        ("503 Busy", "it is busy"),
        ("504 Gateway Timeout", "it cannot reach the relay"),
        ("302 Found", "captive portal"),
        ("418 \x07\x1b[2Jteapot", "HTTP status 418 '.2Jteapot'"),
        ("418 Teapot", "its operator knows why"),
    ],
)
def test_refusals_say_what_to_do(answer: str, told: str) -> None:
    with pytest.raises(ProxyRefusal, match=told) as caught:
        HttpConnect("relay.test", 2333, None).receive(f"HTTP/1.1 {answer}\r\n\r\n".encode())
    assert caught.value.retry_after is None
    assert str(caught.value).isprintable()


def test_a_busy_proxy_says_when() -> None:
    with pytest.raises(ProxyRefusal) as caught:
        HttpConnect("relay.test", 2333, None).receive(b"HTTP/1.1 503 Busy\r\nRetry-After: 17\r\n\r\n")
    assert caught.value.retry_after == 17


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (b"\5\0", "socks5://"),
        (b"\x15\3\1\0\2\2\x28", "https://"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "does not answer as an HTTP proxy"),
        (b"220 mail.example ESMTP\r\n\r\n", "does not answer as an HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 4000, "does not answer as an HTTP proxy"),
        (b"HTTP/1.1 200 " + b"x" * 20_000, "does not answer as an HTTP proxy"),
    ],
)
def test_what_is_no_http_proxy(first: bytes, told: str) -> None:
    with pytest.raises(ProxyRefusal, match=told):
        HttpConnect("relay.test", 443, None).receive(first)


METHOD, NO_METHOD = b"\5\0", b"\5\xff"
ESTABLISHED: Final = [b"\5\0\0\1" + bytes(6), b"\5\0\0\4" + bytes(18), b"\5\0\0\3\0\0\0", b"\5\0\0\3\4name\0\1"]


@pytest.mark.parametrize("reply", ESTABLISHED)
@pytest.mark.parametrize("credentials", [None, CREDENTIALS])
@given(cuts=st.lists(st.integers(0, 40)), surplus=st.sampled_from([b"", b"\5early"]), asks=st.booleans())
def test_socks5_in_any_pieces(
    reply: bytes, credentials: ProxyCredentials | None, cuts: list[int], surplus: bytes, asks: bool
) -> None:
    handshake = Socks5("relay.test", 443, credentials)
    assert handshake.hello == (b"\5\1\0" if credentials is None else b"\5\2\0\2")
    asks = asks and credentials is not None
    said = (b"\5\2\1\0" if asks else METHOD) + reply
    sent, surplus_seen = b"", b""
    for piece in in_pieces(said + surplus, cuts):
        if handshake.done:
            surplus_seen += piece
        else:
            sent += handshake.receive(piece)
    user, password = USER.encode(), PASSWORD.encode()
    logs_in = b"\1" + bytes([len(user)]) + user + bytes([len(password)]) + password if asks else b""
    assert sent == logs_in + b"\5\1\0\3\x0arelay.test\1\xbb"
    assert handshake.done
    assert handshake.surplus + surplus_seen == surplus


def test_socks5_takes_addresses_as_they_are() -> None:
    assert Socks5("10.0.0.1", 80, None).receive(METHOD) == b"\5\1\0\1\x0a\0\0\1\0\x50"
    assert Socks5("::2", 80, None).receive(METHOD) == b"\5\1\0\4" + bytes(15) + b"\2\0\x50"


@pytest.mark.parametrize(
    ("credentials", "said", "told"),
    [
        (None, NO_METHOD, "wants credentials"),
        (None, b"\5\2", "wants credentials"),
        (CREDENTIALS, NO_METHOD, "takes neither"),
        (CREDENTIALS, b"\5\2\1\1", "does not accept the credentials"),
        (CREDENTIALS, b"\5\2\5\1", "does not accept the credentials"),
        (None, b"\5\1", "was not offered"),
        (None, METHOD + b"\5\1", "may not be able to resolve"),
        (None, METHOD + b"\5\2", "its rules forbid"),
        (None, METHOD + b"\5\4", r"cannot be reached from there \(reply 4\)"),
        (None, METHOD + b"\5\x63", "unknown reply 99"),
        (None, METHOD + b"\5\0\0\7\0", "does not answer as a SOCKS5 proxy"),
        (None, METHOD + b"\4", "does not answer as a SOCKS5 proxy"),
        (None, b"\4\x5a", "does not answer as a SOCKS5 proxy"),
        (None, b"HTTP/1.1 400 Bad Request", "http://"),
    ],
)
def test_socks5_refusals(credentials: ProxyCredentials | None, said: bytes, told: str) -> None:
    with pytest.raises(ProxyRefusal, match=told):
        Socks5("relay.test", 443, credentials).receive(said)


@pytest.mark.parametrize("kind", [HttpConnect, Socks5])
@settings(max_examples=examples(200))
@given(data=st.binary(min_size=1, max_size=300), begins=st.sampled_from([b"", b"HTTP/1.1 ", METHOD, b"\5\2\1\0\5\0\0"]))
def test_any_answer_is_taken_or_refused(kind: type[HttpConnect | Socks5], data: bytes, begins: bytes) -> None:
    handshake = kind("relay.test", 443, CREDENTIALS)
    whole = begins + data
    refusal: ProxyRefusal | None = None
    for position in range(len(whole)):
        if handshake.done or refusal is not None:
            break
        try:
            handshake.receive(whole[position : position + 1])
        except ProxyRefusal as error:
            refusal = error
    if refusal is not None:
        assert str(refusal).isprintable()
        assert PASSWORD not in str(refusal)


# On loopback


def via(address: Address, scheme: Any = "http", **changes: Any) -> Via:
    proxy = Proxy(scheme, address.host, address.port, changes.pop("credentials", None))
    return Via(ChosenProxy(proxy, changes.pop("variable", None)), **changes)


async def refused(through: Via, *, timeout: float = HANG) -> RelayConnectError:
    """Why there is no tunnel."""
    with resolving("203.0.113.1"), pytest.raises(RelayConnectError) as caught:
        await dial_relay(RELAY, dial=dial_tcp, tls=None, timeout=timeout, via=through)
    assert PASSWORD not in str(caught.value)
    assert len(str(caught.value)) <= 300, "a status shows 300 characters"
    assert str(through.proxy) in str(caught.value)
    return caught.value


@pytest.fixture(params=["http", "socks5"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("credentials", [None, CREDENTIALS])
async def test_a_tunnel_is_the_bare_stream_of_the_socket(scheme: str, credentials: ProxyCredentials | None) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    place = Address(*listener.socket.getsockname())
    wants = None if credentials is None else credentials.reveal()
    async with listener, open_proxy({("relay.test", 80): place}, wants=wants) as proxy:
        with resolving() as resolver:  # no name is resolved here, or this would hang
            stream, watched = await dial_relay(
                RELAY,
                dial=dial_tcp,
                tls=None,
                timeout=HANG,
                via=via(proxy.address, scheme, credentials=credentials),
            )
        assert resolver.asked == []
        assert proxy.asked == [("relay.test", 80)]
        assert stream is watched
        assert type(stream) is TcpStream
        async with stream, await listener.accept() as accepted:
            await stream.send_all(b"one")
            assert await accepted.receive_some() == b"one"
            await accepted.send_all(b"two")
            assert await stream.receive_some() == b"two"


async def test_a_proxy_that_wants_credentials(scheme: str) -> None:
    async with open_proxy({}, wants=("user", "other")) as proxy:
        error = await refused(via(proxy.address, scheme))
        assert "wants credentials" in str(error)
        assert "name it in proxy_credentials_file" in str(error)
        assert error.retry_slowly
        error = await refused(via(proxy.address, scheme, variable="HTTPS_PROXY"))
        assert f"write HTTPS_PROXY={scheme}://user:password@" in str(error)
        error = await refused(via(proxy.address, scheme, credentials=CREDENTIALS))
        assert "does not accept the credentials" in str(error)
        assert str(error).endswith("correct the user name or the password")
        assert error.retry_slowly


async def test_a_proxy_that_knows_other_forms_of_credentials_alone() -> None:
    answer = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n"
    async with saying(answer) as address:
        error = await refused(via(address))
    assert "'Negotiate, NTLM'; only Basic is" in str(error)
    assert "credentials_file" not in str(error)


async def test_a_proxy_that_cannot_reach_the_relay(scheme: str) -> None:
    async with open_proxy({}) as proxy:
        assert "annot" in str(await refused(via(proxy.address, scheme)))


@pytest.mark.parametrize(
    ("pieces", "then", "told"),
    [
        ([], trio.lowlevel.checkpoint, "closed the connection before there was a tunnel"),
        ([b"HTTP/1.1 200 O"], trio.lowlevel.checkpoint, "closed the connection before there was a tunnel"),
        ([b"HTTP/1.1 200 OK\r\n\r\nearly"], trio.sleep_forever, "sent bytes of its own"),
        ([b"HTTP/1.1 100 C\r\n\r\n" * 200] * 100, trio.sleep_forever, "answers with more than 65536 bytes"),
        ([b"HTTP/1.1 200 OK\r\nX: ", *[b"y" * 1000] * 30], trio.sleep_forever, "does not answer as an HTTP proxy"),
        ([b"HTTP/1.1 403 No\r\n\r\n"], trio.lowlevel.checkpoint, "its rules forbid"),
        ([b"\5\0"], trio.sleep_forever, "socks5://"),
    ],
)
async def test_odd_proxies(pieces: list[bytes], then: Callable[[], Any], told: str) -> None:
    with nothing_left_behind():
        async with saying(*pieces, then=then) as address:
            assert told in str(await refused(via(address)))


async def test_a_busy_proxy_is_left_alone_for_as_long_as_it_asks() -> None:
    async with saying(b"HTTP/1.1 503 Busy\r\nRetry-After: 40\r\n\r\n") as address:
        assert (await refused(via(address))).retry_after == 40


@pytest.mark.parametrize("pieces", [[], [b"H", b"T", b"T"]])
async def test_a_silent_or_slow_proxy(pieces: list[bytes], autojump_clock: trio.testing.MockClock) -> None:
    client, server = trio.testing.memory_stream_pair()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("proxy.test", 3128)
        return client

    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def dribble() -> None:
            for piece in pieces:
                await trio.sleep(2)
                await server.send_all(piece)

        with pytest.raises(
            RelayConnectError, match=r"proxy http://proxy\.test:3128 did not make a tunnel within 7 sec"
        ):
            await dial_relay(RELAY, dial=dial, tls=None, timeout=7, via=via(Address("proxy.test", 3128)))
        assert trio.current_time() == 7
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"x")


async def test_the_name_of_the_proxy_is_resolved_and_the_relays_is_not(
    scheme: str, autojump_clock: trio.testing.MockClock
) -> None:
    with resolving() as resolver, pytest.raises(RelayResolveError, match=r"the proxy's name 'proxy\.test' does not"):
        await dial_relay(RELAY, dial=dial_tcp, tls=None, timeout=5, via=via(Address("proxy.test", 3128), scheme))
    assert resolver.asked == ["proxy.test"]


async def test_a_proxy_that_is_not_there() -> None:
    address = Address("127.0.0.1", free_port())
    assert "cannot connect to the proxy http://127.0.0.1:" in str(await refused(via(address)))


# Inside TLS


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def server_tls(ca: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)
    return context


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = client_tls()
    ca.configure_trust(context)
    return context


async def test_tls_inside_tls(ca: trustme.CA) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    place = Address(*listener.socket.getsockname())
    address = RelayAddress.parse("wss://relay.test")
    async with (
        listener,
        open_proxy({("relay.test", 443): place}, tls=server_tls(ca, "127.0.0.1")) as proxy,
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def serve() -> None:
            async with trio.SSLStream(
                await listener.accept(), server_tls(ca, "relay.test"), server_side=True
            ) as stream:
                while data := await stream.receive_some():
                    await stream.send_all(data)

        through = via(proxy.address, "https", tls=trusting(ca))
        stream, watched = await dial_relay(address, dial=dial_tcp, tls=trusting(ca), timeout=HANG, via=through)
        assert type(watched) is TcpStream
        async with stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"


async def test_tls_with_the_proxy_fails(ca: trustme.CA) -> None:
    async with open_proxy({}, tls=server_tls(ca, "other.test")) as proxy:
        assert "for another name" in str(await refused(via(proxy.address, "https", tls=trusting(ca))))
        assert "is not trusted" in str(await refused(via(proxy.address, "https", tls=client_tls())))
        assert "is its URL right (http://, https://" in str(await refused(via(proxy.address, "http")))
    async with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        error = await refused(via(address, "https", tls=trusting(ca)))
    assert "A proxy without TLS has a http:// URL" in str(error)


async def test_a_proxy_that_opens_tls_is_named(ca: trustme.CA) -> None:
    """It shows a certificate of its own, which is not trusted unless its CA is."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    place = Address(*listener.socket.getsockname())
    address = RelayAddress.parse("wss://relay.test")
    async with listener, open_proxy({("relay.test", 443): place}) as proxy, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serve() -> None:
            stream = trio.SSLStream(await listener.accept(), server_tls(ca, "relay.test"), server_side=True)
            with pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()
            await trio.aclose_forcefully(stream)

        with pytest.raises(RelayConnectError, match=r"through the proxy http://127.* a proxy that opens TLS shows"):
            await dial_relay(address, dial=dial_tcp, tls=client_tls(), timeout=HANG, via=via(proxy.address))
