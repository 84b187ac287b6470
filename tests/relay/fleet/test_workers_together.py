"""Workers with the directory that they share: whichever one a visitor reaches, it gets to its gateway."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, final

import pytest
import trio
from rig import (
    AT_ONCE,
    HANG,
    HOST,
    KEY,
    RELAY_NAME,
    connect,
    eventually,
    no_hang,
    read_exactly,
    relay_config,
    request,
    tunnel_entry,
)

from pioneer_tunnel import RelayKey, TunnelStream, open_tunnel
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay import Relay, RelayAddresses
from pioneer_tunnel.relay.fleet import passing as passing_module
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.node_links import NodeLinks
from pioneer_tunnel.relay.fleet.passing import SocketPassing
from pioneer_tunnel.relay.fleet.peers import Asked, Order
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.gateways.registry import LiveSession

SHOP: Final = "shop.test"
SHOP_KEY: Final = RelayKey("ptk1_the-key-of-the-shop-0123456789abcdef")
TUNNELS: Final = [
    tunnel_entry(),
    tunnel_entry(id="shop", url=f"http://{SHOP}", key=str(SHOP_KEY.identity().public_key)),
]
PROCESSES: Final = ("a" * 16, "b" * 16)


@final
class Worker:
    """A worker of two, in this process."""

    def __init__(self, number: int, folder: Path, records: MemoryRecords) -> None:
        other = 1 - number
        process = PROCESSES[number]
        network = WorkerNetwork(f"m/{number}", process, folder, lambda pid: f"m/{other}", workers=2)
        asked = _Asked()
        self.links: Final = NodeLinks(f"m/{number}", process, asked, workers=network, random=random.Random(1))
        self.directory: Final = FleetDirectory(MemoryStore(records, f"m/{number}", process=process), self.links)
        asked.directory = self.directory
        self.passing: Final = SocketPassing(network, self._where, random.Random(1))
        self.relay: Final = Relay(
            relay_config(tunnels=TUNNELS), directory=self.directory, passing=self.passing, nodes=self.links
        )
        self.addresses: RelayAddresses

    def _where(self, tunnel_id: str) -> Holding | None:
        with suppress(trio.WouldBlock):
            holder = self.directory.find_nowait(tunnel_id)
            return holder.holding if isinstance(holder, RemoteSession) else None
        return None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.links.run)
            await nursery.start(self.directory.run)
            self.addresses = await nursery.start(self.relay.serve)
            task_status.started()


@final
class _Asked(Asked):
    directory: FleetDirectory

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return self.directory.local(tunnel_id, session_id)

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        return await self.directory.carry_out(tunnel_id, session_id, order)


async def tell(name: str, stream: TunnelStream) -> None:
    """Answer each request with the service and the visitor."""
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                for _ in range(data.count(b"\r\n\r\n")):
                    await stream.send_all(answer(name, stream.visitor))


def answer(name: str, visitor: Address | None) -> bytes:
    body = f"{name} {visitor}".encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@asynccontextmanager
async def two_workers(folder: Path) -> AsyncIterator[tuple[Worker, Worker]]:
    """The office is at the first worker, and the shop at the second one."""
    private = folder / "workers"
    private.mkdir(mode=0o700)
    records = MemoryRecords()
    workers = Worker(0, private, records), Worker(1, private, records)
    with no_hang():
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            for worker in workers:
                await nursery.start(worker.run)
            for worker, name, key in zip(workers, ("office", "shop"), (KEY, SHOP_KEY), strict=True):

                async def dial(host: str, port: int, worker: Worker = worker) -> trio.SocketStream:
                    return await connect(worker.addresses.control)

                tunnel = await stack.enter_async_context(
                    open_tunnel(f"ws://{RELAY_NAME}", key=key, dial=dial, restart=AT_ONCE, connect_timeout=HANG)
                )
                nursery.start_soon(trio.serve_listeners, partial(tell, name), [tunnel])
                await eventually(partial(_is_known, workers, name))
            yield workers
            nursery.cancel_scope.cancel()


async def _is_known(workers: tuple[Worker, Worker], tunnel_id: str) -> bool:
    return all([await worker.directory.find(tunnel_id) is not None for worker in workers])


@pytest.mark.parametrize("number", [0, 1])
async def test_a_kept_connection_reaches_whatever_it_asks_for(tmp_path: Path, number: int) -> None:
    """Its first request may pass it to the other worker. A later one for another tunnel takes a hop, either way."""
    async with two_workers(tmp_path) as workers:
        passed = []
        for _ in range(3):  # the first one opens the channel
            async with await connect(workers[number].addresses.ingress) as visitor:
                own = Address.of_socket(visitor.socket.getsockname())
                for name, host in [("office", HOST), ("shop", SHOP), ("shop", SHOP), ("office", HOST)]:
                    await visitor.send_all(request(host=host))
                    wanted = answer(name, own)
                    assert await read_exactly(visitor, len(wanted)) == wanted
            await trio.sleep(0.01)
            passed.append(workers[number].passing.passed)
        assert passed == ([0, 1, 2] if number else [0, 0, 0])


async def test_a_worker_of_another_version_is_passed_no_visitors_and_serves_them_by_a_hop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_workers(tmp_path) as workers:
        monkeypatch.setattr(passing_module, "VISITORS", "visitors.other")  # where each one looks for the other
        for _ in range(3):
            for worker, name, host in zip(workers, ("shop", "office"), (SHOP, HOST), strict=True):
                async with await connect(worker.addresses.ingress) as visitor:
                    wanted = answer(name, Address.of_socket(visitor.socket.getsockname()))
                    await visitor.send_all(request(host=host))
                    assert await read_exactly(visitor, len(wanted)) == wanted
        assert [worker.passing.passed for worker in workers] == [0, 0]
        assert [worker.links.hops_served for worker in workers] == [3, 3]
    for number in range(2):
        line = (
            f"no visitors can be passed to node m/{number}, they take a hop: that process has ended, or is of another"
        )
        assert line in caplog.text
