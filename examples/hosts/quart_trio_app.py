"""Quart-Trio without a local port.

python examples/hosts/quart_trio_app.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio
from quart import request
from quart_trio import QuartTrio

from pioneer_tunnel import RelayKey, open_tunnel
from pioneer_tunnel.asgi import serve

app = QuartTrio(__name__)


@app.get("/")
async def home() -> dict[str, str | None]:
    """Say where the visitor comes from."""
    return {"hello": request.remote_addr}


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted."""
    async with open_tunnel(relay, key=key) as tunnel:
        print(f"visitors come in at {(await tunnel.wait_connected()).public_url}", flush=True)
        await serve(app, tunnel)


if __name__ == "__main__":
    try:
        trio.run(main, sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0]))
    except* KeyboardInterrupt:
        pass
