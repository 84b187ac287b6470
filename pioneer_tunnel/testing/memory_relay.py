"""A relay in memory: the real relay's endpoints, WebSocket and yamux, over connections in memory."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn, TypeAlias, final

import trio

from .._model.addresses import Address
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._net.adopted import watch
from .._net.dialing import Dialer
from .._net.tls.certificate import Certificate
from ..relay.config import RelayConfig
from ..relay.connection import contain_errors
from ..relay.gateways.endpoint import GatewayEndpoint
from ..relay.tunnels import TunnelEntry
from ..relay.visitors.ingress import Ingress
from ..relay.visitors.visit import Visit
from ..websocket import EngineName
from .faults import FaultPlan
from .faulty_dialer import Dial, FaultyDialer
from .impostor import Impostor, impersonate, secured
from .memory_directory import Sessions, Tunnels, dial_of_this_task
from .memory_stream import MemoryConnection, MemoryStream
from .virtual_time import stop_the_clock_for_threads, wall_clock

__all__ = ["MemoryRelay", "dial_memory_relays", "open_memory_relay"]

KEY: Final = RelayKey("ptk1_the-key-of-the-test-kit-0123456789abcdef")
NAME: Final = "relay.test"
TUNNEL: Final = "office"
INGRESS: Final = Address("198.51.100.1", 443)
LOCAL: Final = Address("127.0.0.1", 17878)

_Task: TypeAlias = Callable[[], Awaitable[None]]
_Server: TypeAlias = Callable[[MemoryStream], Awaitable[object]]


@final
class MemoryRelay:
    """A relay in memory that follows a plan of faults; `open_memory_relay` makes one that runs.

        async with open_memory_relay(FaultPlan([Refuse(), Up(60.0)])) as relay:
            async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
                ...
                visitor = await relay.visit()
                await visitor.send_all(b"hello")

    It uses no socket and no thread, so a day under `trio.testing.MockClock` takes seconds. It knows what a relay in the
    field does not: whether a visitor would get through to the gateway now (`reachable`), and each attempt of the
    gateway to connect, with its fault (`dials`).

    Times, sizes and, in `virtual_time`, the order of tasks are the same in each run. Nonces, session ids and WebSocket
    masks are random, of constant length.

    Args:
        plan: the faults for the gateway that connects through `dial` (default: none).
        heartbeat: seconds of silence after which each end of a link sends a ping, 1 to 60 (default 15). After twice
            that time without an answer the link is dead.
        certificate: the certificate of a `wss://` relay (default: None, a `ws://` relay).
        engine: the relay's WebSocket engine; None for the fastest that is installed.
        resume_timeout: seconds that the relay keeps the session of a gateway whose connection is cut (default 0: a cut
            ends the session at once).
        name: the relay's host name (default `"relay.test"`). For a gateway with several relays each has another one.

    Attributes:
        dial: the `Dialer` for `open_tunnel(dial=...)` and `RemoteAccess(dial=...)`. A second gateway needs a
            `FaultyDialer` of its own.
        key: the key of the tunnel `"office"`, which exists from the start.
        heartbeat: the argument `heartbeat`.
        name: the argument `name`.
    """

    def __init__(
        self,
        plan: FaultPlan | None = None,
        *,
        heartbeat: float = 15.0,
        certificate: Certificate | None = None,
        engine: EngineName | None = None,
        resume_timeout: float = 0.0,
        name: str = NAME,
    ) -> None:
        self.name: Final = name
        self.key: Final = KEY
        self.heartbeat: Final = heartbeat
        self._certificate: Final = certificate
        self._tunnels: Final = Tunnels()
        self._sessions: Final = Sessions(self._wake)
        self._config: Final = RelayConfig(
            control_addr=self.address,
            ingress_addr=INGRESS,
            id="relay-in-memory",
            public_names=[name],
            control_tls=False,
            ingress_tls=False,
            heartbeat_ms=round(heartbeat * 1000),
            resume_timeout_ms=round(resume_timeout * 1000),
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
        """Whether the relay accepts connections."""
        return self._connections is not None

    # Configure

    @property
    def address(self) -> Address:
        """The address that gateways connect to. Only `dial` can resolve its name."""
        return Address(self.name, 443 if self._certificate else 80)

    @property
    def url(self) -> str:
        """The relay address for a gateway's settings: `ws://relay.test`, or `wss://relay.test` with a certificate."""
        return f"{'wss' if self._certificate else 'ws'}://{self.name}"

    def register(self, tunnel: str, key: RelayKey, *, service: str | None = None, services: Sequence[str] = ()) -> None:
        """Add the tunnel `tunnel` with the public URL `http://<tunnel>.test`, or replace it.

        Args:
            tunnel: its id.
            key: the key that opens it.
            service: the label that the gateway has to name; None accepts any.
            services: the names of its services, if it has several. Each has the URL `http://<name>.<tunnel>.test`.

        Raises:
            InvalidSettingsError: the id, the service or a name is not valid in a relay's file.
        """
        self._tunnels.entries[tunnel] = TunnelEntry(
            id=tunnel,
            url=None if services else f"http://{tunnel}.test",
            key=str(key.identity().public_key),
            service=service,
            services=[{"name": name, "url": f"http://{name}.{tunnel}.test"} for name in services],
        )

    def revoke(self, tunnel: str = TUNNEL) -> None:
        """Remove a tunnel. Its gateway stays connected, but cannot connect again."""
        del self._tunnels.entries[tunnel]

    # Observe

    @property
    def dials(self) -> list[Dial]:
        """All attempts to connect through `dial`, in order."""
        return self.dial.dials

    @property
    def dials_after_final(self) -> list[Dial]:
        """The attempts that the gateway must not make: those after a final fault."""
        return [dial for dial in self.dials if dial.after_final]

    @property
    def sessions(self) -> int:
        """How often the relay has admitted a gateway that connected through `dial`."""
        return sum(dial.connected_at is not None for dial in self.dials)

    @property
    def reachable(self) -> bool:
        """`is_reachable` of the tunnel `"office"`."""
        return self.is_reachable(TUNNEL)

    def is_reachable(self, tunnel: str) -> bool:
        """Whether a visitor may get through now: the gateway has a session, and its connection is whole."""
        dials = self._sessions.dials.get(tunnel, ())
        return any(dial.connection is not None and dial.connection.whole for dial in dials)

    def is_silent(self, tunnel: str) -> bool:
        """Whether the gateway's last connection is a black hole, so that only a timeout can detect it."""
        dial = self._sessions.last_dials.get(tunnel)
        return dial is not None and dial.connection is not None and dial.connection.silent

    async def wait_reachable(self, tunnel: str = TUNNEL, *, reachable: bool = True) -> None:
        """Wait until `is_reachable(tunnel)` equals `reachable`. The caller sets the deadline."""
        await trio.lowlevel.checkpoint()
        while self.is_reachable(tunnel) is not reachable:
            await self.change()

    async def watch_network(
        self, changed: Callable[[str], object], relay_addresses: Callable[[], Collection[str]]
    ) -> None:
        """For `watch_network` of `open_tunnel` and `RemoteAccess`; see `FaultyDialer.watch_network`."""
        await self.dial.watch_network(changed, relay_addresses)

    def change_network(self) -> None:
        """See `FaultyDialer.change_network`."""
        self.dial.change_network()

    def sleep(self, seconds: float) -> None:
        """See `FaultyDialer.sleep`."""
        self.dial.sleep(seconds)

    def follow(self, plan: FaultPlan) -> None:
        """Start another plan of `dial`; see `FaultyDialer.follow`."""
        self.dial.follow(plan)

    async def played(self) -> None:
        """Wait until the plan of `dial` is played out, see `FaultyDialer.played`. The caller sets the deadline."""
        await self.dial.played()

    async def change(self) -> None:
        """Wait until `reachable` may have changed: a session begins or ends, or a connection breaks or recovers.

        The caller sets the deadline.
        """
        await self._changed.wait()

    # Run and break

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Run until cancelled. `stop` and `start` do not end it."""
        stop_the_clock_for_threads()
        try:
            async with trio.open_nursery() as self._local_connections:
                while True:
                    async with trio.open_nursery() as self._connections:
                        self._control.let_sessions_resume(self._connections)
                        self._wake()
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                        # No deadline here and below: `stop` and `start` end these waits.
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
            abruptly: cut the connections; by default the relay says goodbye to gateways.
        """
        self._start = trio.Event()
        if self._connections is not None:
            if abruptly:
                self.cut()
            self._connections.cancel_scope.cancel()
        while self.running:
            await self.change()  # no deadline: the goodbye has one

    async def start(self) -> None:
        """Listen again, after `stop`."""
        self._start.set()
        while not self.running:
            await self.change()  # no deadline: it takes no time

    def cut(self) -> None:
        """Cut the connections of all gateways, as with a RST."""
        for dial in [*self._open]:
            assert dial.connection is not None
            dial.connection.cut()

    async def reconnect(self, tunnel: str = TUNNEL) -> None:
        """Cut the gateway's newest connection, and wait for its next session. The caller sets the deadline.

        Raises:
            RuntimeError: the gateway is not connected.
        """
        before = [*self._sessions.dials.get(tunnel, ())]
        if not before or before[-1].connection is None:
            raise RuntimeError(f"no gateway is connected to the tunnel {tunnel!r}; wait_reachable waits for it")
        before[-1].connection.cut()
        while not any(dial not in before for dial in self._sessions.dials.get(tunnel, ())):
            await self.change()

    def listen(self, server: _Server, address: Address = LOCAL) -> None:
        """Start a server for the connections that `dial` makes to `address`, for example the local gateway.

        Args:
            server: an async function that takes a stream and closes it.
            address: where it listens (default `127.0.0.1:17878`, the default of `local_addr`).
        """
        self._servers[address] = server

    def stop_listening(self, address: Address = LOCAL) -> None:
        """Refuse new connections to `address`; open ones continue."""
        self._servers.pop(address, None)

    # Visit

    async def visit(self, tunnel: str = TUNNEL, *, service: str | None = None) -> MemoryStream:
        """Connect as a visitor of one tunnel, as to its `bind_addr`: the relay passes all bytes on unread.

        While the gateway is not connected, or does not take visitors of the service, the relay resets the stream.

        Args:
            tunnel: its id.
            service: one of the services that it was registered with; by default the first.

        Raises:
            ConnectionRefusedError: the relay does not run.
            KeyError: there is no such tunnel, or service.
        """
        routes = {route.service: route for route in self._tunnels.entries[tunnel].routes}
        route = routes[service] if service is not None else next(iter(routes.values()))
        return await self._visit(lambda visit: self._ingress.serve_bound(visit, route))

    async def visit_http(self) -> MemoryStream:
        """Connect as a visitor of the HTTP ingress: `Host` names the tunnel, and errors are HTTP responses.

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
        """Make a connection; the relay has its `server` end."""
        return MemoryConnection(on_change=self._wake)

    def serve(self, dial: Dial, impostor: Impostor | None, meanwhile: Sequence[_Task]) -> None:
        """Serve the connection of `dial`, as the relay or as `impostor`; run the tasks `meanwhile` until it ends."""
        assert self._connections is not None
        self._connections.start_soon(self._serve_gateway, dial, impostor, meanwhile)

    async def connect_local(self, address: Address) -> MemoryStream:
        """Connect to a server at an address other than the relay's."""
        await trio.lowlevel.checkpoint()
        server = self._servers.get(address)
        if server is not None and self._local_connections is not None:
            connection = MemoryConnection()
            self._local_connections.start_soon(_serve, server, connection.server)
            return connection.client
        if not address.is_ip:
            raise socket.gaierror(socket.EAI_NONAME, f"the test kit knows no {address.host!r}")
        raise ConnectionRefusedError(f"nothing listens at {address}; MemoryRelay.listen does")

    async def take_over(self, dial: Dial, *, own: bool) -> bool:
        """Let another session take over the tunnel of `dial`; False if `dial` has no session."""
        for tunnel, carrying in self._sessions.dials.items():
            if dial in carrying:
                await self._sessions.take_over(tunnel, own=own)
                return True
        return False

    async def drain(self, dial: Dial) -> bool:
        """See `RelayInMemory`."""
        for tunnel, carrying in self._sessions.dials.items():
            if dial in carrying:
                await self._sessions.drain(tunnel, dial)
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
    """Run `server` as an accept loop does: log its exception, and close the stream."""
    try:
        await contain_errors(connected, server, connected)
    finally:
        await trio.aclose_forcefully(connected)


def dial_memory_relays(*relays: MemoryRelay) -> Dialer:
    """A `Dialer` for a gateway with several relays in memory: each is dialled by its `dial`, with its plan.

    Other addresses are dialled by the first one.

    Args:
        relays: at least one, each with another `name`.
    """
    by_name = {relay.name: relay for relay in relays}

    async def dial(host: str, port: int) -> trio.abc.Stream:
        return await by_name.get(host, relays[0]).dial(host, port)

    return dial


@asynccontextmanager
async def open_memory_relay(
    plan: FaultPlan | None = None,
    *,
    heartbeat: float = 15.0,
    certificate: Certificate | None = None,
    engine: EngineName | None = None,
    resume_timeout: float = 0.0,
    name: str = NAME,
) -> AsyncIterator[MemoryRelay]:
    """Run a `MemoryRelay` during an `async with`. The arguments are those of `MemoryRelay`.

    A single exception is raised without its group, also if the body raises it in one: a nursery in a test does not hide
    the test's assertion.
    """
    relay = MemoryRelay(
        plan, heartbeat=heartbeat, certificate=certificate, engine=engine, resume_timeout=resume_timeout, name=name
    )
    with lone_error_bare():
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            yield relay
            nursery.cancel_scope.cancel()
