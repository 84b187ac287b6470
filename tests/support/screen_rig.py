"""The gateway of examples/gateway_with_settings, and the ways to it."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, final

import attrs
import trio
import trustme
from rig import (
    HOST,
    KEY,
    RelayRig,
    connect,
    eventually,
    free_port,
    no_hang,
    read_all,
    read_until,
    relay_rig,
    tunnel_entry,
)
from settings_gateway import Gateway
from trio_websocket import WebSocketConnection, wrap_client_stream

from pioneer_tunnel import Address, SettingsUpdate, State

__all__ = ["BEARER", "TOKEN", "Answer", "Site", "call", "site", "sites"]

TOKEN: Final = "the-token-of-the-tests"
BEARER: Final = {"Authorization": f"Bearer {TOKEN}"}


@final
@attrs.frozen(kw_only=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def __getitem__(self, name: str) -> str:
        """The value of a header that is there once."""
        (value,) = [value for given, value in self.headers if given.lower() == name]
        return value


@final
class Site:
    """The gateway, as it is reached in one way."""

    def __init__(self, gateway: Gateway, port: int, origin: str, tls: ssl.SSLContext | None = None) -> None:
        self.gateway: Final = gateway
        self.port: Final = port
        self.origin: Final = origin
        self.host: Final = origin.partition("//")[2]
        self._tls: Final = tls

    async def connect(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        stream = await connect(Address("127.0.0.1", self.port))
        return stream if self._tls is None else trio.SSLStream(stream, self._tls, server_hostname=HOST)

    async def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: str = "") -> Answer:
        """Send a request with these headers, and with the right Host unless they name another."""
        fields = {"Host": self.host, "Content-Length": str(len(body)), **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", body]
        with no_hang():
            async with await self.connect() as stream:
                await stream.send_all("\r\n".join(lines).encode())
                head, _, content = (await read_all(stream)).partition(b"\r\n\r\n")
        status, *rest = head.decode().split("\r\n")
        pairs = [(name, value) for name, _, value in (line.partition(": ") for line in rest)]
        return Answer(status=int(status.split()[1]), headers=pairs, body=content)

    async def sign_in(self) -> tuple[dict[str, str], str]:
        """Show the token; returns the cookie as a header, and the secret of the page."""
        answer = await self.ask("POST", "/session", BEARER | {"Origin": self.origin})
        assert answer.status == 201, answer
        return {"Cookie": answer["set-cookie"].partition(";")[0]}, json.loads(answer.body)["pageSecret"]

    @asynccontextmanager
    async def websocket(self, headers: Mapping[str, str], *protocols: str) -> AsyncIterator[WebSocketConnection]:
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        with no_hang():
            async with await self.connect() as stream, trio.open_nursery() as nursery:
                yield await wrap_client_stream(
                    nursery, stream, self.host, "/", extra_headers=fields, subprotocols=protocols
                )
                nursery.cancel_scope.cancel()

    async def status_of_websocket(self, headers: Mapping[str, str], *protocols: str) -> int:
        """101, or the status with which a WebSocket is refused."""
        fields = {"Host": self.host, **headers, "Upgrade": "websocket", "Connection": "Upgrade"}
        fields |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        if protocols:
            fields["Sec-WebSocket-Protocol"] = ", ".join(protocols)
        lines = ["GET / HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        with no_hang():
            async with await self.connect() as stream:
                await stream.send_all("\r\n".join(lines).encode())
                head = await read_until(stream, b"\r\n\r\n")
        return int(head.split()[1])


async def call(websocket: WebSocketConnection, method: str, **params: Any) -> Any:
    """The answer to a request; notifications before it are dropped."""
    await websocket.send_message(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
    while "id" not in (message := json.loads(await websocket.get_message())):
        pass
    return message


@asynccontextmanager
async def site(folder: Path, relay: str = "ws://127.0.0.1:9") -> AsyncIterator[Site]:
    """The gateway, as a browser on its own machine reaches it."""
    (folder / "gateway.toml").write_text(f'[gateway.remote_access]\nrelay_addr = "{relay}"\napply_grace_ms = 500\n')
    gateway = Gateway(folder, TOKEN)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(gateway.run, 0)
        yield Site(gateway, port, f"http://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def sites(folder: Path, scheme: str = "http") -> AsyncIterator[tuple[Site, Site]]:
    """The gateway from near, and as visitors reach it through its tunnel."""
    tls = None
    options: dict[str, Any] = {"control_addr": (control := f"127.0.0.1:{free_port()}"), "public_names": [control]}
    if scheme == "https":
        authority = trustme.CA()
        authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(folder / "relay.pem"))
        files = {"tls_certificate": "relay.pem", "tls_private_key": "relay.pem", "base_dir": folder}
        options |= {"control_tls": False, **files}
        tls = ssl.create_default_context()
        authority.configure_trust(tls)
    rig: RelayRig
    entry = tunnel_entry(url=f"{scheme}://{HOST}")
    async with relay_rig(tunnels=[entry], **options) as rig, site(folder, f"ws://{control}") as near:
        remote_access = near.gateway.remote_access
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await eventually(lambda: remote_access.status.state is State.CONNECTED)
        yield near, Site(near.gateway, rig.addresses.ingress.port, f"{scheme}://{HOST}", tls)
