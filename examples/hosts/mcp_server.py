"""An MCP server over streamable HTTP, without a local port. Its URL is the tunnel's, with /mcp.

python examples/hosts/mcp_server.py wss://relay.example.com relay-key.txt

Anyone who knows the URL may call the tool. MCPServer takes `auth` and `token_verifier` for more than an example.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel, serve

server = MCPServer("adder", log_level="WARNING")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted. Requests for another host than the tunnel's are refused."""
    async with open_tunnel(relay, key=key) as tunnel:
        url = (await tunnel.wait_connected()).public_url or ""
        print(f"visitors come in at {url}", flush=True)
        security = TransportSecuritySettings(allowed_hosts=[urlsplit(url).netloc], allowed_origins=[url])
        await serve(server.streamable_http_app(transport_security=security), tunnel)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0])))
