"""snitun as a tunnel to race: its relay or its gateway, until interrupted. Needs the package `snitun`.

    python -m benchmarks.peers.snitun_program relay FILE
    python -m benchmarks.peers.snitun_program gateway FILE

FILE is JSON: `control` and `visitors` are the relay's ports, `origin` is a host and a port; `fernet`, `key` and `iv`
are keys. Its relay finds the tunnel by the name in a ClientHello. Our visitors send none, so every visitor goes to the
one tunnel here; all else is snitun's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cryptography.fernet import Fernet
from snitun import utils
from snitun.client import connector
from snitun.client.client_peer import ClientPeer
from snitun.server.listener_peer import PeerListener
from snitun.server.listener_sni import SNIProxy
from snitun.server.peer_manager import PeerManager

from ..connections import HOST
from ..processes import LOOPBACK

__all__: list[str] = []

FIRST_READ: Final = 4096
VALID: Final = 86400
"""Seconds."""

# Names of newer versions, which need a newer Python.
_Connector: Final = getattr(connector, "EndpointConnector", None) or connector.Connector
_PROTOCOL: Final = getattr(utils, "DEFAULT_PROTOCOL_VERSION", 0)


async def relay(told: dict[str, Any]) -> None:
    peers = PeerManager([told["fernet"]])
    proxy = SNIProxy(peers)

    async def visitor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(FIRST_READ)
        peer = peers.get_peer(HOST) if peers.peer_available(HOST) else None
        if first and peer is not None:
            await proxy._proxy_peer(peer.multiplexer, first, reader, writer)  # past its look for a ClientHello
        writer.close()

    await PeerListener(peers, host=LOOPBACK, port=told["control"]).start()
    server = await asyncio.start_server(visitor, LOOPBACK, told["visitors"], backlog=4096)
    await server.serve_forever()


async def gateway(told: dict[str, Any]) -> None:
    token = {
        "valid": time.time() + VALID,
        "hostname": HOST,
        "aes_key": told["key"],
        "aes_iv": told["iv"],
        "protocol_version": _PROTOCOL,
    }
    client = ClientPeer(LOOPBACK, told["control"])
    await client.start(
        _Connector(*told["origin"]),
        Fernet(told["fernet"]).encrypt(json.dumps(token).encode()),
        bytes.fromhex(told["key"]),
        bytes.fromhex(told["iv"]),
    )
    await client.wait()


if __name__ == "__main__":
    side, file = sys.argv[1:]
    with suppress(KeyboardInterrupt):
        asyncio.run({"relay": relay, "gateway": gateway}[side](json.loads(Path(file).read_text())))
