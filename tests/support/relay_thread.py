"""A relay and a local server in threads of their own, for hosts that are not Trio's."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from rig import HANG, RelayRig, relay_rig, tunnel_entry

__all__ = ["local_echo", "relay_in_thread", "running_relay"]


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


@pytest.fixture(scope="module")
def relay_in_thread() -> Iterator[RelayRig]:
    """One relay for all tests of a file."""
    with running_relay() as rig:
        yield rig


@contextmanager
def local_echo() -> Iterator[str]:
    """The address of a local server, with a thread for each connection, that sends back what comes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1000):
                self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
