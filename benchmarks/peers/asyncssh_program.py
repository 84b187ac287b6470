"""asyncssh as a tunnel to race: its server or its client, until interrupted.

    python -m benchmarks.peers.asyncssh_program relay|gateway JSON

`control` and `visitors` are ports, `origin` is a host and a port. The relay makes the keys in `folder`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import asyncssh

from ..processes import LOOPBACK, allow_many_descriptors

__all__: list[str] = []

USER: Final = "bench"


class Server(asyncssh.SSHServer):  # type: ignore[misc,unused-ignore]  # mypy knows it where it is installed
    """One that opens any port that its client asks for."""

    def server_requested(self, listen_host: str, listen_port: int) -> bool:  # noqa: ARG002  # the interface's
        return True


async def relay(told: dict[str, Any]) -> None:
    folder = Path(told["folder"])
    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
    server = await asyncssh.create_server(
        Server,
        LOOPBACK,
        told["control"],
        server_host_keys=[str(folder / "host")],
        authorized_client_keys=str(folder / "user.pub"),
    )
    await server.wait_closed()


async def gateway(told: dict[str, Any]) -> None:
    folder = Path(told["folder"])
    connection = await asyncssh.connect(
        LOOPBACK, told["control"], username=USER, client_keys=[str(folder / "user")], known_hosts=None, config=None
    )
    await connection.forward_remote_port(LOOPBACK, told["visitors"], *told["origin"])
    await connection.wait_closed()


if __name__ == "__main__":
    side, text = sys.argv[1:]
    allow_many_descriptors()
    with suppress(KeyboardInterrupt):
        asyncio.run({"relay": relay, "gateway": gateway}[side](json.loads(text)))
