"""The native transport towards what is no relay, and TLS: what each failure is called."""

from __future__ import annotations

import re
import ssl
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
import trustme
from native_rig import UPGRADED, Attempt, Peer, assert_nothing_secret, relay, saying, silent
from rig import RELAY_NAME, eventually, read_until

from pioneer_tunnel._model.errors import (
    LinkLostError,
    RelayConnectError,
)
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel.transports.interface import Session
from pioneer_tunnel.websocket import EngineName, WebSocket
from pioneer_tunnel.yamux import YamuxConnection

# What is no relay


HTML: Final = b"<html><body>Please sign in</body></html>"


async def endless_page(stream: trio.abc.Stream) -> None:
    await read_until(stream, b"\r\n\r\n")
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
    while True:
        await stream.send_all(HTML)
        await trio.sleep(1)


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        pytest.param(
            saying(b"HTTP/1.1 302 Found\r\nLocation: http://portal.test/login\r\nContent-Length: 0\r\n\r\n"),
            "redirect.*'http://portal.test/login'.*captive portal",
            id="302",
        ),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(HTML) + HTML),
            "web page.*200.*captive portal",
            id="page",
        ),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\n\r\n" + HTML, hold=False), "web page.*captive portal", id="page to the end"
        ),
        pytest.param(endless_page, "web page.*captive portal", id="page without an end"),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n28\r\n" + HTML), "web page", id="chunked page"
        ),
        pytest.param(saying(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"), "status 401", id="401"),
        pytest.param(
            saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            "404; is this where .*control_addr",
            id="404",
        ),
        pytest.param(saying(b"SSH-2.0-OpenSSH_9.6\r\n"), "does not answer as a WebSocket", id="SSH"),
        pytest.param(saying(b"\x00\x01\x02garbage\xff" * 100), "does not answer as a WebSocket", id="garbage"),
        pytest.param(saying(b"\x15\x03\x01\x00\x02\x02\x46"), "does not answer as a WebSocket", id="TLS alert"),
        pytest.param(saying(b"", hold=False), "broke off|does not answer", id="end"),
        pytest.param(saying(UPGRADED + b"\r\n"), "does not answer as a WebSocket", id="101 without accept"),
        pytest.param(
            saying(UPGRADED + b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"),
            "does not answer as a WebSocket",
            id="101 with a wrong accept",
        ),
    ],
)
async def test_what_is_no_relay_is_told_so_and_gets_no_secret(
    engine: EngineName, autojump_clock: trio.testing.MockClock, peer: Peer, told: str
) -> None:
    attempt = Attempt(peer, engine)
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert re.search(told, str(error))
    assert error.retry_after is None
    assert attempt.session is None
    assert_nothing_secret(attempt.heard)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [(b"120", 120.0), (b"0", 0.0), (b"Fri, 31 Dec 1999 23:59:59 GMT", None), (b"-5", None), (b"9" * 40, None)],
)
async def test_retry_after_is_heeded(
    engine: EngineName, autojump_clock: trio.testing.MockClock, retry_after: bytes, seconds: float | None
) -> None:
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nretry-after: " + retry_after + b"\r\n\r\n"
    error = await Attempt(saying(answer), engine).run()
    assert "status 503" in str(error)
    assert error.retry_after == seconds


async def test_a_redirect_is_not_followed(engine: EngineName) -> None:
    dialled: list[tuple[str, int]] = []
    answer = b"HTTP/1.1 301 Moved Permanently\r\nLocation: ws://elsewhere.test/\r\n\r\n"

    async def dial(host: str, port: int) -> trio.abc.Stream:
        dialled.append((host, port))
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(answer)
        return ours

    await Attempt(silent, engine).run(dial=dial)
    assert dialled == [(RELAY_NAME, 80)]


async def test_a_websocket_that_is_no_relay_is_told_apart(engine: EngineName) -> None:
    async def chat(stream: trio.abc.Stream) -> None:
        request = await read_until(stream, b"\r\n\r\n")
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", request, re.IGNORECASE)
        assert key is not None
        from wsproto.utilities import generate_accept_token

        accept = generate_accept_token(key[1])
        await stream.send_all(UPGRADED + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        while await stream.receive_some():
            pass

    attempt = Attempt(chat, engine)
    error = await attempt.run()
    assert "not as a relay" in str(error)
    assert_nothing_secret(attempt.heard)


async def test_what_a_peer_says_is_quoted_clean(engine: EngineName) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://a\x1b[31m" + b"x" * 2000 + b"\r\n\r\n"
    error = await Attempt(saying(answer), engine).run()
    assert "\x1b" not in str(error)
    assert len(str(error)) < 1000


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def over_tls(peer: Peer, certificate: trustme.LeafCert) -> Peer:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)

    async def secured(stream: trio.abc.Stream) -> None:
        await peer(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return secured


async def test_wss_with_a_ca_file(engine: EngineName, authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def leave_when_up(websocket: WebSocket, connection: YamuxConnection) -> None:
        await eventually(lambda: attempt.session is not None)

    peer = over_tls(relay(leave_when_up), authority.issue_cert(RELAY_NAME))
    attempt = Attempt(peer, engine, f"wss://{RELAY_NAME}")
    error = await attempt.run(make_tls=partial(client_tls, tmp_path / "ca.pem"))
    assert isinstance(error, LinkLostError)
    assert attempt.session == Session(id="s-1", public_url="http://office.test")
    assert_nothing_secret(attempt.heard)


async def test_a_certificate_of_an_unknown_ca_is_refused(engine: EngineName, authority: trustme.CA) -> None:
    attempt = Attempt(over_tls(relay(), authority.issue_cert(RELAY_NAME)), engine, f"wss://{RELAY_NAME}")
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert re.search(r"not trusted .*self.signed.*ca_file|not trusted .*issuer.*ca_file", str(error))


async def test_a_certificate_of_another_name_is_refused(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    attempt = Attempt(over_tls(relay(), authority.issue_cert("other.test")), address=f"wss://{RELAY_NAME}")
    error = await attempt.run(make_tls=partial(client_tls, tmp_path / "ca.pem"))
    assert type(error) is RelayConnectError
    assert re.search(f"another name.*{RELAY_NAME}", str(error))


async def test_tls_towards_a_plain_port(engine: EngineName) -> None:
    async def plain(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    error = await Attempt(plain, engine, f"wss://{RELAY_NAME}").run()
    assert type(error) is RelayConnectError
    assert "does it speak TLS at all?" in str(error)


async def test_plain_towards_a_tls_port(engine: EngineName, authority: trustme.CA) -> None:
    attempt = Attempt(over_tls(relay(), authority.issue_cert(RELAY_NAME)), engine)
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert "wss://" in str(error)
    assert_nothing_secret(attempt.heard)


async def test_tls_that_ends_in_the_middle_of_its_handshake() -> None:
    async def vanish(stream: trio.abc.Stream) -> None:
        await stream.receive_some()

    error = await Attempt(vanish, address=f"wss://{RELAY_NAME}").run()
    assert type(error) is RelayConnectError
    assert "TLS" in str(error)
