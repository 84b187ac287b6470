"""Sessions that survive the loss of their connection: which there are, and how long and at what cost they are kept.

    carried     a connection carries the session's link
    suspended   the connection is lost. Streams and visitors stay, for `resume_timeout_ms` at most
    resumed     the gateway has come back, and has proved the key and the secret of the session

The task of a session runs in a nursery of the relay, since it outlives the connection. The task of a connection only
keeps the connection open while it carries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NoReturn, final

import attrs
import trio

from ..._model.errors import RemoteProtocolError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._wire.resumption import RelayResumption, ResumeChoice, SessionSecret
from ...resume import Carrier, Loss, ResumableLink
from ..limits import RelayLimits
from .session import GatewaySession

__all__ = ["Kept", "ResumableSessions", "hold"]

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at what suspended sessions hold."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.session"))


@final
@attrs.define(eq=False)
class Kept:
    """A session that can be resumed.

    Attributes:
        session, link, secret: of the session.
        attempts: how often a gateway has proved that it may resume it. Only the latest attempt counts.
    """

    session: GatewaySession
    link: ResumableLink
    secret: SessionSecret
    attempts: int = 0


@final
class ResumableSessions:
    """The resumable sessions of one relay.

    Args:
        limits: how many may be suspended, and what they may hold.
    """

    def __init__(self, limits: RelayLimits) -> None:
        self._most = limits.suspended_sessions
        self._most_bytes: Final = limits.suspended_bytes
        self._kept: Final[dict[str, Kept]] = {}
        self._suspended: Final[dict[str, Kept]] = {}  # the one that is suspended for the longest time comes first
        self._some_suspended = trio.Event()

    @property
    def suspended(self) -> int:
        """How many sessions wait for their gateway."""
        return len(self._suspended)

    def add(self, kept: Kept) -> None:
        """A session begins."""
        self._kept[kept.session.id] = kept

    def remove(self, session_id: str) -> None:
        """A session has ended. Does nothing if it is not one of these."""
        self._kept.pop(session_id, None)
        self._suspended.pop(session_id, None)

    def find(self, resumption: RelayResumption, choice: ResumeChoice, *, tunnel_id: str, key_id: str) -> Kept | None:
        """The session that a gateway asks for, and whose secret it has proved; None if it gets a new one.

        The gateway has proved `key_id`, which opens `tunnel_id` now.
        """
        kept = self._kept.get(choice.session or "")
        if kept is None or not resumption.is_proved(choice, kept.secret):
            return None
        session = kept.session
        if session.ended or kept.link.ended or (session.tunnel_id, session.key_id) != (tunnel_id, key_id):
            return None
        try:
            kept.link.check(choice.counters)
        except RemoteProtocolError as error:
            self.note_refused(kept, error)
            return None
        return kept

    def note_refused(self, kept: Kept, error: RemoteProtocolError) -> None:
        """A gateway that has the secret is elsewhere than the session."""
        _log(kept.session, "session_not_resumable", "cannot be resumed", error)

    def suspend(self, session_id: str, loss: Loss) -> None:
        """A session has lost its connection. Ends suspended sessions if there are too many."""
        kept = self._kept.get(session_id)
        if kept is None:
            return
        if not kept.session.entered:
            kept.link.end(loss.reason)
            return
        what = "has lost its connection, and waits for its gateway"
        _log(kept.session, "session_suspended", what, loss.reason)
        self._suspended.pop(session_id, None)
        self._suspended[session_id] = kept
        self._limit("too many sessions are suspended")
        self._limit_bytes()
        self._some_suspended.set()

    async def limit_bytes(self) -> NoReturn:
        """Keep what suspended sessions hold within the limit: their visitors may go on sending."""
        while True:
            # No deadline: most of the time no session is suspended.
            await self._some_suspended.wait()
            await trio.sleep(LOOK_INTERVAL)
            self._limit_bytes()
            if not self._suspended:
                self._some_suspended = trio.Event()

    def _limit_bytes(self) -> None:
        while sum(each.session.held for each in self._suspended.values()) > self._most_bytes:
            greediest = max(self._suspended.values(), key=lambda each: each.session.held)
            self._give_up(greediest, "suspended sessions hold too many bytes")

    def finish(self) -> None:
        """No gateway can come back any more: end the sessions that wait for one, now and from now on."""
        self._most = 0
        self._limit("the relay is stopping")

    def _limit(self, why: str) -> None:
        while len(self._suspended) > self._most:
            self._give_up(next(iter(self._suspended.values())), why)

    def resumed(self, kept: Kept) -> None:
        """A session has a connection again."""
        self._suspended.pop(kept.session.id, None)
        _log(kept.session, "session_resumed", "is resumed")

    def _give_up(self, kept: Kept, why: str) -> None:
        self._suspended.pop(kept.session.id)
        kept.link.end(trio.BrokenResourceError(why))


async def hold(carrier: Carrier, on_cancel: Callable[[], object]) -> None:
    """Keep the connection of `carrier` open until it is given up: the session says goodbye over it when it ends.

    `on_cancel` is called when the connection is to end now. No deadline: the caller has one.
    """
    try:
        await carrier.gone.wait()
    except trio.Cancelled:
        on_cancel()
        with trio.CancelScope(shield=True):
            await carrier.gone.wait()
        raise


def _log(session: GatewaySession, event: str, what: str, why: Exception | None = None) -> None:
    line = f"tunnel {session.tunnel_id}: session {session.id} {what}{'' if why is None else f': {why}'}"
    fields = about(event, tunnel=session.tunnel_id, session=session.id, reason=why)
    _log_limiter.log((what, session.tunnel_id), line, level=logging.INFO, about=fields)
