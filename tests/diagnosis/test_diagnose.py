"""Each failure at a relay, and of a gateway, provoked over real sockets, and what `diagnose` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from diagnosis_rig import CA, OTHER_KEY, answering, listening, of, outcomes, page, relay_at, run, server_tls, silent
from rig import KEY, RELAY_NAME, free_port, tunnel_entry

from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.diagnosis import native_link
from pioneer_tunnel.diagnosis.checks import Name, Outcome, exit_status
from pioneer_tunnel.testing import open_pioneer_relay
from pioneer_tunnel.tunnel.tunnel import open_tunnel
from pioneer_tunnel.websocket import EngineName

# Nothing is wrong


async def test_a_relay_without_tls_on_this_host(engine: EngineName) -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", engine=engine)
    assert outcomes(checks) == "oos" + "ss" + "ooo" + "oo" + "s"
    assert of(checks, Name.PROOF).detail == "the relay accepts the key; visitors come in at http://office.test"
    assert exit_status(checks) == 0


async def test_a_relay_with_tls_and_a_gateway(engine: EngineName, tmp_path: Path, ca_file: Path) -> None:
    port, local = free_port(), free_port()
    certificate = CA.issue_cert(RELAY_NAME)
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "chain.pem"))
    identity_file = tmp_path / "identity"
    identity_file.write_text("11" * 32)
    identity_file.chmod(0o600)
    identity = SigningIdentity.from_seed(bytes.fromhex("11" * 32)).public_key
    tls = {"tls_certificate": tmp_path / "chain.pem", "tls_private_key": tmp_path / "key.pem"}
    async with relay_at(port, **tls, identity_key_file=identity_file), trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, silent, local)
        checks = await run(
            f"wss://{RELAY_NAME}:{port}",
            engine=engine,
            ca_file=ca_file,
            relay_identity=identity,
            local_addr=f"127.0.0.1:{local}",
        )
        nursery.cancel_scope.cancel()
    assert outcomes(checks) == "oos" + "oo" + "ooo" + "oo" + "o"
    assert of(checks, Name.TLS).detail.startswith("TLSv1.3; the certificate is valid until 3000-01-01")
    assert of(checks, Name.INTERCEPTION).detail == (
        "issued by 'Relays of the tests', an authority of the configured CA file"
    )
    assert of(checks, Name.PROOF).detail.startswith("the relay accepts the key, and has the pinned identity")


async def test_a_running_gateway_keeps_its_tunnel(engine: EngineName) -> None:
    port = free_port()
    async with relay_at(port), open_tunnel(f"ws://{RELAY_NAME}:{port}", key=KEY) as tunnel:
        await tunnel.wait_connected()
        for _ in range(3):
            checks = await run(f"ws://{RELAY_NAME}:{port}", engine=engine)
            assert of(checks, Name.PROOF).outcome is Outcome.OK
            assert of(checks, Name.MTU).outcome in {Outcome.OK, Outcome.SKIPPED}
        await trio.sleep(0.2)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_without_a_key_there_is_no_proof() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", None)
    assert of(checks, Name.UPGRADE).outcome is Outcome.OK
    assert of(checks, Name.PROOF).detail == "no key was given"
    assert exit_status(checks) == 0


# The upgrade


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (page("302 Found", "Location: http://portal.test/login"), "redirect to 'http://portal.test/login'"),
        (page("200 OK"), "a web page"),
    ],
)
async def test_a_sign_in_page_in_place_of_the_relay(engine: EngineName, answer: bytes, told: str) -> None:
    async with listening(answering(answer)) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    assert outcomes(checks)[5:] == "fsssss"
    assert told in of(checks, Name.CAPTIVE_PORTAL).detail
    assert exit_status(checks) == 15


async def test_a_page_from_whoever_has_the_relays_certificate_is_no_sign_in_page(ca_file: Path) -> None:
    async with listening(answering(page("200 OK")), server_tls(CA.issue_cert("localhost"))) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert of(checks, Name.CAPTIVE_PORTAL).outcome is Outcome.OK
    assert of(checks, Name.UPGRADE).outcome is Outcome.FAILED
    assert exit_status(checks) == 16


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (page("404 Not Found"), "HTTP status 404; is this where the relay takes gateways"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer as a WebSocket"),
        (b"", "did not answer the request for a WebSocket within 1 seconds"),
    ],
)
async def test_what_is_no_relay(engine: EngineName, answer: bytes, told: str) -> None:
    async with listening(answering(answer)) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine, connect_timeout_ms=1000)
    assert told in of(checks, Name.UPGRADE).detail
    assert of(checks, Name.PROOF).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 16


async def test_a_clock_that_differs(engine: EngineName) -> None:
    async with listening(answering(page("404 Not Found", "Date: Sun, 06 Nov 1994 08:49:37 GMT"))) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    clock = of(checks, Name.CLOCK)
    assert clock.outcome is Outcome.WARNING
    assert clock.detail.endswith("the relay's 1994-11-06 08:49 UTC")


async def test_a_date_that_is_none(engine: EngineName) -> None:
    async with listening(answering(page("404 Not Found", "Date: tomorrow"))) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    assert of(checks, Name.CLOCK).detail == "the answer has no date"


# The proof


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"key": OTHER_KEY}, "the relay rejected the key"),
        ({"service_name": "elsewhere"}, "does not know the service 'elsewhere'"),
        ({"relay_identity": OTHER_KEY.identity().public_key}, "did not prove the identity that is pinned"),
    ],
)
async def test_a_relay_that_rejects_the_gateway_or_is_another(changes: dict[str, Any], told: str) -> None:
    port = free_port()
    async with relay_at(port, tunnels=[tunnel_entry(service="office")]):
        checks = await run(f"ws://{RELAY_NAME}:{port}", **({"service_name": "office"} | changes))
    assert told in of(checks, Name.PROOF).detail
    assert of(checks, Name.MTU).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 18


async def test_a_relay_that_does_not_go_by_the_dialled_name() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://127.0.0.1:{port}")
    assert f"does not go by the name '127.0.0.1:{port}'" in of(checks, Name.PROOF).detail


async def test_a_tunnel_that_another_gateway_keeps_proves_nothing() -> None:
    port = free_port()
    url = f"ws://{RELAY_NAME}:{port}"
    async with (
        relay_at(port, tunnels=[tunnel_entry(takeover="first")]),
        open_tunnel(url, key=KEY, instance="cellar") as tunnel,
    ):
        await tunnel.wait_connected()
        checks = await run(url)
        as_the_same_gateway = await run(url, instance="cellar")
    assert of(as_the_same_gateway, Name.PROOF).outcome is Outcome.OK
    proof = of(checks, Name.PROOF)
    assert proof.outcome is Outcome.WARNING
    assert "busy" in proof.detail
    assert exit_status(checks) == 0


# Large packets


@pytest.mark.parametrize(
    ("progress", "path", "outcome", "told"),
    [
        (0, True, Outcome.FAILED, "bytes get lost on the way, and small ones arrive"),
        (0, False, Outcome.FAILED, "nothing arrives any more"),
        (3000, True, Outcome.WARNING, "a slow network"),
    ],
)
async def test_large_packets_that_do_not_arrive(
    monkeypatch: pytest.MonkeyPatch, progress: int, path: bool, outcome: Outcome, told: str
) -> None:
    port, real = free_port(), TcpStream.delivery
    first: list[Delivery] = []

    def delivery(stream: TcpStream) -> Delivery | None:
        told = real(stream)
        if told is None or stream.socket.getpeername()[1] != port:  # the relay's end of it
            return told
        if not first:
            first.append(told)
            return told
        return attrs.evolve(told, acknowledged=first[0].written + progress, written=first[0].written + 15_000)

    async def small_packets_arrive(*_: object, **__: object) -> bool:
        return path

    monkeypatch.setattr(TcpStream, "delivery", delivery)
    monkeypatch.setattr(native_link, "small_packets_arrive", small_packets_arrive)
    monkeypatch.setattr(native_link, "ACKNOWLEDGED_WITHIN", 0.1)
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.MTU).outcome is outcome
    assert told in of(checks, Name.MTU).detail
    assert exit_status(checks) == (19 if outcome is Outcome.FAILED else 0)


async def test_where_the_system_tells_nothing_of_packets_the_mtu_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TcpStream, "delivery", lambda _: None)
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.MTU).outcome is Outcome.SKIPPED


# The local gateway, and other transports


async def test_no_local_gateway() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", local_addr=f"127.0.0.1:{free_port()}")
    assert "Connection refused" in of(checks, Name.LOCAL_GATEWAY).detail
    assert exit_status(checks) == 20


async def test_one_of_two_services_does_not_answer() -> None:
    async with listening(silent) as port, listening(answering(page("404 Not Found"))) as relay:
        local, services = f"127.0.0.1:{port}", {"ssh": f"127.0.0.1:{free_port()}"}
        checks = await run(f"ws://localhost:{relay}", local_addr=local, services=services)
    detail = of(checks, Name.LOCAL_GATEWAY).detail
    assert detail.startswith("ssh: the local gateway at")
    assert detail.endswith(f"{local} answers")


async def test_the_first_failure_decides_the_exit_status() -> None:
    checks = await run(f"ws://127.0.0.1:{free_port()}", local_addr=f"127.0.0.1:{free_port()}")
    assert of(checks, Name.LOCAL_GATEWAY).outcome is Outcome.FAILED
    assert exit_status(checks) == 11


async def test_a_pioneer_relay_is_not_asked_to_give_the_tunnel_away() -> None:
    async with (
        open_pioneer_relay(key=KEY) as relay,
        open_tunnel(str(relay.address), transport="tcp", key=KEY) as tunnel,
    ):
        await tunnel.wait_connected()
        checks = await run(str(relay.address))
        await trio.sleep(0.1)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}
    assert of(checks, Name.UPGRADE).detail == "a relay answers (Pioneer Relay or rathole, version 1)"
    assert of(checks, Name.PROOF).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 0


async def test_a_pioneer_relay_that_is_none() -> None:
    async with listening(answering(page("400 Bad Request"))) as port:
        checks = await run(f"localhost:{port}", connect_timeout_ms=500)
    assert exit_status(checks) == 16


async def test_transport_process_has_a_way_of_its_own() -> None:
    checks = await run(
        "relay.test:7000",
        transport="process",
        process={"command": ["/bin/true"]},
        local_addr=f"127.0.0.1:{free_port()}",
    )
    assert outcomes(checks) == "s" * 10 + "f"
    assert exit_status(checks) == 20
