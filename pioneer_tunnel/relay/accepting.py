"""Accepting connections, also when there are too many of them.

`trio.serve_listeners` is for a server that is never out of descriptors: it logs a traceback for each accept that fails.
Here whoever is turned away gets a reset before a task is made for it, and of what goes wrong many times a second one
line a minute tells.

Neighbours: `server` says who is admitted and what happens then; `admission` decides.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn, TypeVar, final

import trio

from ..streams import reset_on_close
from .admission import TurnedAway

__all__ = ["Complaints", "serve_admitted"]

ACCEPT_RETRY: Final = 0.1
"""Seconds until the next attempt, when the system has nothing left for one more connection."""

COMPLAINT_INTERVAL: Final = 60.0
"""Seconds for which one line in the log has to do."""

_OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_log: Final = logging.getLogger("pioneer_tunnel.relay.server")

_Admitted = TypeVar("_Admitted")


async def serve_admitted(
    listeners: Sequence[trio.SocketListener],
    admit: Callable[[trio.SocketStream], _Admitted],
    handler: Callable[[trio.SocketStream, _Admitted], Awaitable[object]],
    complaints: Complaints,
) -> NoReturn:
    """Accept connections until cancelled, and close the listeners then.

    Args:
        admit: called with each connection; what it returns goes to the handler. It must not wait. When it raises
            `TurnedAway`, the connection is reset.
        handler: runs in a task of its own, and closes the connection. It raises nothing but `trio.Cancelled`.
        complaints: where what goes wrong is told.

    Raises:
        OSError: a listener is broken.
    """
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, admit, handler, nursery, complaints)
    raise AssertionError("listeners end only by being cancelled")


async def _accept(
    listener: trio.SocketListener,
    admit: Callable[[trio.SocketStream], _Admitted],
    handler: Callable[[trio.SocketStream, _Admitted], Awaitable[object]],
    nursery: trio.Nursery,
    complaints: Complaints,
) -> NoReturn:
    async with listener:
        while True:
            try:
                connected = await listener.accept()
            except OSError as error:
                if error.errno not in _OVERLOADED:
                    raise
                complaints.add(f"no connection can be accepted: {error.strerror}")
                await trio.sleep(ACCEPT_RETRY)
                continue
            try:
                admitted = admit(connected)
            except TurnedAway as reason:
                complaints.add(f"a connection was turned away: {reason}")
                reset_on_close(connected.socket)
                connected.socket.close()
            else:
                nursery.start_soon(_handle, connected, admitted, handler)


async def _handle(
    connected: trio.SocketStream,
    admitted: _Admitted,
    handler: Callable[[trio.SocketStream, _Admitted], Awaitable[object]],
) -> None:
    try:
        await handler(connected, admitted)
    finally:
        await trio.aclose_forcefully(connected)


@final
class Complaints:
    """Says the same once a minute, and how often it would have."""

    def __init__(self) -> None:
        self._seen: Final[dict[str, tuple[float, int]]] = {}

    def add(self, text: str) -> None:
        """Log `text`, of which there are few different ones, unless that was done less than a minute ago."""
        now = trio.current_time()
        logged_at, unsaid = self._seen.get(text, (-COMPLAINT_INTERVAL, 0))
        if now - logged_at < COMPLAINT_INTERVAL:
            self._seen[text] = logged_at, unsaid + 1
            return
        self._seen[text] = now, 0
        _log.warning("%s%s", text, f" ({unsaid} more since the last such line)" if unsaid else "")
