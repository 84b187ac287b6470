"""A custom server behind a tunnel: `handler` serves each connection to the public address.

python examples/custom_server.py wss://relay.example.com relay-key.txt
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below shows no traceback

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


def read_key(file: str) -> RelayKey:
    """Read the key from the first line of a file. No error shows `file`: it may be the key, by mistake."""
    try:
        return RelayKey(Path(file).read_text().partition("\n")[0])
    except UnicodeDecodeError:
        sys.exit("KEY-FILE is not a text file")
    except OSError as error:
        sys.exit(f"KEY-FILE cannot be read: {error.strerror}")
    except ValueError as error:
        sys.exit(f"KEY-FILE: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} RELAY KEY-FILE")
    problem: str | int | None = None
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on the tunnel ends gracefully
        trio.run(main, sys.argv[1], read_key(sys.argv[2]))
    except* KeyboardInterrupt:
        problem = 130
    except* TunnelError as failed:  # a final failure: temporary ones are retried
        problem = str(failed.exceptions[0])
    sys.exit(problem)
