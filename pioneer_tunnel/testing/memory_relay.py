"""A whole relay in memory: the doors of a real one, with real WebSocket and yamux bytes, over connections in memory.

    async with open_memory_relay(FaultPlan([Refuse(), Up(60.0)])) as relay:
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
            ...
            visitor = await relay.visit()
            await visitor.send_all(b"hello")

There is no socket and no thread, so under `trio.testing.MockClock` a day of heartbeats costs seconds. A relay
sees everything that happens, so it can be asked what nobody could know in the field: whether a visitor would get
through to the gateway at this moment (`reachable`), and when the gateway tried to connect, and why in vain (`dials`).

Repeatable are times, sizes and, in `virtual_time`, the order of tasks. Nonces, session ids and WebSocket masks are not:
they are as secret here as anywhere, and as long.

Neighbours: `relay.server` has the doors; `FaultyDialer` has the gateway come in; `memory_stream` is the wire.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn, TypeAlias, final

import trio

from .._model.addresses import Address
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._net.adopted import watch
from .._net.tls.certificate import Certificate
from ..relay.accept_loop import contain_errors
from ..relay.config import RelayConfig, TunnelEntry
from ..relay.gateways.endpoint import GatewayEndpoint
from ..relay.visitors.ingress import Ingress, Visit
from ..websocket import EngineName
from .faults import FaultPlan
from .faulty_dialer import Dial, FaultyDialer
from .impostor import Impostor, impersonate, secured
from .memory_directory import Sessions, Tunnels, dial_of_this_task
from .memory_stream import MemoryConnection, MemoryStream
from .virtual_time import stop_the_clock_for_threads, wall_clock

__all__ = ["MemoryRelay", "open_memory_relay"]

KEY: Final = RelayKey("ptk1_the-key-of-the-test-kit-0123456789abcdef")
NAME: Final = "relay.test"
TUNNEL: Final = "office"
INGRESS: Final = Address("198.51.100.1", 443)
LOCAL: Final = Address("127.0.0.1", 17878)

_Task: TypeAlias = Callable[[], Awaitable[None]]
_Server: TypeAlias = Callable[[MemoryStream], Awaitable[object]]


@final
class MemoryRelay:
    """See the module; `open_memory_relay` makes one that runs.

    Args:
        plan: what goes wrong for the gateway that connects through `dial` (default: nothing).
        heartbeat: seconds of silence after which an end of a link pings, 1 to 60 (default 15). A link is dead after
            twice as many.
        certificate: makes it a relay of `wss://`.
        engine: the WebSocket engine at its end; None for the fastest that is installed.

    Attributes:
        dial: the `Dialer` of a gateway: for `open_tunnel(dial=...)` and `RemoteAccess(dial=...)`. A second gateway
            gets a `FaultyDialer` of its own.
        key: the key of the tunnel that there is from the start, `"office"`.
        heartbeat: what was given.
    """

    def __init__(
        self,
        plan: FaultPlan | None = None,
        *,
        heartbeat: float = 15.0,
        certificate: Certificate | None = None,
        engine: EngineName | None = None,
    ) -> None:
        self.key: Final = KEY
        self.heartbeat: Final = heartbeat
        self._certificate: Final = certificate
        self._tunnels: Final = Tunnels()
        self._sessions: Final = Sessions(self._wake)
        self._config: Final = RelayConfig(
            control_addr=self.address,
            ingress_addr=INGRESS,
            id="relay-in-memory",
            public_names=[NAME],
            control_tls=False,
            ingress_tls=False,
            heartbeat_ms=round(heartbeat * 1000),
        )
        self._control: Final = GatewayEndpoint(
            self._config, self._tunnels, self._sessions, engine=engine, wall_clock=wall_clock
        )
        self._ingress: Final = Ingress(self._tunnels, self._sessions)
        self._servers: Final[dict[Address, _Server]] = {}
        self._visitors = 0
        self._open: Final[list[Dial]] = []
        self._connections: trio.Nursery | None = None
        self._local_connections: trio.Nursery | None = None
        self._start = trio.Event()
        self._changed = trio.Event()
        self.register(TUNNEL, KEY)
        self.dial: Final = FaultyDialer(self, plan)

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._connections is not None

    # Where it is

    @property
    def address(self) -> Address:
        """Where gateways find it: a name that `dial` knows, and nobody else."""
        return Address(NAME, 443 if self._certificate else 80)

    @property
    def url(self) -> str:
        """What a gateway is configured with: `ws://relay.test`, or `wss://` with TLS."""
        return f"{'wss' if self._certificate else 'ws'}://{NAME}"

    def register(self, tunnel: str, key: RelayKey, *, service: str | None = None) -> None:
        """Have a tunnel of that id, whose visitors find it as `http://<id>.test`; one that there is gets a new key.

        Raises:
            InvalidSettingsError: the id or the service is none that a relay's file could have.
        """
        public_key = str(key.identity().public_key)
        self._tunnels.entries[tunnel] = TunnelEntry(
            id=tunnel, url=f"http://{tunnel}.test", key=public_key, service=service
        )

    def revoke(self, tunnel: str = TUNNEL) -> None:
        """Forget a tunnel. Its gateway stays connected, and will not be let in again."""
        del self._tunnels.entries[tunnel]

    # What it sees

    @property
    def dials(self) -> list[Dial]:
        """Every attempt to connect through `dial`, in order."""
        return self.dial.dials

    @property
    def dials_after_final(self) -> list[Dial]:
        """Those that should not have been made: what became of one before them was final."""
        return [dial for dial in self.dials if dial.after_final]

    @property
    def sessions(self) -> int:
        """How often a gateway that connected through `dial` was let in."""
        return sum(dial.connected_at is not None for dial in self.dials)

    @property
    def reachable(self) -> bool:
        """See `is_reachable`, for the tunnel that there is from the start."""
        return self.is_reachable(TUNNEL)

    def is_reachable(self, tunnel: str) -> bool:
        """Whether a visitor who came now would get through to the gateway: it is in, and its connection is whole."""
        dial = self._sessions.dials.get(tunnel)
        return dial is not None and dial.connection is not None and dial.connection.whole

    def is_silent(self, tunnel: str) -> bool:
        """Whether silence is all that the gateway can tell by that its last connection is dead."""
        dial = self._sessions.last_dials.get(tunnel)
        return dial is not None and dial.connection is not None and dial.connection.silent

    async def wait_reachable(self, tunnel: str = TUNNEL, *, reachable: bool = True) -> None:
        """Wait until visitors get through to the gateway, or until they do not. The caller sets the deadline."""
        await trio.lowlevel.checkpoint()
        while self.is_reachable(tunnel) is not reachable:
            await self.change()

    def follow(self, plan: FaultPlan) -> None:
        """Have `dial` go by another plan, from its beginning; see `FaultyDialer.follow`."""
        self.dial.follow(plan)

    async def played(self) -> None:
        """Wait until the plan of `dial` is played out, see `FaultyDialer.played`. The caller sets the deadline."""
        await self.dial.played()

    async def change(self) -> None:
        """Wait until a gateway has come in or gone, or its connection is another than before; so `reachable` may be.

        The caller sets the deadline.
        """
        await self._changed.wait()

    # What happens to it

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Be a relay until cancelled, through `stop` and `start`."""
        stop_the_clock_for_threads()
        try:
            async with trio.open_nursery() as self._local_connections:
                while True:
                    async with trio.open_nursery() as self._connections:
                        self._wake()
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                        # No deadline here and below: that is for `stop` and `start` to say.
                        self._connections.start_soon(trio.sleep_forever)
                    self._connections = None
                    self._wake()
                    await self._start.wait()
        finally:
            self._connections = self._local_connections = None
            self._wake()

    async def stop(self, *, abruptly: bool = False) -> None:
        """Stop listening, close all connections, and wait until that is done.

        Args:
            abruptly: cut the connections; by default the relay takes its leave of gateways.
        """
        self._start = trio.Event()
        if self._connections is not None:
            if abruptly:
                self.cut()
            self._connections.cancel_scope.cancel()
        while self.running:
            await self.change()  # no deadline: taking leave has one

    async def start(self) -> None:
        """Listen again, after `stop`."""
        self._start.set()
        while not self.running:
            await self.change()  # no deadline: it takes no time

    def cut(self) -> None:
        """Cut the connections of all gateways."""
        for dial in [*self._open]:
            assert dial.connection is not None
            dial.connection.cut()

    async def reconnect(self, tunnel: str = TUNNEL) -> None:
        """Cut the gateway's connection, and wait until it has come back. The caller sets the deadline.

        Raises:
            RuntimeError: the gateway is not connected.
        """
        dial = self._sessions.dials.get(tunnel)
        if dial is None or dial.connection is None:
            raise RuntimeError(f"no gateway is connected to the tunnel {tunnel!r}; wait_reachable waits for it")
        dial.connection.cut()
        while self._sessions.dials.get(tunnel) in {None, dial}:
            await self.change()

    def listen(self, server: _Server, address: Address = LOCAL) -> None:
        """Have `server` take the connections that `dial` makes to another address: the local gateway, say.

        Args:
            server: gets a stream for each connection, and closes it.
            address: by default where a gateway listens unless told otherwise, `127.0.0.1:17878`.
        """
        self._servers[address] = server

    def stop_listening(self, address: Address = LOCAL) -> None:
        """Take no more connections at `address`; those that there are go on."""
        self._servers.pop(address, None)

    # Who comes

    async def visit(self, tunnel: str = TUNNEL) -> MemoryStream:
        """Come as a visitor, at an address of the tunnel's own: every byte goes to the gateway, and back.

        While the gateway is not connected the stream is reset. To end one direction there is `send_eof`; to leave,
        `aclose` or `reset`.

        Raises:
            ConnectionRefusedError: the relay does not run.
            KeyError: there is no such tunnel.
        """
        entry = self._tunnels.entries[tunnel]
        return await self._visit(lambda visit: self._ingress.serve_bound(visit, entry))

    async def visit_http(self) -> MemoryStream:
        """Come as a visitor, at the door for all tunnels: the request's `Host` says which, and who is refused is told.

        Raises:
            ConnectionRefusedError: the relay does not run.
        """
        return await self._visit(self._ingress.serve)

    async def _visit(self, serve: Callable[[Visit], Awaitable[None]]) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        if self._connections is None:
            raise ConnectionRefusedError("this MemoryRelay does not run")
        self._visitors += 1
        number = self._visitors
        connection = MemoryConnection()
        visit = Visit(
            stream=watch(connection.server),
            visitor=Address(f"192.0.2.{1 + number % 250}", 40_000 + number % 20_000),
            local=INGRESS,
            tls=False,
        )

        async def serve_visitor(_: MemoryStream) -> None:
            await serve(visit)

        self._connections.start_soon(_serve, serve_visitor, connection.server)
        return connection.client

    # For `FaultyDialer`

    def new_connection(self) -> MemoryConnection:
        """See `RelayInMemory`."""
        return MemoryConnection(on_change=self._wake)

    def serve(self, dial: Dial, impostor: Impostor | None, meanwhile: Sequence[_Task]) -> None:
        """See `RelayInMemory`."""
        assert self._connections is not None
        self._connections.start_soon(self._serve_gateway, dial, impostor, meanwhile)

    async def connect_local(self, address: Address) -> MemoryStream:
        """See `RelayInMemory`."""
        await trio.lowlevel.checkpoint()
        server = self._servers.get(address)
        if server is not None and self._local_connections is not None:
            connection = MemoryConnection()
            self._local_connections.start_soon(_serve, server, connection.server)
            return connection.client
        if not address.is_ip:
            raise socket.gaierror(socket.EAI_NONAME, f"the test kit knows no {address.host!r}")
        raise ConnectionRefusedError(f"nobody listens at {address}; MemoryRelay.listen does")

    async def take_over(self, dial: Dial, *, own: bool) -> bool:
        """See `RelayInMemory`."""
        for tunnel, carrying in self._sessions.dials.items():
            if carrying is dial:
                await self._sessions.take_over(tunnel, own=own)
                return True
        return False

    async def _serve_gateway(self, dial: Dial, impostor: Impostor | None, meanwhile: Sequence[_Task]) -> None:
        connection = dial.connection
        assert connection is not None
        dial_of_this_task.set(dial)
        self._open.append(dial)
        try:
            async with trio.open_nursery() as nursery:
                for task in meanwhile:
                    nursery.start_soon(task)
                await _serve(partial(self._answer, impostor), connection.server)
                nursery.cancel_scope.cancel()
        finally:
            self._open.remove(dial)

    async def _answer(self, impostor: Impostor | None, connected: MemoryStream) -> None:
        if impostor is not None:
            await impersonate(impostor, connected, relay_id=self._config.id, certificate=self._certificate)
        else:
            await self._control.serve(*await secured(connected, self._certificate))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


async def _serve(server: _Server, connected: MemoryStream) -> None:
    """As a listener does it."""
    try:
        await contain_errors(server)(connected)
    finally:
        await trio.aclose_forcefully(connected)


@asynccontextmanager
async def open_memory_relay(
    plan: FaultPlan | None = None,
    *,
    heartbeat: float = 15.0,
    certificate: Certificate | None = None,
    engine: EngineName | None = None,
) -> AsyncIterator[MemoryRelay]:
    """A `MemoryRelay` that runs for the length of an `async with`; a single error comes out bare.

    That includes one that the body raises in a group, so that a test's own nursery does not hide its assertion.
    """
    relay = MemoryRelay(plan, heartbeat=heartbeat, certificate=certificate, engine=engine)
    with lone_error_bare():
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            yield relay
            nursery.cancel_scope.cancel()
