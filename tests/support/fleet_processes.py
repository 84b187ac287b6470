"""A fleet for tests: nodes as real processes, a real Redis, and a balancer before them, all on loopback."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, final

import trio
from programs import Program
from redis_server import RealRedis, real_redis
from rig import HANG, free_port, free_ports, wait_until

from pioneer_tunnel import RelayKey, Tunnel, TunnelStream, open_tunnel
from pioneer_tunnel._model.keys import SigningIdentity, new_relay_key
from pioneer_tunnel.relay import RelayStats
from pioneer_tunnel.relay.administration.fleet_file import write_node_key, write_operator_key
from pioneer_tunnel.relay.administration.running import RunningRelay, ask_running
from pioneer_tunnel.relay.fleet.keys import operator_identity
from pioneer_tunnel.relay.stats import FleetStats

__all__ = ["Fleet", "FleetNodeProcess", "ask", "fleet_of", "hashing_gateway"]

HEARTBEAT: Final = 1.0
"""Seconds of silence after which nodes ping gateways."""

_REPLACED: Final = "all workers are replaced"


@final
class FleetNodeProcess:
    """A node.

    Attributes:
        name: its name.
        control, ingress: its ports for gateways and visitors.
    """

    def __init__(self, name: str, folder: Path, options: Sequence[str], workers: int) -> None:
        self.name: Final = name
        self._options: Final = [*options, *(["--workers", str(workers)] if workers else [])]
        self.workers: Final = workers
        self.control: Final = free_port()
        self.ingress: Final = free_port()
        self.between: Final = free_ports(workers or 1)
        self.file: Final = folder / f"{name}.toml"
        self.log: Final = folder / f"{name}.log"
        self._program: Program | None = None
        self._successor: int | None = None
        self._started_at = 0

    @property
    def runs(self) -> bool:
        """Whether it was started, and neither killed nor stopped."""
        return self._program is not None or self._successor is not None

    def begin(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self._started_at = log.tell()
            # A parent starts its workers by its own command line, which a fork does not have.
            started = bool(self.workers)
            self._program = Program("relay", "--config", self.file, *self._options, stderr=log, started=started)

    @property
    def serves(self) -> bool:
        """Whether it has said that it serves."""
        assert self._program is not None
        assert self._program.process.poll() is None, self.lines
        return b"gateways at" in self.log.read_bytes()[self._started_at :]

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.begin()
        wait_until(lambda: self.serves)

    async def stats(self) -> FleetStats:
        """What it tells about itself as a node."""
        stats = (await self.running()).fleet
        assert stats is not None
        return stats

    async def running(self) -> RelayStats:
        """What it does, as `relay status` asks it."""
        return (await self._running()).stats

    async def _running(self) -> RunningRelay:
        with trio.fail_after(HANG):
            while (running := await ask_running(self.file)) is None:
                await trio.sleep(0.02)  # it listens before it answers there
        return running

    async def restart(self) -> None:
        """SIGUSR2: a successor takes over, and this process ends; or all workers are replaced."""
        assert self._program is not None
        replaced = self.lines.count(_REPLACED)
        self._program.process.send_signal(signal.SIGUSR2)
        if self.workers:
            with trio.fail_after(HANG):
                while self.lines.count(_REPLACED) == replaced:
                    await trio.sleep(0.05)
            return
        with trio.fail_after(HANG):
            while self._program.process.poll() is None:
                await trio.sleep(0.02)
        self._end()
        self._successor = (await self._running()).pid

    async def stop(self) -> None:
        """SIGTERM: it drains and ends."""
        assert self._program is not None
        self._program.process.send_signal(signal.SIGTERM)
        with trio.fail_after(HANG):
            while self._program.process.poll() is None:
                await trio.sleep(0.02)
        assert self._program.process.returncode == 0, self.lines
        self._end()

    def signal(self, number: int) -> None:
        os.kill(self._successor or self._program.process.pid, number)  # type: ignore[union-attr]

    def kill(self) -> None:
        """SIGKILL."""
        if self._successor is not None:
            os.kill(self._successor, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{self._successor}").exists())
            self._successor = None
        if self._program is not None:
            workers = self._worker_pids if self.workers else []
            for pid in [self._program.process.pid, *workers]:  # the parent first: it starts no more of them
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._program.process.wait()
            self._end()

    @property
    def _worker_pids(self) -> list[int]:
        """The processes that this one has started, and that have not ended."""
        assert self._program is not None
        parent = self._program.process.pid
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    def _end(self) -> None:
        assert self._program is not None
        if self._program.process.stdout is not None:
            self._program.process.stdout.close()
        self._program = None

    @property
    def lines(self) -> str:
        """What it has logged."""
        return self.log.read_text() if self.log.exists() else ""


@final
class Fleet:
    """Nodes with a Redis.

    Args:
        folder: for their files.
        redis: the Redis.
        names: of the nodes.
        options: more words of their commands.
        workers: of each node; 0 for nodes of one process.

    Attributes:
        nodes: the nodes, in the order of their names.
        keys: of the tunnels in the nodes' files, by id. The host of each is ID.test.
        operator: signs tunnels.
        balancer: the port that gateways dial.
    """

    def __init__(
        self,
        folder: Path,
        redis: RealRedis,
        names: Sequence[str],
        *,
        tunnels: Sequence[str],
        options: Sequence[str],
        workers: int,
    ) -> None:
        self.redis: Final = redis
        self.folder: Final = folder
        self.nodes: Final = [FleetNodeProcess(name, folder, options, workers) for name in names]
        self.keys: Final = {name: new_relay_key() for name in tunnels}
        self.balancer: Final = free_port()
        self._carried: Final[set[trio.SocketStream]] = set()
        key_file, public = write_operator_key(folder)
        self.operator: Final[SigningIdentity] = operator_identity(key_file)
        for name in names:
            write_node_key(name, folder)
        others = "\n".join(
            f'[[relay.fleet.nodes]]\nname = "{node.name}"\naddress = "127.0.0.1:{node.between}"\n'
            f'certificate = "{node.name}.pem"\nworkers = {workers or 1}\n'
            for node in self.nodes
        )
        own = "\n".join(
            f'[[relay.tunnels]]\nid = "{name}"\nurl = "http://{name}.test"\nkey = "{key.identity().public_key}"\n'
            for name, key in self.keys.items()
        )
        for node in self.nodes:
            node.file.write_text(
                f"""
                [relay]
                control_addr = "127.0.0.1:{node.control}"
                ingress_addr = "127.0.0.1:{node.ingress}"
                id = "fleet"
                public_names = ["127.0.0.1:{self.balancer}"]
                heartbeat_ms = {HEARTBEAT * 1000:.0f}

                [relay.fleet]
                node = "{node.name}"
                redis = "{redis.url}"
                listen = "127.0.0.1:{node.between}"
                key_file = "{node.name}.key"
                operator_key = "{public}"
                state_file = "{node.name}.db"
                """
                f"\n{others}\n{own}"
            )

    def cut_gateways(self) -> None:
        """Break all connections that gateways have through the balancer, as a network does that goes away."""
        while self._carried:
            self._carried.pop().socket.shutdown(trio.socket.SHUT_RDWR)

    @asynccontextmanager
    async def balanced(self, choose: Callable[[], Sequence[FleetNodeProcess]]) -> AsyncIterator[str]:
        """What gateways dial, while the block runs: each connection goes to the first of these nodes that accepts."""

        async def serve(client: trio.SocketStream) -> None:
            for node in choose():
                with suppress(OSError), trio.move_on_after(1):
                    server = await trio.open_tcp_stream("127.0.0.1", node.control)
                    break
            else:
                await client.aclose()
                return
            async with client, server:
                self._carried.add(client)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_copy, client, server, nursery)
                        nursery.start_soon(_copy, server, client, nursery)
                finally:
                    self._carried.discard(client)

        self._carried.clear()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_tcp, serve, self.balancer)
            yield f"ws://127.0.0.1:{self.balancer}"
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def gateway(
        self,
        key: RelayKey | str,
        *nodes: FleetNodeProcess,
        choose: Callable[[], Sequence[FleetNodeProcess]] | None = None,
    ) -> AsyncIterator[Tunnel]:
        """A gateway that is connected to the first of these nodes that takes it."""
        key = self.keys[key] if isinstance(key, str) else key
        async with self.balanced(choose or (lambda: nodes)) as url, open_tunnel(url, key=key) as tunnel:
            with trio.fail_after(HANG):
                await tunnel.wait_connected()
            yield tunnel


async def _copy(source: trio.SocketStream, to: trio.SocketStream, nursery: trio.Nursery) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await to.send_all(data)
        await to.send_eof()
        return
    nursery.cancel_scope.cancel()


@contextmanager
def fleet_of(
    folder: Path, *names: str, tunnels: Sequence[str] = ("office",), options: Sequence[str] = (), workers: int = 0
) -> Iterator[Fleet]:
    """A fleet that runs, while the block does."""
    with ExitStack() as stack:
        redis = stack.enter_context(real_redis())
        fleet = Fleet(folder, redis, names, tunnels=tunnels, options=options, workers=workers)
        for node in fleet.nodes:
            stack.callback(node.kill)
            node.begin()
        for node in fleet.nodes:
            wait_until(partial(getattr, node, "serves"))
        yield fleet


async def hashing_gateway(tunnel: Tunnel) -> None:
    """Answer each visitor with its address, and the SHA-256 of what it has sent."""

    async def serve(stream: TunnelStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += await stream.receive_some()
                head, _, body = head.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
                digest, got = hashlib.sha256(body), len(body)
                while got < length:
                    data = await stream.receive_some()
                    if not data:
                        return
                    digest.update(data)
                    got += len(data)
                answer = f"{stream.visitor} {digest.hexdigest()}".encode()
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    await trio.serve_listeners(serve, [tunnel])


async def ask(node: FleetNodeProcess, host: str, body: bytes = b"") -> tuple[int, str, str]:
    """Send a request to a node. Returns the status, the answer, and the address that it was sent from."""
    async with await trio.open_tcp_stream("127.0.0.1", node.ingress) as visitor:
        address = "{}:{}".format(*visitor.socket.getsockname())
        head = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        await visitor.send_all(head.encode() + body)
        answer = b"".join([data async for data in visitor])
    start, _, rest = answer.partition(b"\r\n\r\n")
    return int(start.split()[1]) if start else 0, rest.decode(), address
