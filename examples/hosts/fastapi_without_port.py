"""FastAPI without a local port: visitors of the tunnel are the only ones.

python examples/hosts/fastapi_without_port.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI, Request

from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel, serve

app = FastAPI()


@app.get("/")
async def home(request: Request) -> dict[str, str | None]:
    """Say where the visitor comes from."""
    return {"hello": request.client.host if request.client else None}


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted."""
    async with open_tunnel(relay, key=key) as tunnel:
        print(f"visitors come in at {(await tunnel.wait_connected()).public_url}", flush=True)
        await serve(app, tunnel)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0])))
