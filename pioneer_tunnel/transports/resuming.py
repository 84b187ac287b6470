"""Keeps a resumable link of the native transport supplied: when its WebSocket is lost, dial again and resume.

The supervisor sees one session all the while. It hears of the loss, of each attempt that fails, and when the link is
restored. What a redial cannot heal ends the session with its error: the relay rejects the key, or is not reached in
time. A relay that does not have the session any more grants another one in the same handshake. Then `run` returns it.

When to dial depends on who else may have lost the link:

    the connection was silent, or the network has changed    this gateway alone: dial at once
    it was ended from outside                                perhaps all gateways, with their relay: take a share of
                                                             the time that the relay has asked for
    an attempt has failed                                    the same, after a delay that doubles
    the relay is busy                                        when it says
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, final

import attrs
import trio

from .._model.errors import LinkLostError, RemoteProtocolError, TunnelError
from .._model.exception_groups import lone_error_bare
from .._net.adopted import Watched
from .._wire.handshake import Welcome
from .._wire.resumption import Confirmation, GatewayResumption, Suspended
from ..resume import DEFAULT_WINDOW, Carrier, Loss, ResumableLink, Tail
from ..websocket import Message, WebSocket, WebSocketLink
from .interface import LinkLost, Report, Target

__all__ = ["Opened", "Redials", "Resuming"]

STEADY: Final = 5.0
"""Seconds that a restored link has to last, so that its next loss is not one more failed attempt.

That is as long as the longest delay between two attempts, so such a link costs its relay no more than failed attempts.
"""

ASKED_LATELY: Final = 10.0
"""Seconds after a check was asked for, as after a change of the network, in which a loss is put down to that."""


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
        node: as of the extension `node`; None if it is not in force.
        over: set when it carries no more.
    """

    websocket: WebSocket
    watched: Watched
    welcome: Welcome
    early: list[Message]
    heartbeat: float
    confirmation: Confirmation | None
    node: str | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    def carrier(self) -> Carrier:
        """The WebSocket as a carrier, whose user sets `on_text`."""
        # Nothing is received before the user of the carrier has set `on_text`.
        return Carrier(WebSocketLink(self.websocket, self.watched, early=self.early), self.over)

    async def hold(self) -> None:
        """Wait until it carries no more. No deadline: the session's end gives it up.

        Shielded, since yamux says goodbye over it.
        """
        with trio.CancelScope(shield=True):
            await self.over.wait()


@final
@attrs.define
class Redials:
    """How it went to restore links, for all sessions that follow each other in one run of the transport.

    Attributes:
        failed: attempts in a row, also those whose link was soon lost.
        restored_at: when a link was restored last.
    """

    failed: int = 0
    restored_at: float = -math.inf


@final
class Resuming:
    """A session's link, and the task that keeps it supplied.

    Args:
        opened: what carries the session first. The caller, who opened it, closes it.
        confirmation: the relay's.
        target: what to dial.
        redials: see `Redials`.
        timeout: seconds that this end keeps the session.
        report: takes the events.
        on_text: called with each text of the relay.
        on_restored: called when the session goes on.
        reopen: opens a WebSocket to the relay, and asks for the session in the handshake.
        may_renew: whether another session in place of this one is of use.

    Attributes:
        link: for yamux.
        granted: what carries the other session that the relay has granted; None while it has not.
    """

    def __init__(
        self,
        opened: Opened,
        confirmation: Confirmation,
        target: Target,
        redials: Redials,
        *,
        timeout: float,
        report: Report,
        on_text: Callable[[str], None],
        on_restored: Callable[[], None],
        reopen: Callable[[GatewayResumption], AbstractAsyncContextManager[Opened]],
        may_renew: Callable[[], bool],
    ) -> None:
        self.link: Final = ResumableLink(
            opened.carrier(),
            Tail(peer_window=confirmation.window),
            timeout=confirmation.timeout,
            on_text=on_text,
            on_lost=self._lost,
        )
        session = opened.welcome.session
        self._suspended: Final = Suspended(
            session=session, secret=confirmation.secret, counters=self.link.pause, node=opened.node
        )
        self._target: Final = target
        self._redials: Final = redials
        self._timeout: Final = timeout
        self._heartbeat: Final = opened.heartbeat
        self.link.on_doubt = self.suspect
        self.granted: Opened | None = None
        self._report: Final = report
        self._on_restored: Final = on_restored
        self._reopen: Final = reopen
        self._may_renew: Final = may_renew
        self._suspected_at: float | None = None
        self._loss: LinkLostError
        self._waits_first = False  # before the first attempt after a loss
        self._wanted = trio.Event()

    async def run(self, connections: trio.Nursery) -> None:
        """Find a new carrier whenever there is none, or the current one is suspected.

        Returns when the relay has granted another session. End this one then.

        Args:
            connections: its tasks hold the connections open, as long as they carry.

        Raises:
            TunnelError: the session cannot be resumed.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.link.run)
            while self.granted is None:
                # No deadline: most links are never lost.
                await self._wanted.wait()
                await self._find_carrier(connections)
                self._wanted = trio.Event()
            nursery.cancel_scope.cancel()

    def suspect(self) -> None:
        """The current carrier seems dead: look for another one, and use the current one until that has proved itself.

        Does not wait.
        """
        if self._suspected_at is None:
            self._suspected_at = trio.current_time()
            self._wanted.set()

    def _lost(self, loss: Loss) -> None:
        now, target = trio.current_time(), self._target
        target.redial.note_lost(stuck=loss.stuck, silence=loss.silence, heartbeat=self._heartbeat)
        self._loss = LinkLostError(f"the link to {target.address} is lost: {loss.reason}")
        self._report(LinkLost(self._loss))
        soon = now < self._redials.restored_at + STEADY
        self._redials.failed += soon
        self._waits_first = soon or (loss.ended and now >= target.checks.asked_at + ASKED_LATELY)
        self._wanted.set()

    async def _find_carrier(self, connections: trio.Nursery) -> None:
        redials = self._redials
        if trio.current_time() >= redials.restored_at + STEADY:
            redials.failed = 0
        while self.link.suspended or self._is_silent:
            if self._waits_first:
                await self._wait(self._loss)
            try:
                await self._attempt(connections)
            except TunnelError as error:
                if self.link.suspended and (error.final or error.retry_slowly or isinstance(error, _NotResumable)):
                    raise
                redials.failed += 1
                await self._wait(error)
            else:
                self._suspected_at = None
                redials.restored_at = trio.current_time()
                self._target.redial.note_up()
                if self.granted is not None:
                    return
                if not self.link.suspended:  # it may be lost again already
                    self._on_restored()
        self._suspected_at = None

    async def _attempt(self, connections: trio.Nursery) -> None:
        """Make one attempt. A change of the network starts it again: it may wait for answers on the old way."""
        done = False
        while not done:
            with lone_error_bare():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._give_up_when_moved, nursery.cancel_scope)
                    await connections.start(self._hold)
                    done = True
                    nursery.cancel_scope.cancel()

    async def _give_up_when_moved(self, attempt: trio.CancelScope) -> None:
        await self._target.checks.moved()
        attempt.cancel()

    async def _wait(self, error: TunnelError) -> None:
        """Wait before the next attempt, because of `error`. A check that is asked for ends this.

        Raises:
            TunnelError: `error`, if the relay asks for a wait that the session does not survive.
        """
        self._waits_first = False
        delay = self._target.redial_delay(self._redials.failed, error.retry_after)
        if self.link.suspended and error.retry_after is not None and trio.current_time() + delay >= self.link.ends_at:
            raise error  # the next session takes the turn that this one was given
        if self.link.suspended and delay:
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
                    if not (link.suspended and self._may_renew()):
                        raise _NotResumable(f"{self._target.address} does not have this gateway's session any more")
                    task_status.started()
                    await trio.lowlevel.checkpoint_if_cancelled()  # the last chance, if `start` was cancelled
                    self.granted = opened
                    await opened.hold()
                    return
                try:
                    link.check(counters)
                except RemoteProtocolError as error:
                    raise _NotResumable(f"{self._target.address} cannot go on with the session: {error}") from error
                task_status.started()
                await trio.lowlevel.checkpoint_if_cancelled()  # as above
                attached = True
                with suppress(trio.BrokenResourceError):  # the session has ended meanwhile
                    await link.attach(opened.carrier(), counters)
                    await opened.hold()
        finally:
            if not attached:
                link.go_on()


@final
class _NotResumable(LinkLostError):
    """Another attempt to resume is in vain."""
