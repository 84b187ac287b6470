"""Accept connections, also under overload.

`trio.serve_listeners` logs a traceback for each accept that fails, and starts a task for each connection. Here a
connection over a limit is reset before anything is done for it, and log lines that others can cause are limited.

The event loop accepts where there is one; otherwise a task does.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from typing import Final, NoReturn, TypeAlias, TypeVar, final

import trio

from .._model.addresses import Address
from .._model.log_fields import about
from .._net.adopted import Watched, watch
from .._net.fastpath.stay import Stay
from .._net.log_limiter import LogLimiter
from .._net.socket_options import descriptor_of, keep_alive, limit_unsent, send_at_once
from .._net.tcp import TcpStream
from .._net.turn import Turn
from .admission import Admission, OverLimit
from .connection import Connection, address_of, log_unforeseen
from .request_head import READ_SIZE
from .tunnels import Route
from .visitors.passing import Passed, Passing, Stage

__all__ = ["AcceptLoop", "EarlyRoute", "Handler", "accept_next", "admit"]

_Accepted = TypeVar("_Accepted")

ACCEPT_RETRY: Final = 0.1
"""Seconds until the next accept, when the system is out of descriptors or memory."""

KEEPALIVE_IDLE: Final = 60
KEEPALIVE_INTERVAL: Final = 15
"""Seconds of TCP's keepalive: of silence before the first probe, and between probes."""

_ACCEPTS_PER_TURN: Final = 32
"""Connections that are accepted before others have their turn."""

_OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_BROKEN: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
_ANY: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104  # to recognise them
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.server"))

Handler: TypeAlias = Callable[[Connection], object]
"""Begins to serve a connection. It must not wait: for that, it calls `Connection.start`."""

EarlyRoute: TypeAlias = Callable[[bytes], Route | None]
"""Where a visitor goes whose first bytes these are; None if they do not say that. It must not wait."""


@final
class AcceptLoop:
    """Accepts the connections of all listeners of a relay.

    Args:
        admission: counts them.
        passing: passes visitors to other processes; None if there are none.
    """

    def __init__(self, admission: Admission, passing: Passing | None = None) -> None:
        self._admission: Final = admission
        self._passing: Final = passing

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        handler: Handler,
        connections: trio.Nursery,
        *,
        only_visitors: bool = False,
        early_route: EarlyRoute | None = None,
    ) -> NoReturn:
        """Accept connections until cancelled, then close the listeners.

        Args:
            listeners: as `open_listeners` makes them.
            handler: called for each connection.
            connections: the nursery of connections' tasks.
            only_visitors: True where gateways cannot connect: at a limit of visitors, connections are reset.
            early_route: with it, a visitor of another process is passed on before it takes a place here, if the event
                loop accepts. What was read of any other one is in `Connection.received` then. None where something else
                comes before the request, or if there is no other process.

        Raises:
            OSError: a listener is broken.
        """
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                acceptor = _Acceptor(
                    listener,
                    self._admission,
                    handler,
                    connections,
                    only_visitors=only_visitors,
                    passing=self._passing,
                    early_route=early_route,
                )
                nursery.start_soon(acceptor.serve)
        raise AssertionError("listeners end only by being cancelled")


@final
class _Acceptor:
    """Accepts at one listener. See `AcceptLoop.serve`."""

    def __init__(
        self,
        listener: trio.SocketListener,
        admission: Admission,
        handler: Handler,
        connections: trio.Nursery,
        *,
        only_visitors: bool,
        passing: Passing | None,
        early_route: EarlyRoute | None,
    ) -> None:
        self._listener: Final = listener
        self._admission: Final = admission
        self._handler: Final = handler
        self._connections: Final = connections
        self._only_visitors: Final = only_visitors
        self._passing: Final = passing
        self._early_route: Final = early_route
        self._context: Final = copy_context()  # the event loop may call back in any other
        self._turn: Final = Turn.current()
        # While the event loop accepts:
        self._stay: Stay | None = None
        self._socket: socket.socket | None = None
        self._local: Address | None = None  # the address of each connection's end here; None where it differs
        self._failure: OSError | None = None
        self._backlog = True  # those who wait now came before the listener had its options

    async def serve(self) -> NoReturn:
        """Accept until cancelled, then close the listener."""
        async with self._listener:
            with Stay() as stay:
                if stay.reactor.has_epoll and isinstance(self._listener, trio.SocketListener):
                    await self._serve_by_events(stay)
            while True:
                connected = await accept_next(self._listener.accept)
                keep_alive(connected.socket, idle=KEEPALIVE_IDLE, interval=KEEPALIVE_INTERVAL)
                peer = address_of(connected.socket.getpeername)
                connection = Connection(connected.socket, peer, self._local, self._connections, self._context)
                self._serve(connection, watch(connected, resets=True), trio.current_time())

    async def _serve_by_events(self, stay: Stay) -> None:
        """Returns if the event loop cannot watch the listener."""
        descriptor = descriptor_of(self._listener.socket)
        try:
            stay.reactor.watch(descriptor, self._on_events)
        except OSError:
            return
        self._stay = stay
        self._socket = listening = socket.socket(fileno=descriptor)  # the same one, without Trio around it
        listening.setblocking(False)  # Python may have given it a timeout, see `socket.setdefaulttimeout`
        self._again = stay.reactor.timer(self._accept)
        _prepare(listening)
        local = Address.of_socket(listening.getsockname())
        self._local = None if local.host in _ANY else local
        self._turn.run(self._accept)  # some may wait already
        try:
            await stay.wait()
        finally:
            self._socket = None
            self._again.close()
            stay.reactor.unwatch(descriptor)
            listening.detach()
        assert self._failure is not None
        raise self._failure

    def _on_events(self, events: int) -> None:  # noqa: ARG002  # the accept finds out
        self._accept()

    def _accept(self) -> int:
        """Accept those who wait, and let others have their turn in between."""
        now = self._turn.now()
        for _ in range(_ACCEPTS_PER_TURN):
            if self._socket is None:
                return 0  # it was queued before the end
            try:
                connected, name = self._socket.accept()
            except BlockingIOError:
                self._backlog = False
                return 0
            except OSError as error:
                self._fail(error)
                return 0
            if self._backlog:
                _prepare(connected)
            peer = Address.of_socket(name)
            if self._passing is None or self._early_route is None:
                self._serve_here(connected, peer, now)
            else:
                self._pass_or_serve(self._passing, self._early_route, connected, peer, now)
        assert self._stay is not None
        self._stay.reactor.queue(self._accept)
        return 0

    def _pass_or_serve(
        self, passing: Passing, early_route: EarlyRoute, accepted: socket.socket, peer: Address, now: float
    ) -> None:
        """Pass a connection on, if it is another process's. It takes no place here, and counts as accepted."""
        received, route, way = b"", None, None
        try:
            received = accepted.recv(READ_SIZE, socket.MSG_DONTWAIT)
            route = early_route(received)
            way = None if route is None else passing.way(route.entry.id)
        except OSError:
            pass  # nothing has come; or it is lost, which is found out again
        except Exception as error:  # noqa: BLE001  # it concerns this connection alone
            log_unforeseen(error)
        if way is not None and self._admission.count_passed(peer.host, now):
            local = self._local or address_of(accepted.getsockname)
            way.send_soon(
                Passed(accepted.detach(), Stage.REQUEST, peer, local, False, "", "", received), self._take_back
            )
        else:
            self._serve_here(accepted, peer, now, received, may_pass=route is None)

    def _take_back(self, passed: Passed) -> None:
        """Serve a connection that the other process did not take."""
        assert passed.peer is not None
        self._admission.cancel_passed(passed.peer.host)
        accepted = socket.socket(fileno=passed.descriptor)
        self._serve_here(accepted, passed.peer, self._turn.now(), passed.received, may_pass=False)

    def _serve_here(
        self, accepted: socket.socket, peer: Address, now: float, received: bytes = b"", *, may_pass: bool = True
    ) -> None:
        connection = Connection(accepted, peer, self._local, self._connections, self._context)
        connection.received, connection.may_pass = received, may_pass
        accepted.setblocking(False)
        self._serve(connection, TcpStream(accepted, resets=True, now=now), now)

    def _serve(self, connection: Connection, stream: Watched, now: float) -> None:
        connection.begin(stream)
        admit(connection, self._admission, self._handler, now, only_visitors=self._only_visitors)

    def _fail(self, error: OSError) -> None:
        assert self._stay is not None
        if error.errno in _OVERLOADED:
            _log_overload(error)
            self._again.move(trio.current_time() + ACCEPT_RETRY)
        elif error.errno in _BROKEN:
            self._failure = error
            self._stay.end()
        else:
            self._stay.reactor.queue(self._accept)  # that connection was lost before it was accepted


async def accept_next(accept: Callable[[], Awaitable[_Accepted]]) -> _Accepted:
    """Await `accept` until it returns. When the system is out of descriptors or memory, wait for some.

    Raises:
        OSError: the listener is broken.
    """
    while True:
        try:
            # No deadline: others connect when they want to.
            return await accept()
        except OSError as error:
            if error.errno in _BROKEN:
                raise
            if error.errno in _OVERLOADED:
                _log_overload(error)
                await trio.sleep(ACCEPT_RETRY)
            else:
                await trio.lowlevel.checkpoint()  # that connection was lost before it was accepted


def admit(
    connection: Connection,
    admission: Admission,
    handler: Handler,
    now: float,
    *,
    only_visitors: bool,
    passed: bool = False,
) -> None:
    """Count a new connection, and begin to serve it. If it is over a limit, reset it.

    Args:
        connection: whose `arrival` this sets.
        admission: counts it.
        handler: begins to serve it.
        now: the time in seconds.
        only_visitors: as of `AcceptLoop.serve`.
        passed: as of `Admission.arrive`.
    """
    peer = connection.peer
    try:
        connection.arrival = admission.arrive(
            None if peer is None else peer.host, now, connection.evict, only_visitors=only_visitors, passed=passed
        )
    except OverLimit as reason:
        admission.counts.refused(reason.reason)
        fields = about("connection_refused", peer=peer, reason=reason.reason)
        _log_limiter.log(str(reason), f"a connection was turned away: {reason}", about=fields)
        connection.reset()
        return
    try:
        handler(connection)
    except Exception as error:  # noqa: BLE001  # it concerns this connection alone
        log_unforeseen(error)
        connection.evict()


def _log_overload(error: OSError) -> None:
    fields = about("accept_failed", reason=error.strerror)
    line = f"no connection can be accepted: {error.strerror}"
    _log_limiter.log(error.errno, line, level=logging.ERROR, about=fields)


def _prepare(sock: socket.socket) -> None:
    """Set the options that each connection needs. On Linux it inherits them from the listener."""
    send_at_once(sock)
    limit_unsent(sock)
    keep_alive(sock, idle=KEEPALIVE_IDLE, interval=KEEPALIVE_INTERVAL)
