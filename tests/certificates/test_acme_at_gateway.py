"""A gateway orders certificates from pebble through its tunnel, whose TLS the relay cannot read."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from pebble import Pebble
from rig import HOST, KEY, RELAY_NAME, RelayRig, connect, echo, eventually, no_hang, relay_rig, tunnel_entry

from pioneer_tunnel import (
    AcmeConfig,
    InvalidSettingsError,
    LinkStatus,
    MemoryKeystore,
    RemoteAccess,
    RemoteAccessConfig,
    SettingsFile,
    SettingsUpdate,
    State,
    Status,
    terminate_tls,
)
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.automatic_tls import keep_certificates
from pioneer_tunnel.tunnel.status_feed import StatusFeed
from pioneer_tunnel.tunnel.tunnel import Tunnel

BLIND: Final[dict[str, Any]] = {"tunnels": [tunnel_entry(url=f"https://{HOST}", tls="passthrough")]}


async def talk(rig: RelayRig, trust: ssl.SSLContext, *, name: str = HOST) -> tuple[bytes, dict[str, Any]]:
    """Have a word echoed through TLS; returns it and the certificate that was seen."""
    async with await connect(rig.addresses.ingress) as stream:
        secured = trio.SSLStream(stream, trust, server_hostname=name, https_compatible=True)
        await secured.do_handshake()
        await secured.send_all(b"word")
        return bytes(await secured.receive_some()), dict(secured.getpeercert() or {})


async def serve(tunnel: Tunnel) -> None:
    assert tunnel.certificates is not None
    async with trio.open_nursery() as visitors:
        await accept_visitors(tunnel, terminate_tls(echo, tunnel.certificates), visitors)


def is_certified(status: Status) -> bool:
    return bool(status.certificates) and all(one.not_after_unix for one in (status.certificates or {}).values())


async def test_end_to_end_tls_and_the_relay_has_no_key(authority: Pebble) -> None:
    async with (
        relay_rig(ingress_addr=f"127.0.0.1:{authority.tls_port}", **BLIND) as rig,
        rig.tunnel(acme=authority.config()) as tunnel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, tunnel)
        with no_hang():
            await eventually(lambda: is_certified(tunnel.status))
            heard, seen = await talk(rig, authority.trust())
            assert (heard, seen["subjectAltName"]) == (b"word", (("DNS", HOST),))
            assert rig.relay.certificates == {}
            nobody = ssl.create_default_context()
            nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
            nobody.set_alpn_protocols(["acme-tls/1"])
            with pytest.raises(trio.BrokenResourceError):
                await talk(rig, nobody)  # no order is under way
        nursery.cancel_scope.cancel()


async def test_remote_access_with_the_table(authority: Pebble, tmp_path: Path) -> None:
    """Its status says how it goes; the next run has the certificate though the authority is gone."""
    acme = {"directory": authority.directory, "terms_accepted": True, "ca_file": str(authority.folder / "web-ca.pem")}
    async with relay_rig(ingress_addr=f"127.0.0.1:{authority.tls_port}", **BLIND) as rig:
        table = {"relay_addr": f"ws://{RELAY_NAME}", "acme": acme}
        remote_access = RemoteAccess(
            RemoteAccessConfig.from_table(table, base_dir=tmp_path),
            settings=SettingsFile(tmp_path / "settings.toml"),
            keystore=MemoryKeystore(),
            handler=echo,
            dial=rig.dial,
        )
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        trust = authority.trust()
        for started in (True, False):
            if not started:
                authority.stop()
            with no_hang():
                async with trio.open_nursery() as nursery:
                    await nursery.start(remote_access.run)
                    await eventually(lambda: is_certified(remote_access.status))
                    heard, seen = await talk(rig, trust)
                    assert (heard, seen["subjectAltName"]) == (b"word", (("DNS", HOST),))
                    assert Status.from_wire(remote_access.status.to_wire()) == remote_access.status
                    await remote_access.stop()
            assert remote_access.status.state is State.STOPPED
            assert remote_access.status.certificates is None
        assert (tmp_path / "certificates").stat().st_mode & 0o777 == 0o700
        (kept,) = (tmp_path / "certificates").glob("*/certificates/*.pem")
        assert (kept.name, kept.stat().st_mode & 0o777) == (f"{HOST}.pem", 0o600)


async def test_a_relay_that_ends_tls_itself_is_the_reason(authority: Pebble, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tunnels": [tunnel_entry(url=f"https://{HOST}")],
        "acme": authority.config(folder=tmp_path / "relay"),
        "ingress_addr": f"127.0.0.1:{authority.tls_port}",
        "http_addr": f"127.0.0.1:{authority.http_port}",
        "control_tls": False,
    }
    async with relay_rig(**changes) as rig, rig.tunnel(acme=authority.config()) as tunnel:
        with no_hang():
            await eventually(lambda: (tunnel.status.certificates or {}).get(HOST) and why_not(tunnel))
        assert "if a gateway orders, the relay needs tls = 'passthrough' for it" in why_not(tunnel)


def why_not(tunnel: Tunnel) -> str:
    (one,) = (tunnel.status.certificates or {}).values()
    return "" if one.message in {None, "no certificate yet"} else str(one.message)


async def test_what_cannot_work_is_refused_at_once(tmp_path: Path) -> None:
    acme = AcmeConfig(terms_accepted=True, folder=tmp_path / "none" / "certificates")
    async with relay_rig() as rig:
        with pytest.raises(InvalidSettingsError, match="only a relay of transport websocket says"):
            async with rig.tunnel(relay="relay.test:2333", transport="tls", acme=acme):
                pass
    with pytest.raises(InvalidSettingsError, match="only a relay of transport websocket says"):
        RemoteAccessConfig(relay_addr="relay.test:2333", transport="tcp", acme=acme)
    with pytest.raises(InvalidSettingsError, match="stands beside tls; leave one of them out"):
        RemoteAccessConfig(relay_addr="wss://relay.test", acme=acme, tls={"certificate": "a", "private_key": "b"})


class Wanted:
    """Stands in for the certificates, and notes what is asked of them."""

    status = None

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def set_reachable(self, reachable: bool) -> None:
        """Nothing is ordered here."""

    def want(self, names: list[str]) -> None:
        self.names.append([*dict.fromkeys(names)])

    async def run(self) -> None:
        await trio.sleep_forever()


async def test_the_hosts_of_all_links_get_certificates() -> None:
    urls = [f"https://{host}.test" for host in ("one", "other")]
    links = [LinkStatus(up=True, public_url=url) for url in urls]
    feed = StatusFeed(Status(state=State.CONNECTED, public_url=urls[0], links=links))
    certificates: Any = Wanted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_certificates, certificates, feed)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert certificates.names == [["one.test", "other.test"]]
