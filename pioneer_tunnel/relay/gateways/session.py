"""A connected gateway: its session carries visitors until it is ordered to end, or its link breaks.

Orders from outside do not wait:

    drain      the relay stops: the gateway makes another session; this one ends with its last stream
    retire     a newer key has the tunnel: no new visitors; existing ones may finish within the rotation grace
    replace    another session has the tunnel: send who has it, and end
    revoke     the key no longer opens the tunnel: end
    refuse     another session keeps the tunnel: end
    abandon    the gateway did not answer a ping: end without a message

An ordered end takes at most a second, also if the peer reads nothing: the timeouts below bound it. Then all streams are
reset and the socket is closed.

A session whose link is resumable survives the loss of its connection (`resuming`). While it is suspended, its streams
stay, and new visitors wait for a few seconds.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, final

import attrs
import trio

from ..._model.log_fields import about
from ..._model.stats import SessionStats
from ..._net.log_limiter import LogLimiter
from ..._wire.handshake import Claim
from ..._wire.links import LinkPlace
from ..._wire.messages import DRAINING, Spread, draining_text, replaced_text, spread_text
from ..._wire.services import Located
from ...resume import ResumableLink
from ...websocket import EngineName, WebSocketLink
from ...yamux import Limits, Role, SendBudget, YamuxConnection, YamuxStream
from .offered_services import OfferedServices
from .registry import GatewayAway, LiveSession
from .takeover import answer_timeout

__all__ = ["GatewaySession"]

FAREWELL_TIMEOUT: Final = 0.3
"""Seconds for sending the text with the reason."""

GOODBYE_TIMEOUT: Final = 0.5
"""Seconds for sending what is queued, the go-away and the close."""

GRACE_WITHOUT_DRAINING: Final = 2.0
"""Seconds that visitors keep when the relay stops, if the gateway makes no other session before this one ends.

A gateway that has lost its link redials within 2 seconds. So the next relay holds new visitors for 4 seconds at most.
"""

SUSPENDED_WAIT: Final = 5.0
"""Seconds that a new visitor waits for a suspended session."""

MOST_REASON: Final = 123
"""Bytes of the reason in a WebSocket close frame (RFC 6455, 5.5.1)."""

STOPPING: Final = "the relay is stopping"
CLOSE_GOING_AWAY: Final = 1001
CLOSE_REJECTED: Final = 1008
CLOSE_REPLACED: Final = 4001

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.session"))


@final
@attrs.frozen(kw_only=True)
class _Ending:
    """How a session ends.

    Attributes:
        code, reason: of the WebSocket close.
        text: a text message to send before it; None for none.
        silently: send nothing, since the peer is gone.
    """

    code: int
    reason: str
    text: str | None = None
    silently: bool = False


@final
class GatewaySession(LiveSession):
    """The session of one authenticated gateway.

    Args:
        tunnel_id: its tunnel.
        claim: the gateway's verified claim.
        link: closed at the end of `carry`.
        heartbeat: seconds of silence after which the gateway is pinged.
        limits: of the yamux session.
        sending: the budget of unsent bytes that all sessions of the relay share.
        since: when the gateway connected, in seconds since 1970.
        rotation_grace: seconds that visitors may stay when the session is retired.
        services: what the gateway offers; None when it knows no services.
        engine: the WebSocket engine.
        on_first_bytes: awaited when the gateway's first bytes have come; see `YamuxConnection`.
        place: which of the gateway's links it is; None if it is the only one.

    Attributes:
        entered: True once the session has its tunnel. The caller sets it.
        extensions: the names of those in force. The caller sets it with the welcome.
        spread: what the gateway was told last of the extension `spread`; None if it does not have it. The caller sets
            it with the welcome.
    """

    def __init__(
        self,
        tunnel_id: str,
        claim: Claim,
        link: WebSocketLink | ResumableLink,
        *,
        heartbeat: float,
        limits: Limits,
        sending: SendBudget,
        since: float,
        rotation_grace: float,
        services: OfferedServices | None,
        engine: EngineName,
        on_first_bytes: Callable[[], Awaitable[None]],
        place: LinkPlace | None = None,
    ) -> None:
        self._id: Final = secrets.token_hex(8)
        self.tunnel_id: Final = tunnel_id
        self.entered = False
        self.extensions: Sequence[str] = ()
        self.spread: Spread | None = None
        self._claim: Final = claim
        self._place: Final = place
        self._since: Final = since
        self._grace: Final = rotation_grace
        self._services: Final = services
        self._engine: Final = engine
        self._link: Final = link
        if services is not None:
            link.on_text = services.take  # without extensions with texts, a gateway's texts are ignored
        self._link.close_code, self._link.close_reason = CLOSE_GOING_AWAY, STOPPING
        self._connection: Final = YamuxConnection(
            self._link,
            Role.CLIENT,
            heartbeat=heartbeat,
            limits=limits,
            on_first_bytes=on_first_bytes,
            goodbye=GOODBYE_TIMEOUT,
            process_sending=sending,
        )
        self._reconnect_within = 0.0
        self._draining = False
        self._finishing: Final = trio.Event()
        self._retired = False
        self._ending: _Ending | None = None
        self._telling = False
        self._carrying: Final = trio.CancelScope()
        self._tasks: trio.Nursery | None = None
        self._ordered: Final[list[Callable[[], Awaitable[None]]]] = []  # before `carry` could begin with it

    @property
    def id(self) -> str:
        return self._id

    @property
    def instance(self) -> str:
        return self._claim.instance or ""

    @property
    def key_id(self) -> str:
        return self._claim.key_id

    @property
    def since(self) -> float:
        return self._since

    @property
    def services(self) -> Collection[str] | None:
        return None if self._services is None else self._services.names

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def place(self) -> LinkPlace | None:
        return self._place

    @property
    def sound(self) -> bool:
        suspended = isinstance(self._link, ResumableLink) and self._link.suspended
        return not (suspended or self.ended or self._connection.in_doubt)

    @property
    def burden(self) -> tuple[int, float]:
        session = self._connection.session
        return session.streams_open, session.round_trips.shortest or math.inf

    @property
    def ended(self) -> bool:
        """Whether the session was ordered to end."""
        return self._ending is not None

    @property
    def held(self) -> int:
        """Bytes that the session holds: received and not read, or sent and not acknowledged."""
        return self._connection.session.unread + self._connection.session.sending.held

    def stats(self) -> SessionStats:
        """The numbers now."""
        peer = self._link.peer
        return self._connection.stats(
            id=self.id,
            since_unix=self._since,
            peer=None if peer is None else str(peer),
            agent=self._claim.agent,
            instance=self._claim.instance,
            engine=self._engine,
            extensions=tuple(sorted(self.extensions)),
            draining=self.draining or self._retired or self.ended,
            resumes_total=self._link.resumes,
        )

    async def open_stream(self) -> YamuxStream:
        if isinstance(self._link, ResumableLink):
            with trio.move_on_after(SUSPENDED_WAIT):
                while self._link.suspended:
                    await self._link.restored()
            if self._link.suspended:
                raise GatewayAway
        return await self._connection.open_stream(announce=False)  # a PROXY header follows

    def open_stream_nowait(self) -> YamuxStream:
        if isinstance(self._link, ResumableLink) and self._link.suspended:
            raise trio.WouldBlock
        return self._connection.open_stream_nowait()

    async def answers(self, within: float) -> bool:
        return self._ending is None and await self._connection.answers(within)

    # Orders. The first one that ends the session counts; later ones change nothing.

    def drain(self, reconnect_within: float) -> None:
        """Ask the gateway for another session within so many seconds, since the relay stops. Does not wait.

        The session still opens streams, until `finish`.
        """
        if not self.draining:
            self._reconnect_within = reconnect_within
            self._draining = True
            self._begin(self._drain)

    def finish(self) -> None:
        """After `drain`: open no more streams, and end with the last one. Does not wait."""
        self._finishing.set()

    def retire(self, by: str) -> None:
        if not self._retired:
            self._retired = True
            self._connection.refuse_streams()
            self._begin(partial(self._leave_to, by))

    def replace(self, by: str) -> None:
        self._end_as_replaced(by, "a newer session has taken this tunnel over")

    def revoke(self) -> None:
        """End the session, since its key no longer opens the tunnel. Does not wait."""
        self._end(_Ending(code=CLOSE_REJECTED, reason="the key is not registered for this tunnel any more"))

    def refuse(self, reason: str) -> None:
        """End the session, since another one keeps the tunnel. Does not wait."""
        short = f"busy: {reason}".encode()[:MOST_REASON].decode(errors="ignore")
        self._end(_Ending(code=CLOSE_REJECTED, reason=short))

    def services_told(self, names: Collection[str], located: Located) -> None:
        """The gateway has said what it offers, and hears where, in the handshake of a resume."""
        if self._services is not None:
            self._services.told(names, located)

    def registry_changed(self) -> None:
        """Tell the gateway if visitors reach its services elsewhere now. Does not wait."""
        if self._services is not None:
            self._services.look_again()

    def tell_spread(self, spread: Spread) -> None:
        """Tell the gateway, which has the extension, how to come back, if it has not heard that yet. Does not wait."""
        if self._tasks is not None and not self._telling:
            self._telling = True
            self._tasks.start_soon(self._tell_spread, spread)

    async def _tell_spread(self, spread: Spread) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the session ends anyway
            # No deadline: the session ends when its writes stall.
            await self._link.send_text(spread_text(spread))
        self.spread, self._telling = spread, False

    def abandon(self) -> None:
        self._end(_Ending(code=CLOSE_GOING_AWAY, reason="no answer came", silently=True))

    def _end_as_replaced(self, by: str, message: str) -> None:
        self._end(_Ending(code=CLOSE_REPLACED, reason="replaced", text=replaced_text(by, message)))

    def _end(self, ending: _Ending) -> None:
        if self._ending is None:
            self._ending = ending
            self._link.close_code, self._link.close_reason = ending.code, ending.reason
            self._begin(partial(self._close, ending))

    def _begin(self, order: Callable[[], Awaitable[None]]) -> None:
        """Carry out an order in a task: now, or as soon as there are tasks.

        Most sessions never get one. A task that waited for it would take 3 KiB.
        """
        if self._tasks is None:
            self._ordered.append(order)
        else:
            self._tasks.start_soon(order)

    async def carry(self) -> None:
        """Carry visitors until the session has ended. Returns after an order to end.

        Raises:
            As `YamuxConnection.run`, when the session ends for another reason.
        """
        with self._carrying:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                for order in self._ordered:
                    nursery.start_soon(order)
                if self._services is not None:
                    nursery.start_soon(self._services.keep_told, self._link.send_text)
                if isinstance(self._link, ResumableLink):
                    nursery.start_soon(self._link.run)
                try:
                    await self._connection.run()
                finally:
                    self._tasks = None
        assert self._ending is not None
        self._log_limited("session_ended", "was ended", self._ending.reason)

    def _log_limited(self, event: str, what: str, why: str) -> None:
        line = f"tunnel {self.tunnel_id}: session {self.id} {what}: {why}"
        fields = about(event, tunnel=self.tunnel_id, session=self.id, reason=why or None)
        _log_limiter.log((what, self.tunnel_id), line, level=logging.INFO, about=fields)

    async def _drain(self) -> None:
        # No deadline here and below, except as said: the relay ends what has not ended in time.
        makes_another = DRAINING in self._claim.extensions
        with trio.move_on_after(math.inf if makes_another else GRACE_WITHOUT_DRAINING):
            await self.ask_for_another()
            await self._finishing.wait()
            self._connection.refuse_streams()
            await self._connection.streams_gone()
        self._end(_Ending(code=CLOSE_GOING_AWAY, reason=STOPPING))

    async def ask_for_another(self) -> None:
        """If the session drains, ask the gateway for another one. A text that was sent before a resume may be lost."""
        if self.draining and DRAINING in self._claim.extensions:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._link.send_text(draining_text(self._reconnect_within))

    async def _leave_to(self, successor: str) -> None:
        self._log_limited("session_retired", "is retired", "a newer key has the tunnel")
        if not await self.answers(answer_timeout(self.instance, successor)):
            self.abandon()
            return
        with trio.move_on_after(self._grace):
            await self._connection.streams_gone()
        self._end_as_replaced(successor, "a session with a newer key of this tunnel has taken it over")

    async def _close(self, ending: _Ending) -> None:
        reachable = not ending.silently
        if reachable and ending.text is not None:
            with (
                trio.move_on_after(FAREWELL_TIMEOUT) as farewell,
                suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                await self._link.send_text(ending.text)
            reachable = not farewell.cancelled_caught
        if not reachable:
            # Queued data that the peer does not take would delay the close.
            await self._link.abandon()
        self._carrying.cancel()
