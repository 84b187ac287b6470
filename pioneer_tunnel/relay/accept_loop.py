"""Accept connections, also under overload.

`trio.serve_listeners` logs a traceback for each accept that fails, and starts a task for each connection. Here a
connection over a limit is reset before a task is started for it, and log lines that others can cause are limited.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, Final, NoReturn, ParamSpec, TypeAlias, TypeVar, final

import trio

from .._model.addresses import Address
from .._net.closing import abandon
from .._net.log_limiter import LogLimiter
from .._net.socket_options import reset_on_close
from .admission import Admission, Arrival, OverLimit

__all__ = ["AcceptLoop", "Handler", "contain_errors"]

ACCEPT_RETRY: Final = 0.1
"""Seconds until the next accept, when the system is out of descriptors or memory."""

_OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.server"))

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
P = ParamSpec("P")

Handler: TypeAlias = Callable[[trio.SocketStream, Arrival], Awaitable[None]]
"""Serves a connection, and closes it."""


@final
class AcceptLoop:
    """Accepts the connections of all listeners of a relay."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Final = admission

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        handler: Handler,
        connections: trio.Nursery,
        *,
        only_visitors: bool = False,
    ) -> NoReturn:
        """Accept connections until cancelled, then close the listeners.

        Args:
            handler: runs in a task of its own for each connection. The task is cancelled when its connection is
                evicted. What the handler raises is logged, see `contain_errors`.
            connections: the nursery of these tasks.
            only_visitors: True where gateways cannot connect: at a limit of visitors, connections are reset.

        Raises:
            OSError: a listener is broken.
        """
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept, listener, handler, connections, only_visitors)
        raise AssertionError("listeners end only by being cancelled")

    async def _accept(
        self, listener: trio.SocketListener, handler: Handler, connections: trio.Nursery, only_visitors: bool
    ) -> NoReturn:
        async with listener:
            while True:
                try:
                    connected = await listener.accept()
                except OSError as error:
                    if error.errno not in _OVERLOADED:
                        raise
                    _log_limiter.log(error.errno, f"no connection can be accepted: {error.strerror}")
                    await trio.sleep(ACCEPT_RETRY)
                else:
                    self._admit(connected, handler, connections, only_visitors)

    def _admit(
        self, connected: trio.SocketStream, handler: Handler, connections: trio.Nursery, only_visitors: bool
    ) -> None:
        scope = trio.CancelScope()

        def evict() -> None:
            reset_on_close(connected.socket)
            scope.cancel()

        try:
            arrival = self._admission.arrive(
                _host_of(connected), trio.current_time(), evict, only_visitors=only_visitors
            )
        except OverLimit as reason:
            _log_limiter.log(str(reason), f"a connection was turned away: {reason}")
            reset_on_close(connected.socket)
            connected.socket.close()
        else:
            connections.start_soon(_handle, connected, arrival, scope, handler)


async def _handle(connected: trio.SocketStream, arrival: Arrival, scope: trio.CancelScope, handler: Handler) -> None:
    try:
        with scope:
            await contain_errors(handler)(connected, arrival)
    finally:
        arrival.leave()
        if connected.socket.fileno() != -1:
            await trio.aclose_forcefully(connected)


def contain_errors(
    handler: Callable[Concatenate[StreamT, P], Awaitable[object]],
) -> Callable[Concatenate[StreamT, P], Awaitable[None]]:
    """Wrap a connection's handler so that its errors do not reach other connections.

    A broken connection or a timeout is ignored. Any other error is logged, and the connection is reset.
    """

    async def serve(connected: StreamT, /, *arguments: P.args, **named: P.kwargs) -> None:
        try:
            await handler(connected, *arguments, **named)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        except* Exception as error:  # noqa: BLE001  # whatever it is, it concerns this connection alone
            _log_limiter.log("unforeseen", "a connection failed in an unforeseen way", level=logging.ERROR, error=error)
            with trio.CancelScope(shield=True):
                await abandon(connected)

    return serve


def _host_of(connected: trio.SocketStream) -> str | None:
    try:
        return Address.of_socket(connected.socket.getpeername()).host
    except OSError:
        return None  # the peer has already closed it
