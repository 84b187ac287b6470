"""A custom server behind a tunnel: whoever connects to the public address talks to `handler`, wherever this runs.

python examples/custom_server.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import trio

from pioneer_tunnel import RelayKey, TunnelError, TunnelStream, open_tunnel


async def handler(stream: TunnelStream) -> None:
    """Say back what the visitor says, until it has said all."""
    print(f"a visitor from {stream.visitor}")
    # A visitor may break off at any time, and `serve_listeners` ends with the first exception that a handler lets out.
    # What a handler leaves open is reset: it closes its stream itself, so that the visitor sees an orderly end.
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted; the tunnel comes back by itself when the network does."""
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
    except* TunnelError as failed:  # for good: everything that may pass was tried again
        problem = str(failed.exceptions[0])
    sys.exit(problem)
