"""A relay in a thread of its own, for hosts that are not Trio's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio
from rig import HANG, RelayRig, relay_rig, tunnel_entry

__all__ = ["running_relay"]


@contextmanager
def running_relay(**changes: Any) -> Iterator[RelayRig]:
    """The relay's tunnel has a port of its own for visitors."""
    found: list[RelayRig] = []
    stop: list[Callable[[], None]] = []
    up = threading.Event()

    async def main() -> None:
        async with relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")], **changes) as rig:
            found.append(rig)
            end, token = trio.Event(), trio.lowlevel.current_trio_token()
            stop.append(lambda: token.run_sync_soon(end.set))
            up.set()
            await end.wait()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert up.wait(HANG)
    try:
        yield found[0]
    finally:
        stop[0]()
        thread.join()
