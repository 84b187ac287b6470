"""When to ping a peer, when its path is in doubt, and when it is dead. No I/O.

A peer is silent when no byte of it arrives. After the interval it is pinged, and after twice the interval it is dead.
But a ping may wait behind bytes that a slow path takes a long time for, and so may the answer. So where the system can
tell (`Delivery`), these things show that the path lives, and prolong the wait:

- data arrives beyond a gap, which cannot be read yet
- the peer's system acknowledges bytes, until it has acknowledged the ping. Not after that: also the system of a peer
  whose process hangs acknowledges

A path is in doubt some seconds after a ping that nothing has come after. A doubt costs nothing and ends nothing. With
`follows_traffic` a ping is also sent when traffic stops, so that a path that breaks under traffic is soon in doubt.

A check is a ping that is asked for. The path is in doubt if there is no sign of life within 2 seconds.
"""

from __future__ import annotations

import math
from typing import Final, final

from .._net.delivery import Delivery

__all__ = ["Heartbeat"]

QUIET: Final = 3.0
"""Seconds without a byte, after traffic, after which the peer is pinged."""

DOUBT: Final = 5.0
"""Seconds without a sign of life, after a ping, after which the path is in doubt."""

CHECK: Final = 2.0
"""The same, after a check."""

_LONGEST_LOOK: Final = 1.0
_RESENT: Final = 1.0
"""Seconds for the answer, once TCP has sent a lost packet again."""


@final
class Heartbeat:
    """The silence of one peer. Call `look` now and then; at least at the times that it asks for.

    Args:
        interval: seconds of silence after which to ping.
        follows_traffic: whether to ping as well when traffic stops.

    Attributes:
        patience: seconds without a sign of life after which the peer is dead: twice the interval, or more if the path
            itself may pause for longer.
        doubt_at: when the path is in doubt if nothing changes; infinity while no ping is unanswered.
        check_fails_at: when a check has failed if nothing changes; infinity while there is none. It has more than its 2
            seconds if older bytes were not acknowledged: TCP may wait for longer before it sends them again.
        dead_at: when the peer is dead if nothing changes.
        next_look: when to look again.
    """

    def __init__(self, interval: float, *, follows_traffic: bool = False) -> None:
        self._interval: Final = interval
        self._follows_traffic: Final = follows_traffic
        self._asked_at = -math.inf
        self._before: Delivery | None = None
        self._arrived_at = self._taken_at = -math.inf  # when bytes were last seen to move, in this silence
        self._ping_ends = 0
        self._ping_taken = False
        self._traffic = 0  # as it was at the last ping
        self._traffic_since = math.inf  # when more of it was first seen
        self._check_wanted = False
        self._checked_at = -math.inf
        self._check_takes = CHECK
        self.patience: float = 2 * interval
        self.doubt_at: float = math.inf
        self.check_fails_at: float = math.inf
        self.dead_at: float = math.inf
        self.next_look: float = -math.inf

    def check(self) -> None:
        """Check the path at the next `look`."""
        self._check_wanted = True

    @property
    def awaits_traffic(self) -> bool:
        """Whether it follows traffic and there was none since the last ping. Then call `look` when some begins."""
        return self._follows_traffic and self._traffic_since == math.inf

    def look(self, now: float, heard_at: float, delivery: Delivery | None, traffic: int = 0) -> bool:
        """Take note of the state of things; returns whether to ping now.

        Args:
            now: in seconds.
            heard_at: when the last byte arrived.
            delivery: the state of the connection; None if it is not known.
            traffic: a number that differs when there was traffic, other than pings.
        """
        asked = self._asked_at > heard_at
        if delivery is not None:
            self.patience = max(2 * self._interval, delivery.longest_pause)
            if asked and self._before is not None:
                self._compare(now, self._before, delivery)
            self._before = delivery
        if not asked:
            self._arrived_at = self._taken_at = heard_at
            self._ping_taken = False
        if self._follows_traffic and traffic != self._traffic:
            self._traffic_since = min(self._traffic_since, now)
        ask_at = min(heard_at + self._interval, max(heard_at, self._traffic_since) + QUIET)
        if self._check_wanted:
            self._check_wanted = False
            self._checked_at = ask_at = now
            waits = delivery is not None and delivery.waits
            self._check_takes = max(CHECK, delivery.resend_after + _RESENT) if delivery and waits else CHECK
        asks = not asked and now >= ask_at
        if asks:
            self._asked_at = now
            self._ping_ends = 0 if delivery is None else delivery.written
            self._traffic, self._traffic_since = traffic, math.inf
        self._judge(heard_at)
        if not (asked or asks):
            self.next_look = ask_at
        elif delivery is None:
            times = (self.doubt_at, self.check_fails_at, self.dead_at)
            self.next_look = min((time for time in times if time > now), default=self.dead_at)
        else:
            self.next_look = now + min(_LONGEST_LOOK, self._interval / 4)
        return asks

    def _judge(self, heard_at: float) -> None:
        # Once the peer has the ping, it has the time for an answer that it would have had without a wait.
        wait = self.patience - self._interval if self._ping_taken else self.patience
        self.dead_at = max(heard_at + self.patience, self._arrived_at + self.patience, self._taken_at + wait)
        self.doubt_at = self.check_fails_at = math.inf
        if self._asked_at <= heard_at:
            return
        sign_at = max(self._asked_at, self._arrived_at, self._taken_at)
        longest_pause = self._before.longest_pause if self._before is not None else 0
        self.doubt_at = sign_at + max(DOUBT, longest_pause / 2)
        if self._checked_at > heard_at:
            since = max(self._checked_at, sign_at)
            self.doubt_at = min(self.doubt_at, since + CHECK)
            self.check_fails_at = since + self._check_takes

    def _compare(self, now: float, before: Delivery, delivery: Delivery) -> None:
        if delivery.arrived != before.arrived:
            self._arrived_at = now
        if not self._ping_taken and delivery.taken != before.taken:
            self._taken_at = now
            self._ping_taken = delivery.acknowledged > self._ping_ends
