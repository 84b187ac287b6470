"""A chat over WebSockets: Starlette on Trio, without a local port.

python examples/hosts/starlette_websocket.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from pioneer_tunnel import RelayKey, open_tunnel
from pioneer_tunnel.asgi import serve

members: set[WebSocket] = set()


async def chat(websocket: WebSocket) -> None:
    """Pass on what a member says to all, until it leaves."""
    await websocket.accept()
    members.add(websocket)
    try:
        async for text in websocket.iter_text():
            for member in [*members]:
                await member.send_text(text)
    finally:
        members.remove(websocket)


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted."""
    async with open_tunnel(relay, key=key) as tunnel:
        print(f"visitors come in at {(await tunnel.wait_connected()).public_url}", flush=True)
        await serve(Starlette(routes=[WebSocketRoute("/chat", chat)]), tunnel)


if __name__ == "__main__":
    try:
        trio.run(main, sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0]))
    except* KeyboardInterrupt:
        pass
