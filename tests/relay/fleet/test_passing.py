"""Visitors that reach the wrong worker are passed to the right one, as they are."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import trio
from node_rig import holding
from rig import AT_ONCE, HANG, KEY, RELAY_NAME, ask, connect, eventually, no_hang, relay_config, request

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay import Relay, RelayAddresses
from pioneer_tunnel.relay.fleet.passing import SocketPassing
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.gateways.registry import LocalDirectory
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import open_tunnel

Handler: TypeAlias = Callable[[TunnelStream], Awaitable[None]]
PROCESSES: Final = ("a" * 16, "b" * 16)


@final
class Worker:
    """A relay that is a worker, in this process. Its visitors belong to the other one unless it has the session."""

    def __init__(self, number: int, folder: Path, **changes: Any) -> None:
        other = 1 - number
        self.directory: Final = LocalDirectory()
        network = WorkerNetwork(f"m/{number}", PROCESSES[number], folder, lambda pid: f"m/{other}")
        there = holding(f"m/{other}", process=PROCESSES[other])
        self.passing: Final = SocketPassing(
            network,
            lambda tunnel_id: there if self.directory.find_nowait(tunnel_id) is None else None,
            random.Random(1),
        )
        self.relay: Final = Relay(relay_config(**changes), directory=self.directory, passing=self.passing)
        self.addresses: RelayAddresses

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self.addresses = await nursery.start(self.relay.serve)
            task_status.started()


@asynccontextmanager
async def workers(folder: Path, handler: Handler, **changes: Any) -> AsyncIterator[tuple[Worker, Worker]]:
    """Two workers: the first one has the gateway."""
    private = folder / "workers"
    private.mkdir(mode=0o700)
    near, far = Worker(0, private, **changes), Worker(1, private, **changes)
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(near.run)
            await nursery.start(far.run)

            async def dial(host: str, port: int) -> trio.SocketStream:
                return await connect(near.addresses.control)

            async with open_tunnel(
                f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE, connect_timeout=HANG
            ) as tunnel:
                nursery.start_soon(trio.serve_listeners, handler, [tunnel])
                await eventually(lambda: near.directory.find_nowait("office") is not None)
                async with await connect(far.addresses.ingress) as first:  # opens the channel, and is not passed
                    await ask(first, request())
                await trio.testing.wait_all_tasks_blocked(0.01)
                yield near, far
            nursery.cancel_scope.cancel()


async def tell(stream: TunnelStream) -> None:
    with suppress(trio.BrokenResourceError):
        digest = hashlib.sha256()
        async for data in stream:
            digest.update(data)
        await stream.send_all(f"{stream.visitor} {digest.hexdigest()}".encode())
        await stream.aclose()


async def test_a_request_is_passed_on(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (_near, far):
        sent = request(body=os.urandom(1024 * 1024))
        async with await connect(far.addresses.ingress) as visitor:
            own = Address.of_socket(visitor.socket.getsockname())
            received = await ask(visitor, sent)
        assert received.decode() == f"{own} {hashlib.sha256(sent).hexdigest()}"
        assert far.passing.passed == 1
        assert far.relay.stats().connections.open == 0
