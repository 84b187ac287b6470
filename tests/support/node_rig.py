"""Nodes of a fleet in one Trio run: their certificates, their links, and a gateway at one of them."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay.fleet.networks import MachineNetwork
from pioneer_tunnel.relay.fleet.node_links import NodeLinks
from pioneer_tunnel.relay.fleet.node_tls import NodeTls
from pioneer_tunnel.relay.fleet.peers import Asked, Order, OrderKind
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.gateways.other_nodes import ServeGateway
from pioneer_tunnel.relay.gateways.registry import LiveSession
from pioneer_tunnel.relay.visitors.passing import Passed, Stage

PROCESS: Final = "0123456789abcdef"
PASSED: Final = Passed(-1, Stage.REQUEST, Address("192.0.2.1", 1), Address("192.0.2.2", 2), False, "", "", b"x")
"""A connection that is passed on, without its descriptor."""


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key, as two files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    key_path.chmod(0o600)
    return certificate_path, key_path


@final
@attrs.define
class Sessions(Asked):
    """What a node answers: the sessions that a test gives it, and the orders that came."""

    held: dict[str, LiveSession] = attrs.field(factory=dict)
    orders: list[tuple[str, Order]] = attrs.field(factory=list)

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return self.held.get(session_id)

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        self.orders.append((session_id, order))
        session = self.held.get(session_id)
        if session is None:
            return False
        return order.kind is not OrderKind.ANSWERS or await session.answers(order.within)


def holding(node: str, session: str = "s", process: str = PROCESS) -> Holding:
    return Holding(node=node, process=process, session=session, fence=1, key_id="k", instance="i", since=0.0)


@final
class Machines:
    """Machines that know each other's certificates."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.files: Final = {name: make_certificate(folder, name) for name in names}
        self.addresses: Final[dict[str, Address]] = {}

    def network(self, name: str, **certificates: Path) -> MachineNetwork:
        """What `name` knows. `certificates` are those that it believes others to have."""
        others = {other: found[0] for other, found in self.files.items() if other != name} | certificates
        return MachineNetwork(NodeTls(*self.files[name], others), self.addresses)

    @asynccontextmanager
    async def node(
        self,
        name: str,
        asked: Asked | None = None,
        *,
        process: str = PROCESS,
        network: MachineNetwork | None = None,
        serve_gateway: ServeGateway | None = None,
    ) -> AsyncIterator[NodeLinks]:
        """A node that runs meanwhile."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.addresses[name] = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        links = NodeLinks(
            name,
            process,
            asked or Sessions(),
            machines=network or self.network(name),
            listeners=listeners,
            random=random.Random(1),
        )
        links.serve_gateway = serve_gateway
        async with trio.open_nursery() as nursery:
            await nursery.start(links.run)
            yield links
            nursery.cancel_scope.cancel()
