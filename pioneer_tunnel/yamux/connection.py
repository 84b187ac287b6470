"""A yamux session over a link: its tasks, and how it begins and ends.

Theory of operation. `YamuxConnection.run` owns the link. Its `Driver` moves the bytes that can be
moved without waiting. The tasks wait:

- The reader holds a stay in the event loop for the driver, or receives from a link that cannot be watched. It never
  waits for the writer.
- The writer sends what the driver could not send at once.
- The clock task sends pings, detects a dead peer, and resets streams that were not accepted, or did not end, in time.

`run` never returns. It raises the reason why the session ended. Then every stream that has not ended is broken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, final

import attrs
import trio

from .._model.callbacks import nothing
from .._model.errors import RemoteProtocolError, fresh_copy
from .._model.exception_groups import leaves
from .._model.session_limits import Limits
from .._model.stats import SessionStats
from .._net.delivery import LONGEST_PAUSE, Movement
from .._net.fastpath.stay import Stay
from .._net.link import Link
from .driver import Driver
from .flow import SendBudget
from .frames import GoAwayCode
from .heartbeat import Heartbeat
from .pacing import LARGEST_BATCH
from .session import Role, Session
from .stream import YamuxStream

__all__ = ["YamuxConnection"]

GOODBYE_TIMEOUT: Final = 1.0
"""Seconds that the end of a session may take: to finish the current write, and to send the go-away."""

STALL_TIMEOUT: Final = 30.0
"""Seconds that a write may make no progress. Must exceed `MEASURE_INTERVAL`, the clock task's longest sleep."""

STALL_LOOK: Final = 1.0
"""Seconds until the clock task looks again whether the peer takes bytes, while some wait for it."""

MEASURE_INTERVAL: Final = 10.0
"""Seconds between pings that measure the round trip, which windows need to grow."""


@final
class YamuxConnection:
    """One yamux session over `link`.

    Args:
        link: the bytes below; closed when `run` ends.
        role: the client opens streams with odd ids, the server with even ids.
        heartbeat: seconds of silence after which the peer is pinged; after twice as many seconds it is dead. See
            `Heartbeat` for what prolongs that.
        limits: the limits of the session; the default is `Limits()`.
        on_stream: called for each stream that the peer opens, after the data that arrived together with it was
            processed. When it raises, `trio.WouldBlock` for example, the stream is reset. Without it, all streams of
            the peer are reset.
        on_round_trip: called with each measured round trip, in seconds.
        on_first_bytes: awaited once, when the peer's first bytes have arrived and before they are processed. An
            exception of it ends the session.
        on_doubt: called with the seconds of silence when the path is in doubt, once for each silence. Returns True if
            the link restores itself; then a failed check does not end the session. With `on_doubt`, pings follow
            traffic (see `Heartbeat`).
        goodbye: seconds that the end may take, once `run` is cancelled or the session is over.
        process_sending: the send budget that all sessions of the process share; None when only the session's counts.

    Attributes:
        session: the protocol.
        stuck: whether it ended while the path seemed to drop large packets, see `Delivery`.
        failed_check: whether it ended because a check has failed, or by `give_up`.
    """

    def __init__(
        self,
        link: Link,
        role: Role,
        *,
        heartbeat: float,
        limits: Limits | None = None,
        on_stream: Callable[[YamuxStream], None] | None = None,
        on_round_trip: Callable[[float], None] = nothing,
        on_first_bytes: Callable[[], Awaitable[None]] | None = None,
        on_doubt: Callable[[float], bool] | None = None,
        goodbye: float = GOODBYE_TIMEOUT,
        process_sending: SendBudget | None = None,
    ) -> None:
        limits = limits or Limits()
        if on_stream is None:
            limits = attrs.evolve(limits, unaccepted=0)
        self.session: Final = Session(role, limits, process_sending=process_sending)
        self.stuck: bool = False
        self.failed_check: bool = False
        self._link: Final = link
        link.bind(on_interrupted=self.session.forget_pings, budget=self.session.sending)
        self._interval: Final = heartbeat
        self._heartbeat = Heartbeat(heartbeat, follows_traffic=on_doubt is not None)
        self._on_first_bytes = on_first_bytes
        self._on_doubt: Final = on_doubt
        self._goodbye: Final = goodbye
        self._clock: Final = trio.lowlevel.ParkingLot()
        self._given_up = -math.inf, ""
        self._sending: Final = trio.CancelScope(shield=True)
        self._driver: Final = Driver(
            link,
            self.session,
            on_stream=on_stream or nothing,  # without it, the session refuses all streams
            on_round_trip=on_round_trip,
            on_traffic=self._clock.unpark_all,
        )

    async def run(self) -> NoReturn:
        """Run the session until it ends.

        Raises:
            RemoteProtocolError: the peer violated the protocol, or sent a go-away with an error code.
            trio.BrokenResourceError: the link ended or stalled, or the peer is silent. The message says which.
            trio.Cancelled: it was cancelled. Before that, it sends a go-away, for at most `goodbye` seconds.
        """
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._receive)
                nursery.start_soon(self._send)
                nursery.start_soon(self._keep_time)
        except BaseExceptionGroup as group:
            delivery = self._link.delivery()
            self.stuck = delivery is not None and delivery.stuck
            ending, others = group.split((RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError))
            await self._fail_in_turns(_reason(ending))
            if others is not None:
                raise others from None  # a cancellation, an interrupt or a bug
        except trio.Cancelled:
            await self._fail_in_turns(_reason(None))
            raise
        finally:
            await self._say_goodbye()
        assert self.failure is not None
        raise fresh_copy(self.failure)

    async def open_stream(self, *, announce: bool = True) -> YamuxStream:
        """Open a stream. Waits while 256 of them are unacknowledged. The caller sets the deadline.

        Args:
            announce: send its SYN now. With False it is sent with the stream's first data, or with the session's next
                frames.

        Raises:
            trio.BrokenResourceError: the connection is gone, or the session opens no more streams.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                stream = self.open_stream_nowait()
            except trio.WouldBlock:
                await self._driver.open_waiters.park()
            else:
                if announce:
                    self._driver.wake_writer()
                return stream

    def open_stream_nowait(self) -> YamuxStream:
        """Open a stream, without announcing it.

        Raises:
            trio.WouldBlock: 256 streams are unacknowledged.
            trio.BrokenResourceError: as `open_stream`.
        """
        if self.failure is not None:
            raise trio.BrokenResourceError(f"the connection is gone: {self.failure}") from self.failure
        session = self.session
        if session.may_open:
            return YamuxStream(self._driver, session.open_stream(self._driver.turn.now()))
        if session.openings_over:
            raise trio.BrokenResourceError("the session takes no more streams")
        raise trio.WouldBlock

    def refuse_streams(self) -> None:
        """Send a go-away: open streams continue, and neither end opens more."""
        self.session.go_away(GoAwayCode.NORMAL)
        self._driver.open_waiters.unpark_all()
        self._driver.wake_writer()

    async def streams_gone(self) -> None:
        """Wait until no stream is left. The caller sets the deadline."""
        while (gone := self._driver.until_gone()) is not None:
            await gone.wait()

    async def answers(self, within: float) -> bool:
        """Ping the peer and wait for any byte of it. False when none has arrived after `within` seconds.

        Calls share a ping that is not answered yet. Then `within` counts from when that ping was sent.
        """
        driver = self._driver
        if driver.failure is not None:
            return False
        heard, asked_at = driver.ask()
        with trio.move_on_at(asked_at + within):
            await heard.wait()
            return driver.failure is None
        # The link may have received bytes that did not reach us: a part of a large message, or a WebSocket control
        # frame.
        return self._link.last_received > asked_at

    @property
    def failure(self) -> Exception | None:
        """Why the connection ended; None while it has not."""
        return self._driver.failure

    @property
    def silence(self) -> float:
        """Seconds since the last byte of the session came. Bytes that only close the connection do not count."""
        return trio.current_time() - self._driver.heard_at

    def stats(self, **known: Any) -> SessionStats:
        """The numbers now. `known` are fields that others know."""
        session = self.session
        round_trip = session.round_trips.shortest
        return SessionStats(
            suspended=self._link.suspended,
            round_trip_ms=None if round_trip is None else round(round_trip * 1000, 3),
            streams_open=session.streams_open,
            unread_bytes=session.unread,
            unread_limit_bytes=session.limits.unread,
            unsent_bytes=session.sending.held,
            unsent_limit_bytes=session.limits.unsent,
            **known,
        )

    @property
    def in_doubt(self) -> bool:
        """Whether the session has ended or opens no more streams, or a ping is unanswered for too long."""
        return (
            self.failure is not None
            or self.session.openings_over
            or self._driver.turn.now() >= self._heartbeat.doubt_at
        )

    def check(self) -> None:
        """Ping the peer now. Without a sign of life within 2 seconds the path is in doubt, and soon the session ends.

        See `Heartbeat`, and `on_doubt`. Does not wait.
        """
        self._heartbeat.check()
        self._clock.unpark_all()

    def give_up(self, why: str) -> None:
        """Like a check that has failed, for a caller who knows that nothing can come any more. Does not wait.

        Args:
            why: for the error.
        """
        self._given_up = trio.current_time(), why
        self._clock.unpark_all()

    def fail(self, failure: Exception) -> None:
        """Break every stream, when `run` will not be called."""
        for _ in self._driver.fail(failure):
            pass

    async def _fail_in_turns(self, failure: Exception) -> None:
        with trio.CancelScope(shield=True):
            for _ in self._driver.fail(failure):
                await trio.lowlevel.checkpoint()

    # The tasks

    async def _receive(self) -> NoReturn:
        driver, link = self._driver, self._link
        if self._on_first_bytes is not None:
            driver.keep(await link.receive())
            await self._on_first_bytes()
        with Stay() as stay:
            if driver.watch(stay):
                try:
                    await stay.wait()
                finally:
                    driver.unwatch()
                assert driver.receive_failure is not None
                raise driver.receive_failure
        while True:
            while driver.turn.run(driver.process):
                await trio.lowlevel.checkpoint()
            driver.keep(await link.receive())

    async def _send(self) -> None:
        driver, link, pacing = self._driver, self._link, self._driver.pacing
        link.limit_unsent(pacing.unsent)
        # Shielded, so that a cancellation does not cut a frame. `_keep_time` ends this task, and sets a deadline.
        with self._sending:
            while True:
                if driver.send_failure is not None:
                    raise driver.send_failure
                started = trio.current_time()
                if driver.unsent is not None:
                    await link.send(driver.unsent)
                    driver.unsent = None
                if driver.ending:
                    return
                if self.session.has_work:
                    await link.wait_room()
                batch = driver.next_batch()
                while driver.turn.run(driver.dispatch):
                    await trio.lowlevel.checkpoint()
                if batch:
                    await link.send(batch)
                    driver.unsent = None
                    if pacing.sent(self.session.taken, trio.current_time() - started):
                        link.limit_unsent(pacing.unsent)
                elif not self.session.has_work:
                    # No deadline: it waits until there is something to send. The clock task watches the peer.
                    await driver.until_work().wait()

    async def _keep_time(self) -> NoReturn:
        link, movement, pinged, measured = self._link, Movement(), -math.inf, -1
        since = link.usable_since
        link.outlast(max(2 * self._interval, LONGEST_PAUSE) + STALL_TIMEOUT)
        in_doubt = restoring = False
        try:
            while True:
                now, delivery, traffic = trio.current_time(), link.delivery(), self.session.traffic
                if link.usable_since != since:  # it is suspended, or has another connection
                    since = link.usable_since
                    self._heartbeat = Heartbeat(self._interval, follows_traffic=self._on_doubt is not None)
                    movement = Movement()
                    in_doubt = restoring = False
                heartbeat, heard_at = self._heartbeat, max(link.last_received, since)
                silent = heartbeat.look(now, heard_at, delivery, traffic)
                if now >= heartbeat.dead_at:
                    link.lose_connection(trio.BrokenResourceError(f"no byte came for {heartbeat.patience:g} seconds"))
                    continue
                sending_since = link.sending_since
                if sending_since is not None and now >= sending_since + STALL_TIMEOUT:
                    link.lose_connection(
                        trio.BrokenResourceError(f"the other end took no byte for {STALL_TIMEOUT:g} seconds")
                    )
                    continue
                given_up_at, why = self._given_up
                failed = given_up_at > heard_at
                if now >= heartbeat.check_fails_at:
                    failed, why = True, "the other end did not answer a check"
                was_in_doubt, in_doubt = in_doubt, failed or now >= heartbeat.doubt_at
                if in_doubt and not was_in_doubt:
                    restoring = self._on_doubt is not None and self._on_doubt(now - link.last_received)
                if failed and not restoring:
                    self.failed_check = True
                    raise trio.BrokenResourceError(why)
                measure = now >= pinged + MEASURE_INTERVAL and traffic != measured and not link.suspended
                if silent or measure:
                    self.session.ping(now)
                    pinged, measured = now, traffic
                movement.look(now, heard_at, delivery)
                overdue = self.session.reset_overdue(now, movement, since=since)
                while self._driver.dispatch():  # the writer may be waiting for the link
                    await trio.lowlevel.checkpoint()
                self._driver.wake_writer()
                looks = [heartbeat.next_look, heartbeat.doubt_at, heartbeat.check_fails_at, heartbeat.dead_at]
                looks.append(now + MEASURE_INTERVAL)
                if sending_since is not None:
                    looks += [sending_since + STALL_TIMEOUT, now + STALL_LOOK]
                if overdue is not None:
                    looks.append(overdue)
                self._driver.await_traffic(traffic if heartbeat.awaits_traffic else None)
                with trio.move_on_at(min(look for look in looks if look > now)):
                    await self._clock.park()
        finally:
            self._driver.end()
            # Nothing can be sent while the link is suspended.
            self._sending.deadline = trio.current_time() + (0 if link.suspended else self._goodbye)

    async def _say_goodbye(self) -> None:
        """Send a go-away, unless the link is gone or a batch was cut; then close the link."""
        if isinstance(self.failure, RemoteProtocolError):
            self._link.blame()
        if self._driver.unsent is None and not isinstance(self.failure, trio.BrokenResourceError):
            with (
                trio.CancelScope(deadline=self._sending.deadline, shield=True),
                contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                self.session.go_away(GoAwayCode.NORMAL)
                await self._link.send(self.session.data_to_send(LARGEST_BATCH))
                await self._link.aclose()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._link)


def _reason(ending: BaseExceptionGroup[Exception] | None) -> Exception:
    """Why the session ended. A protocol error comes first: when the link breaks as well, that is its consequence."""
    reasons = [] if ending is None else [error for error in leaves(ending) if isinstance(error, Exception)]
    reasons.sort(key=lambda reason: not isinstance(reason, RemoteProtocolError))
    return reasons[0] if reasons else trio.ClosedResourceError("it was closed at this end")
