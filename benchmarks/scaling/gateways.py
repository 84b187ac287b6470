"""Many gateways in one process: `python -m benchmarks.scaling.gateways KEYS URL...`.

KEYS is a file with the key of one gateway in each line. They share out the URLs. Each visitor gets back what it sent.
When all are connected, a line is printed. Ends with SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from pioneer_tunnel import RelayKey, TunnelStream, open_tunnel

from ..processes import allow_many_descriptors
from .relays import ANSWER

AT_ONCE: Final = 10
"""Gateways that connect at the same time."""
PIECE: Final = 65_536
END_OF_HEAD: Final = b"\r\n\r\n"


async def answer(stream: TunnelStream) -> None:
    """Answer each request of a visitor. It sends no bodies."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            received = b""
            while data := await stream.receive_some(PIECE):
                *heads, received = (received + data).split(END_OF_HEAD)
                if heads:
                    await stream.send_all(ANSWER * len(heads))


async def run(keys: list[str], urls: list[str]) -> None:
    places = trio.Semaphore(AT_ONCE)
    left = len(keys)
    all_connected = trio.Event()

    async def gateway(key: str, url: str) -> None:
        nonlocal left
        async with (
            open_tunnel(url, key=RelayKey(key), connect_timeout=60, heartbeat=60) as tunnel,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(trio.serve_listeners, answer, [tunnel])
            await tunnel.wait_connected()
            places.release()
            left -= 1
            if not left:
                all_connected.set()

    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            nursery.start_soon(_end_at_signal, signals, nursery.cancel_scope)
            for number, key in enumerate(keys):
                await places.acquire()
                nursery.start_soon(gateway, key, urls[number % len(urls)])
            await all_connected.wait()
            print("connected", flush=True)
            await trio.sleep_forever()


async def _end_at_signal(signals: object, scope: trio.CancelScope) -> None:
    async for _ in signals:  # type: ignore[attr-defined]  # Trio's type is private
        scope.cancel()


def main() -> None:
    allow_many_descriptors()
    keys, *urls = sys.argv[1:]
    trio.run(run, Path(keys).read_text().split(), urls)


if __name__ == "__main__":
    main()
