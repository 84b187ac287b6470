"""Keeps a resumable link of the native transport supplied: when its WebSocket is lost, dial again and resume.

The supervisor sees one session all the while. It is told of the loss, of each attempt that fails, and when the link is
restored. What a redial cannot heal ends the session with its error: the relay rejects the key, does not know the
session any more, or is not reached in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.errors import LinkLostError, RemoteProtocolError, TunnelError
from .._net.adopted import Watched
from .._wire.handshake import Welcome
from .._wire.resumption import Confirmation, GatewayResumption, Suspended
from ..resume import DEFAULT_WINDOW, Carrier, Loss, ResumableLink, Tail
from ..websocket import Message, WebSocket, WebSocketLink
from .interface import LinkLost, Report, Target

__all__ = ["Opened", "Resuming"]

STEADY: Final = 10.0
"""Seconds that a restored link has to last, so that its next loss is not one more failed attempt."""


def _ignore(_text: str) -> None:
    """Nothing is received before the user of the carrier has set `on_text`."""


@final
@attrs.frozen(kw_only=True)
class Opened:
    """A WebSocket to the relay, after the handshake.

    Attributes:
        websocket: open.
        watched: the stream below.
        welcome: the relay's.
        early: messages that came with the welcome.
        heartbeat: seconds, as both ends have agreed.
        confirmation: of the extension `resume`; None if it is not in force.
    """

    websocket: WebSocket
    watched: Watched
    welcome: Welcome
    early: list[Message]
    heartbeat: float
    confirmation: Confirmation | None

    def carrier(self, gone: trio.Event) -> Carrier:
        """The WebSocket as a carrier, whose user sets `on_text`."""
        return Carrier(WebSocketLink(self.websocket, self.watched, _ignore, self.early), gone)


@final
class Resuming:
    """A session's link, and the task that keeps it supplied.

    Args:
        session: its id.
        carrier: the first one. Whoever opened it closes it.
        confirmation: the relay's.
        target: what to dial.
        timeout: seconds that this end keeps the session.
        heartbeat: seconds of silence after which this end pings.
        report: takes the events.
        on_text: called with each text of the relay.
        on_restored: called when the session goes on.
        reopen: opens a WebSocket to the relay, and asks for the session in the handshake.

    Attributes:
        link: for yamux.
    """

    def __init__(
        self,
        session: str,
        carrier: Carrier,
        confirmation: Confirmation,
        target: Target,
        *,
        timeout: float,
        heartbeat: float,
        report: Report,
        on_text: Callable[[str], None],
        on_restored: Callable[[], None],
        reopen: Callable[[GatewayResumption], AbstractAsyncContextManager[Opened]],
    ) -> None:
        self.link: Final = ResumableLink(
            carrier,
            Tail(window=DEFAULT_WINDOW, peer_window=confirmation.window),
            timeout=confirmation.timeout,
            on_text=on_text,
            on_lost=self._lost,
        )
        self._suspended: Final = Suspended(session=session, secret=confirmation.secret, counters=self.link.pause)
        self._target: Final = target
        self._timeout: Final = timeout
        self._heartbeat: Final = heartbeat
        self.link.on_doubt = self.suspect
        self._report: Final = report
        self._on_restored: Final = on_restored
        self._reopen: Final = reopen
        self._suspected_at: float | None = None
        self._restored_at = -math.inf
        self._failed = 0  # attempts in a row, also those whose link was soon lost
        self._loss: LinkLostError
        self._wanted = trio.Event()

    async def run(self) -> NoReturn:
        """Find a new carrier whenever there is none, or the current one is suspected.

        Raises:
            TunnelError: the session cannot be resumed.
        """
        async with trio.open_nursery() as carriers:
            carriers.start_soon(self.link.run)
            while True:
                # No deadline: most links are never lost.
                await self._wanted.wait()
                await self._find_carrier(carriers)
                self._wanted = trio.Event()

    def suspect(self) -> None:
        """The current carrier seems dead: look for another one, and use the current one until that has proved itself.

        Does not wait.
        """
        if self._suspected_at is None:
            self._suspected_at = trio.current_time()
            self._wanted.set()

    def _lost(self, loss: Loss) -> None:
        self._target.redial.note_lost(stuck=loss.stuck, silence=loss.silence, heartbeat=self._heartbeat)
        self._loss = LinkLostError(f"the link to {self._target.address} is lost: {loss.reason}")
        self._report(LinkLost(self._loss))
        self._wanted.set()

    async def _find_carrier(self, carriers: trio.Nursery) -> None:
        if trio.current_time() >= self._restored_at + STEADY:
            self._failed = 0
        while self.link.suspended or self._is_silent:
            if self.link.suspended and trio.current_time() < self._restored_at + STEADY:
                self._restored_at = -math.inf
                await self._wait(self._loss)
            try:
                await carriers.start(self._hold)
            except TunnelError as error:
                if self.link.suspended and (error.final or error.retry_slowly or isinstance(error, _NotResumable)):
                    raise
                await self._wait(error)
            else:
                self._suspected_at = None
                self._restored_at = trio.current_time()
                if not self.link.suspended:  # it may be lost again already
                    self._target.redial.note_up()
                    self._on_restored()
        self._suspected_at = None

    async def _wait(self, error: TunnelError) -> None:
        """Wait before the next attempt, because of `error`. A check that is asked for ends this."""
        delay = max(self._target.redial_delay(self._failed), error.retry_after or 0)
        self._failed += 1
        if self.link.suspended:
            self._report(LinkLost(error, retry_in=delay))
        with trio.move_on_after(delay):
            await self._target.checks.asked()

    @property
    def _is_silent(self) -> bool:
        """Whether nothing has come from the current carrier since it is suspected."""
        return self._suspected_at is not None and self.link.last_received <= self._suspected_at

    async def _hold(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Open a WebSocket, let it carry the link, and close it when the link has no more use for it."""
        resumption = GatewayResumption(timeout=self._timeout, window=DEFAULT_WINDOW, suspended=self._suspended)
        link = self.link
        attached = False
        try:
            async with self._reopen(resumption) as opened:
                counters = None if opened.confirmation is None else opened.confirmation.counters
                if counters is None:
                    raise _NotResumable(f"{self._target.address} does not have this gateway's session any more")
                try:
                    link.check(counters)
                except RemoteProtocolError as error:
                    raise _NotResumable(f"{self._target.address} cannot go on with the session: {error}") from error
                carrier = opened.carrier(trio.Event())
                attached = True
                task_status.started()
                await link.attach(carrier, counters)
                # No deadline: the session's end gives the carrier up. Shielded, since yamux says goodbye over it.
                with trio.CancelScope(shield=True):
                    await carrier.gone.wait()
        finally:
            if not attached:
                link.go_on()


@final
class _NotResumable(LinkLostError):
    """Another attempt to resume is in vain."""
