"""FastAPI with a local port, and behind a tunnel: uvicorn serves this host, the tunnel serves visitors.

python examples/hosts/fastapi_lifespan.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request

from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel

RELAY, KEY_FILE, *PORT = sys.argv[1:]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the tunnel with the server, and close it with the server."""
    key = RelayKey(Path(KEY_FILE).read_text().splitlines()[0])
    async with open_tunnel(RELAY, key=key, app=app) as tunnel:
        print(f"visitors come in at {(await tunnel.wait_connected()).public_url}", flush=True)
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def home(request: Request) -> dict[str, str | None]:
    """Say where the visitor comes from: its own address, not that of the tunnel."""
    return {"hello": request.client.host if request.client else None}


if __name__ == "__main__":
    uvicorn.run(app, port=int(PORT[0]) if PORT else 8000, log_level="warning")
