"""Each failure on the way to a relay, from its name to TLS, over real sockets, and what `diagnose` says of it."""

from __future__ import annotations

import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from diagnosis_rig import CA, Handler, listening, of, outcomes, page, relay_at, run, server_tls, silent
from resolving import resolving
from rig import RELAY_NAME, free_port, read_until

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel.diagnosis import certificates
from pioneer_tunnel.diagnosis.checks import Name, Outcome, exit_status

# Names and TCP


async def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    checks = await run("ws://relay.test")
    assert outcomes(checks) == "f" + "s" * 10
    assert of(checks, Name.NAMES).detail == "'relay.test' does not resolve: Name or service not known"
    assert of(checks, Name.PROOF).detail == "needs what failed above: names"
    assert exit_status(checks) == 10


async def test_a_resolver_that_does_not_answer() -> None:
    with resolving():
        checks = await run("ws://relay.test", connect_timeout_ms=100)
    assert "no name server answered within 0.1 seconds" in of(checks, Name.NAMES).detail


async def test_addresses_are_told_by_family() -> None:
    port = free_port()
    with resolving("127.0.0.1", "::1", "127.0.0.2"):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.NAMES).detail == "IPv4: 127.0.0.1, 127.0.0.2; IPv6: ::1"


async def test_a_port_that_refuses() -> None:
    checks = await run(f"ws://127.0.0.1:{free_port()}")
    assert outcomes(checks) == "of" + "s" * 9
    assert of(checks, Name.TCP).detail.endswith("127.0.0.1: Connection refused")
    assert "nothing listens at this port" in (of(checks, Name.TCP).cure or "")
    assert exit_status(checks) == 11


@pytest.mark.skipif(not Path("/proc/net").exists(), reason="elsewhere a full backlog refuses")
async def test_a_port_that_does_not_answer() -> None:
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (one, two):  # the backlog is full then, and the kernel drops what comes
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        await trio.sleep(0.05)
        checks = await run(f"ws://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_ms=300)
    assert of(checks, Name.TCP).detail.endswith(": 127.0.0.1: no answer")
    assert "a firewall" in (of(checks, Name.TCP).cure or "")


async def test_one_of_two_addresses_refuses() -> None:
    port = free_port()
    async with relay_at(port):
        with resolving("127.0.0.2", "127.0.0.1"):
            checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.TCP).outcome is Outcome.WARNING
    assert of(checks, Name.TCP).detail == "127.0.0.2: Connection refused; 127.0.0.1: connected"
    assert of(checks, Name.PROOF).outcome is Outcome.OK
    assert exit_status(checks) == 0


# The proxy


def proxy(answer: bytes | None = None) -> Handler:
    """An HTTP proxy that makes tunnels to ports of this host, or gives one answer to all."""

    async def handler(stream: trio.abc.Stream) -> None:
        head = await read_until(stream, b"\r\n\r\n")
        if answer is not None:
            await stream.send_all(answer)
            return
        port = int(head.split(b" ")[1].rpartition(b":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as relay, trio.open_nursery() as nursery:
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

            async def carry(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while data := await source.receive_some():
                        await sink.send_all(data)
                nursery.cancel_scope.cancel()

            nursery.start_soon(carry, stream, relay)
            nursery.start_soon(carry, relay, stream)

    return handler


async def test_through_a_proxy_nothing_of_the_relay_is_resolved_or_dialled_here() -> None:
    port = free_port()
    async with relay_at(port), listening(proxy()) as proxy_port:
        with resolving("127.0.0.2") as resolver:
            checks = await run(f"ws://{RELAY_NAME}:{port}", proxy=f"http://localhost:{proxy_port}")
            assert outcomes(checks)[0] == "o"
            assert exit_status(checks) == 11  # the proxy's name does not lead to it
            assert set(resolver.asked) == {"localhost"}
        checks = await run(f"ws://{RELAY_NAME}:{port}", proxy=f"http://127.0.0.1:{proxy_port}")
    assert outcomes(checks) == "ooo" + "ws" + "ooo" + "oo" + "s"
    assert of(checks, Name.PROXY).detail == f"the proxy http://127.0.0.1:{proxy_port} has made a tunnel"


async def test_a_proxy_that_wants_credentials() -> None:
    refusing = proxy(page("407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="x"'))
    async with listening(refusing) as port:
        checks = await run("wss://relay.test", proxy=f"http://127.0.0.1:{port}")
    assert outcomes(checks)[:4] == "oofs"
    assert "proxy_credentials_file" in of(checks, Name.PROXY).detail
    assert exit_status(checks) == 12


async def test_a_proxy_that_opens_tls_is_seen_through_the_proxy(ca_file: Path) -> None:
    intercepting = server_tls(trustme.CA(organization_name="Guard Inc.").issue_cert("localhost"))
    async with listening(silent, intercepting) as port, listening(proxy()) as proxy_port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file, proxy=f"http://127.0.0.1:{proxy_port}")
    assert f"through the proxy http://127.0.0.1:{proxy_port}" in of(checks, Name.TLS).detail
    assert of(checks, Name.INTERCEPTION).detail.endswith("was issued by 'Guard Inc.'")


async def test_a_proxy_of_the_environment_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "gopher://proxy.test:1")
    with pytest.raises(InvalidSettingsError, match="https_proxy"):
        await run("wss://relay.test", proxy=None)


# TLS


async def test_a_certificate_of_an_unknown_authority() -> None:
    async with listening(
        silent, server_tls(trustme.CA(organization_name="Guard Inc.").issue_cert("localhost"))
    ) as port:
        checks = await run(f"wss://localhost:{port}")
    assert outcomes(checks)[3:] == "fwssssss"
    assert "not trusted" in of(checks, Name.TLS).detail
    assert of(checks, Name.INTERCEPTION).detail.endswith("was issued by 'Guard Inc.'")
    assert exit_status(checks) == 13


async def test_a_certificate_that_has_expired(ca_file: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=2)
    expired = CA.issue_cert("localhost", not_before=past - timedelta(days=9), not_after=past)
    async with listening(silent, server_tls(expired)) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert "out of date" in of(checks, Name.TLS).detail
    clock = of(checks, Name.CLOCK)
    assert clock.outcome is Outcome.WARNING
    assert f"to {past:%Y-%m-%d}" in clock.detail


async def test_a_certificate_for_another_name(ca_file: Path) -> None:
    async with listening(silent, server_tls(CA.issue_cert("elsewhere.test"))) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert "for another name" in of(checks, Name.TLS).detail
    assert exit_status(checks) == 13


async def test_a_port_that_is_silent_in_tls() -> None:
    async with listening(silent) as port:
        checks = await run(f"wss://localhost:{port}", connect_timeout_ms=2000)
    assert of(checks, Name.TLS).detail == f"TLS with wss://localhost:{port} was not agreed on within 2 seconds"


async def test_tls_that_works_with_small_packets_alone(ca_file: Path) -> None:
    """The certificates of some relays fill several packets, and a path may drop all that are large."""
    context, seen = server_tls(CA.issue_cert("localhost")), 0

    async def large_packets_vanish(stream: trio.abc.Stream) -> None:
        nonlocal seen
        seen += 1
        assert isinstance(stream, trio.SocketStream)
        if stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > 1500:
            await trio.sleep_forever()
        tls = trio.SSLStream(stream, context, server_side=True)
        await tls.do_handshake()
        await trio.sleep_forever()

    async with listening(large_packets_vanish) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file, connect_timeout_ms=2000)
    assert "with packets of 1220 bytes it is, so larger ones get lost on the way" in of(checks, Name.TLS).detail
    assert seen == 2


async def test_plain_http_where_tls_is_dialled() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"wss://{RELAY_NAME}:{port}")
    assert "answers in plain HTTP" in of(checks, Name.TLS).detail


async def test_an_authority_that_was_added_to_this_host_is_told(
    ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = tmp_path / "added"
    added.mkdir()
    monkeypatch.setattr(certificates, "ADDED_AUTHORITIES", (tmp_path / "nowhere", added))
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    async with listening(silent, server_tls(CA.issue_cert("localhost"))) as port:
        options: dict[str, Any] = {"connect_timeout_ms": 2000}
        replaced = of(await run(f"wss://localhost:{port}", **options), Name.INTERCEPTION)
        ca_file.rename(added / "company.crt")
        monkeypatch.setenv("SSL_CERT_FILE", str(added / "company.crt"))
        told = of(await run(f"wss://localhost:{port}", **options), Name.INTERCEPTION)
    assert (replaced.outcome, replaced.detail.partition("; ")[2]) == (
        Outcome.OK,
        "the authorities that are trusted here come from SSL_CERT_FILE",
    )
    assert told.outcome is Outcome.WARNING
    assert told.detail.endswith(f"an authority that was added to this host: {added / 'company.crt'}")
