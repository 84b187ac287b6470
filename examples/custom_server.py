"""A custom server behind a tunnel: `handler` serves each connection to the public address.

python examples/custom_server.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import trio

from pioneer_tunnel import RelayKey, TunnelError, TunnelStream, open_tunnel


async def handler(stream: TunnelStream) -> None:
    """Echo what the visitor sends, until EOF."""
    print(f"a visitor from {stream.visitor}")
    # A visitor may reset the connection at any time; an exception that leaves a handler would end `serve_listeners`.
    # A stream that the handler leaves open is reset. So close it, and the visitor gets EOF.
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted. The tunnel reconnects by itself."""
    async with open_tunnel(relay, key=key) as tunnel:
        status = await tunnel.wait_connected()
        print(f"visitors come in at {status.public_url}")
        await trio.serve_listeners(handler, [tunnel])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} RELAY KEY-FILE")
    problem: str | None = None
    try:
        trio.run(main, sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0]))
    except* KeyboardInterrupt:
        pass
    except* TunnelError as failed:  # a final failure: temporary ones are retried
        problem = str(failed.exceptions[0])
    sys.exit(problem)
