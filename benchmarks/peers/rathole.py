"""A server of rathole 0.5, and as its client either its own or `pioneer-tunnel expose`; see build_rathole.sh.

Over `ws` and `wss` it opens a WebSocket for each visitor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from pioneer_tunnel import new_relay_key

from ..connections import Endpoint
from ..processes import LOOPBACK, free_port
from ..way import Contestant, Programs, Way
from .certificates import certify, make_pkcs12
from .ours import COMMAND, EXPOSED
from .pair import pair

__all__ = ["contestants"]

SERVER: Final = "localhost"
"""What the server is dialled by: the client of rathole checks no certificate for an address."""
PASSWORD: Final = "bench"


def contestants(programs: Programs) -> list[Contestant]:
    program = programs.find("rathole")
    missing = programs.missing("rathole", "benchmarks/peers/build_rathole.sh builds it")
    kinds: tuple[tuple[Literal["rathole", "ours"], Literal["tcp", "tls", "wss"], str], ...] = (
        ("rathole", "tcp", "rathole over tcp"),
        ("ours", "tcp", "the server of rathole over tcp, and `pioneer-tunnel expose` as its client"),
        ("rathole", "wss", "rathole over wss: a WebSocket for each visitor"),
        ("rathole", "tls", "rathole over tls"),
        ("ours", "tls", "the server of rathole over tls, and `pioneer-tunnel expose` as its client"),
    )
    return [
        Contestant(
            name=f"{client}-{kind}",
            about=about,
            open=partial(_tunnel, program=program or Path(), client=client, kind=kind),
            missing=missing,
            by_default=kind != "tls",
            most_streams=EXPOSED if client == "ours" else 10_000,
        )
        for client, kind, about in kinds
    ]


@contextmanager
def _tunnel(
    origin: Endpoint, *, program: Path, client: Literal["rathole", "ours"], kind: Literal["tcp", "tls", "wss"]
) -> Iterator[Way]:
    control, visitors, key = free_port(), free_port(), new_relay_key().reveal()
    host, port = origin
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_text(key)
        if kind != "tcp":
            certify(folder, SERVER)
            make_pkcs12(folder, PASSWORD)
        (folder / "server.toml").write_text(
            f"""
            [server]
            bind_addr = "{LOOPBACK}:{control}"
            default_token = "{key}"
            [server.services.bench]
            bind_addr = "{LOOPBACK}:{visitors}"
            {_transport("server", kind, 'pkcs12 = "relay.p12"', f'pkcs12_password = "{PASSWORD}"')}
            """
        )
        (folder / "client.toml").write_text(
            f"""
            [client]
            remote_addr = "{SERVER}:{control}"
            default_token = "{key}"
            [client.services.bench]
            local_addr = "{host}:{port}"
            {_transport("client", kind, 'trusted_root = "ca.pem"')}
            """
        )
        gateway = [str(program), "--client", "client.toml"]
        if client == "ours":
            gateway = [*COMMAND, "expose", f"{host}:{port}", "--relay", f"{SERVER}:{control}", "--key-file", "key"]
            gateway += ["--transport", kind, "--key-mode", "rathole", "--service", "bench"]
            gateway += ["--ca-file", "ca.pem"] if kind == "tls" else []
        relay = [str(program), "--server", "server.toml"]
        with pair(folder, relay, gateway, listens=control, visitors=visitors, reconnects=True) as way:
            yield way


def _transport(side: str, kind: str, *tls: str) -> str:
    lines = [f"[{side}.transport]", f'type = "{"websocket" if kind == "wss" else kind}"']
    if kind == "wss":
        lines += [f"[{side}.transport.websocket]", "tls = true"]
    if kind != "tcp":
        lines += [f"[{side}.transport.tls]", *tls]
    return "\n".join(lines)
