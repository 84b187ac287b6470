"""aiohttp on a Unix socket, and the tunnel forwards visitors to it. No other program on this host needs to reach it.

python examples/hosts/aiohttp_app.py wss://relay.example.com relay-key.txt /run/user/1000/app.sock
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel

RELAY, KEY_FILE, SOCKET = sys.argv[1:]


async def home(_request: web.Request) -> web.Response:
    """Greet a visitor."""
    return web.json_response({"hello": "visitor"})


async def tunnel(_app: web.Application) -> AsyncIterator[None]:
    """Open the tunnel with the server, and close it with the server."""
    key = RelayKey(Path(KEY_FILE).read_text().splitlines()[0])
    async with open_tunnel(RELAY, key=key, forward_to=f"unix:{SOCKET}") as tunnel:
        print(f"visitors come in at {(await tunnel.wait_connected()).public_url}", flush=True)
        yield


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/", home)
    app.cleanup_ctx.append(tunnel)
    web.run_app(app, path=SOCKET, print=None)
