"""Remote access of an asyncio gateway, which apps switch by JSON-RPC over a WebSocket, near or far.

python examples/hosts/json_rpc_websocket.py gateway.toml [PORT]

A real gateway asks its clients for a token; ../embedded_gateway.py does.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from pioneer_tunnel import FileKeystore, RemoteAccessConfig, RpcError, SettingsFile
from pioneer_tunnel.aio import RemoteAccess, RemoteAccessRpc


async def answer(rpc: RemoteAccessRpc, request: dict[str, Any]) -> dict[str, Any]:
    """The response to a request."""
    try:
        outcome: dict[str, Any] = {"result": await rpc.handle(request["method"], request.get("params"))}
    except RpcError as error:
        outcome = {"error": error.to_wire()}
    return {"jsonrpc": "2.0", "id": request.get("id"), **outcome}


async def main(config: Path, port: int) -> None:
    """Listen on loopback, and run remote access by the settings, until interrupted."""

    async def json_rpc(websocket: WebSocket) -> None:
        await websocket.accept()
        async for request in websocket.iter_json():
            await websocket.send_json(await answer(rpc, request))

    app = Starlette(routes=[WebSocketRoute("/", json_rpc)])
    settings, keystore = SettingsFile(config.with_name("settings.toml")), FileKeystore(config.with_name("keystore"))
    async with RemoteAccess(RemoteAccessConfig.load(config), settings=settings, keystore=keystore, app=app) as remote:
        rpc = RemoteAccessRpc(remote)
        await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning")).serve()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8000))
