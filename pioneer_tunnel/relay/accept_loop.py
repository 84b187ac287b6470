"""Accepting connections, also when there are too many of them.

`trio.serve_listeners` is for a server that is never out of descriptors: it logs a traceback for each accept that fails.
Here whoever is turned away gets a reset before a task is made for it, and what goes wrong many times a second is not
logged each time.

Neighbours: `server` and `listeners` say what happens to a connection; `admission` decides whether it is let in.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn, TypeAlias, final

import trio

from .._model.addresses import Address
from .._net.log_limiter import Complaints
from .._net.socket_options import reset_on_close
from .admission import Admission, Arrival, TurnedAway

__all__ = ["Front", "Handler"]

ACCEPT_RETRY: Final = 0.1
"""Seconds until the next attempt, when the system has nothing left for one more connection."""

_OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_complaints: Final = Complaints(logging.getLogger("pioneer_tunnel.relay.server"))

Handler: TypeAlias = Callable[[trio.SocketStream, Arrival], Awaitable[None]]
"""Serves a connection, and closes it."""


@final
class Front:
    """Accepts connections for all listeners of a relay."""

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
        """Accept connections until cancelled, and close the listeners then.

        Args:
            handler: runs in a task of its own. It is cancelled when its connection makes way for another.
            connections: where these tasks are.
            only_visitors: whether no gateway comes here.

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
                    _complaints.tell(error.errno, f"no connection can be accepted: {error.strerror}")
                    await trio.sleep(ACCEPT_RETRY)
                else:
                    self._admit(connected, handler, connections, only_visitors)

    def _admit(
        self, connected: trio.SocketStream, handler: Handler, connections: trio.Nursery, only_visitors: bool
    ) -> None:
        scope = trio.CancelScope()

        def make_way() -> None:
            reset_on_close(connected.socket)
            scope.cancel()

        try:
            arrival = self._admission.arrive(
                _host_of(connected), trio.current_time(), make_way, only_visitors=only_visitors
            )
        except TurnedAway as reason:
            _complaints.tell(str(reason), f"a connection was turned away: {reason}")
            reset_on_close(connected.socket)
            connected.socket.close()
        else:
            connections.start_soon(_handle, connected, arrival, scope, handler)


async def _handle(connected: trio.SocketStream, arrival: Arrival, scope: trio.CancelScope, handler: Handler) -> None:
    try:
        with scope:
            await handler(connected, arrival)
    finally:
        arrival.leave()
        await trio.aclose_forcefully(connected)


def _host_of(connected: trio.SocketStream) -> str | None:
    try:
        return Address.of_socket(connected.socket.getpeername()).host
    except OSError:
        return None  # it is gone already
