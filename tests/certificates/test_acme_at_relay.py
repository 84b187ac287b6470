"""A relay orders certificates from pebble, for its own name and for the hosts of tunnels, and renews them."""

from __future__ import annotations

import json
import ssl
import time
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from pebble import Pebble
from rig import (
    HOST,
    RELAY_NAME,
    connect,
    eventually,
    in_background,
    no_hang,
    read_all,
    relay_rig,
    tunnel_entry,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State
from pioneer_tunnel.certificates.answers import Answers, challenge_context
from pioneer_tunnel.certificates.authority import Challenge, ChallengeKind

BLIND: Final = "blind.test"
KEY_OF_BOX: Final = RelayKey("ptk1_the-key-of-a-box-0123456789abcdef")


def at_ports(authority: Pebble, *, http: bool, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "acme": authority.config(),
        "ingress_addr": f"127.0.0.1:{authority.tls_port}",
        "tunnels": [tunnel_entry(url=f"https://{HOST}")],
    }
    if http:
        fields["http_addr"] = f"127.0.0.1:{authority.http_port}"
    return fields | changes


async def certificate_at(address: Address, name: str, context: ssl.SSLContext) -> dict[str, Any]:
    async with await connect(address) as stream:
        secured = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
        with no_hang():
            await secured.do_handshake()
        return dict(secured.getpeercert() or {})


WAYS: Final = ["HTTP-01", "TLS-ALPN-01", "TLS-ALPN-01 where gateways come in", "TLS-ALPN-01 where both come in"]


@pytest.mark.parametrize("way", WAYS)
async def test_it_gets_certificates_for_its_name_and_for_hosts_of_tunnels(authority: Pebble, way: str) -> None:
    fields = at_ports(authority, http=way == "HTTP-01")
    if "where" in way:
        fields["control_addr"] = fields["ingress_addr"]
    if "where gateways" in way:
        fields["ingress_addr"] = "127.0.0.1:0"
    async with relay_rig(**fields) as rig:
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
        assert [*rig.relay.certificates] == [RELAY_NAME, HOST]
        trust = authority.trust()
        for address, name in ((rig.addresses.control, RELAY_NAME), (rig.addresses.ingress, HOST)):
            assert (await certificate_at(address, name, trust))["subjectAltName"] == (("DNS", name),)


async def test_it_renews_while_it_serves(authority: Pebble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authority is answered before a gateway that has the same name for its visitors."""
    tunnels = [tunnel_entry(url=f"http://{RELAY_NAME}")]
    clear: dict[str, Any] = {
        "ingress_addr": f"127.0.0.1:{authority.http_port}",
        "ingress_tls": False,
        "control_tls": True,
    }
    async with relay_rig(acme=authority.config(), tunnels=tunnels, **clear) as rig:
        trust = authority.trust()
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            before = await certificate_at(rig.addresses.control, RELAY_NAME, trust)
            async with rig.tunnel(relay=f"wss://{RELAY_NAME}", ca_file=root_of(authority, tmp_path)) as tunnel:
                await tunnel.wait_connected()
                assert rig.relay._certificates.acme is not None
                monkeypatch.setattr(rig.relay._certificates.acme, "_wall_clock", lambda: time.time() + 4 * 365 * 86_400)
                await rig.apply()
                while await certificate_at(rig.addresses.control, RELAY_NAME, trust) == before:
                    await trio.sleep(0.05)
                assert tunnel.status.state is State.CONNECTED


async def test_a_restart_uses_what_it_has_though_the_authority_is_down(authority: Pebble) -> None:
    async with relay_rig(**at_ports(authority, http=True)) as rig:
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            trust = authority.trust()
            before = await certificate_at(rig.addresses.ingress, HOST, trust)
            authority.stop()
            await rig.stop()
            await rig.start()
            assert await certificate_at(rig.addresses.ingress, HOST, trust) == before
            assert rig.relay.certificates[HOST].message is None


async def test_the_authority_is_down_at_the_start(authority: Pebble, caplog: pytest.LogCaptureFixture) -> None:
    authority.stop()
    async with relay_rig(**at_ports(authority, http=True)) as rig:
        with no_hang():
            await eventually(lambda: "cannot be reached" in (rig.relay.certificates[HOST].message or ""))
            assert "Connection refused" in caplog.text
            status, _, _ = (await ask_in_clear(rig.addresses.all_http[0], "/")).partition(b"\r\n")
            assert status == b"HTTP/1.1 308 Permanent Redirect", "it serves what it can"
            with pytest.raises(trio.BrokenResourceError):
                await certificate_at(rig.addresses.ingress, HOST, ssl.create_default_context())
            authority.start()
            await rig.apply()  # as SIGHUP does: it does not wait until it would try again
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            assert rig.relay.certificates[HOST].message is None


async def test_an_authority_that_cannot_reach_us_says_so(authority: Pebble) -> None:
    async with relay_rig(**at_ports(authority, http=True, http_addr="127.0.0.1:0")) as rig:
        with no_hang():
            await eventually(lambda: rig.relay.certificates[HOST].retry_at_unix)
    message = rig.relay.certificates[HOST].message or ""
    assert f"let port 80 of {HOST} be reached from the Internet, and lead to the relay" in message
    assert "onnection refused" in message


async def test_something_else_answers_the_authority(authority: Pebble, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the DNS leads to another server."""
    async with relay_rig(**at_ports(authority, http=False)) as rig:
        monkeypatch.setattr(Answers, "tls", lambda answers, name: answer_of_another(name))
        await rig.apply()
        with no_hang():
            await eventually(lambda: rig.relay.certificates[HOST].retry_at_unix)
    assert "something else answers at port 443 of office.test" in (rig.relay.certificates[HOST].message or "")
    assert rig.relay.certificates[HOST].not_after_unix is None


def answer_of_another(name: str | None) -> ssl.SSLContext:
    assert name is not None
    return challenge_context(Challenge(name, ChallengeKind.TLS_ALPN_01, "token", "another authorization"))


async def test_only_hosts_whose_tls_ends_here_are_ordered(authority: Pebble, tmp_path: Path) -> None:
    tunnels = [
        tunnel_entry(url=f"https://{HOST}"),
        tunnel_entry(id="blind", url=f"https://{BLIND}", key=key_of("blind"), tls="passthrough"),
        tunnel_entry(id="clear", url="http://clear.test", key=key_of("clear")),
        tunnel_entry(id="own", url="https://own.test", key=key_of("own"), bind_addr="127.0.0.1:0"),
        tunnel_entry(id="box", url="https://*.box.test", key=str(KEY_OF_BOX.identity().public_key)),
    ]
    changes = {"tunnels": tunnels, "names_file": tmp_path / "names.json", "public_names": [RELAY_NAME, "127.0.0.1:9"]}
    async with relay_rig(**at_ports(authority, http=True, **changes)) as rig:
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            assert {*rig.relay.certificates} == {RELAY_NAME, HOST}
            for name in ("unknown.test", "other.box.test", "a." + HOST):
                with pytest.raises(trio.BrokenResourceError) as refused:
                    await certificate_at(rig.addresses.ingress, name, ssl.create_default_context())
                assert isinstance(refused.value.__cause__, ssl.SSLError)
                assert refused.value.__cause__.reason == "TLSV1_UNRECOGNIZED_NAME"
            assert {*rig.relay.certificates} == {RELAY_NAME, HOST}, "nobody makes it order names by asking for them"
            options: dict[str, Any] = {"key": KEY_OF_BOX, "services": {"web": "127.0.0.1:9"}}
            async with rig.tunnel(relay=f"wss://{RELAY_NAME}", ca_file=root_of(authority, tmp_path), **options):
                await eventually(lambda: "web.box.test" in rig.relay.certificates)
                await eventually(lambda: rig.relay.certificates["web.box.test"].not_after_unix)


async def test_what_the_relay_answers_in_clear_is_in_the_access_log(authority: Pebble, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = {"access_log": str(path), "access_log_format": "json"}
    async with relay_rig(**at_ports(authority, http=True, **log)) as rig:
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            await ask_in_clear(rig.addresses.all_http[0], "/a?secret=1")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    redirect = lines.pop()
    assert (redirect["tunnel"], redirect["path"], redirect["status"]) == ("office", "/a", 308)
    assert {(line["host"], line["status"]) for line in lines} == {(HOST, 200), (RELAY_NAME, 200)}


async def test_other_tokens_are_for_the_gateway(authority: Pebble, tmp_path: Path) -> None:
    """It may run certbot itself. Anything else without TLS is sent to https://."""
    tunnels = [
        tunnel_entry(url=f"https://{HOST}"),
        tunnel_entry(id="blind", url=f"https://{BLIND}:8443", key=key_of("blind"), tls="passthrough"),
    ]
    async with relay_rig(**at_ports(authority, http=True, tunnels=tunnels)) as rig:
        with no_hang():
            await eventually(lambda: all(one.not_after_unix for one in rig.relay.certificates.values()))
            clear = rig.addresses.all_http[0]
            async with rig.tunnel(relay=f"wss://{RELAY_NAME}", ca_file=root_of(authority, tmp_path)) as tunnel:
                await tunnel.wait_connected()

                async def gateway() -> None:
                    async with await tunnel.accept() as stream:
                        assert stream.tls is False
                        await stream.receive_some()
                        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ncertbot!")
                        assert await read_all(stream) == b"", "no later request reaches the gateway in clear"

                async with in_background(gateway), await connect(clear) as visitor:
                    await visitor.send_all(get("/.well-known/acme-challenge/theirs"))
                    assert (await visitor.receive_some()).endswith(b"certbot!")
                    await visitor.send_all(get("/account?id=1"))
                    answer = await read_all(visitor)
                    assert answer.startswith(b"HTTP/1.1 308 ")
                    assert f"Location: https://{HOST}/account?id=1\r\n".encode() in answer
            assert f"Location: https://{BLIND}:8443/\r\n".encode() in await ask_in_clear(clear, "/", host=BLIND)
            own = await ask_in_clear(clear, "/.well-known/acme-challenge/x", host=BLIND)
            assert own.startswith(b"HTTP/1.1 421 "), "the relay reads nothing of what reaches that gateway"
            assert (await ask_in_clear(clear, "/", host="unknown.test")).startswith(b"HTTP/1.1 404 ")


def get(target: str, *, host: str = HOST) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


async def ask_in_clear(address: Address, target: str, *, host: str = HOST) -> bytes:
    async with await connect(address) as visitor:
        await visitor.send_all(get(target, host=host))
        return await read_all(visitor)


def key_of(name: str) -> str:
    return str(RelayKey(f"ptk1_the-key-of-{name}-0123456789abcdef").identity().public_key)


def root_of(authority: Pebble, folder: Path) -> Path:
    """The file of what gateways trust."""
    (folder / "root.pem").write_text(authority.root())
    return folder / "root.pem"
