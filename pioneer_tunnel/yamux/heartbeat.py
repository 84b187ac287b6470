"""When to ping a silent peer, and when it is dead. No I/O.

A peer is silent when no byte of it arrives. After the interval it is pinged, and after twice the interval it is dead.
But a ping may wait behind bytes that a slow path takes a long time for, and so may the answer. So where the system can
tell (`Delivery`), these things show that the path lives, and prolong the wait:

- data arrives beyond a gap, which cannot be read yet
- the peer's system acknowledges bytes, until it has acknowledged the ping. Not after that: also the system of a peer
  whose process hangs acknowledges
"""

from __future__ import annotations

import math
from typing import Final, final

from .._net.delivery import Delivery

__all__ = ["Heartbeat"]

_LONGEST_LOOK: Final = 1.0


@final
class Heartbeat:
    """The silence of one peer. Call `look` now and then; at least at the times that it asks for.

    Args:
        interval: seconds of silence after which to ping.

    Attributes:
        patience: seconds without a sign of life after which the peer is dead: twice the interval, or more if the path
            itself may pause for longer.
        dead_at: when the peer is dead if nothing changes.
        next_look: when to look again.
    """

    def __init__(self, interval: float) -> None:
        self._interval: Final = interval
        self._asked_at = -math.inf
        self._before: Delivery | None = None
        self._arrived_at = self._taken_at = -math.inf  # when bytes were last seen to move, in this silence
        self._ping_ends = 0
        self._ping_taken = False
        self.patience: float = 2 * interval
        self.dead_at: float = math.inf
        self.next_look: float = -math.inf

    def look(self, now: float, heard_at: float, delivery: Delivery | None) -> bool:
        """Take note of the state of things; returns whether to ping now.

        Args:
            now: in seconds.
            heard_at: when the last byte arrived.
            delivery: the state of the connection; None if it is not known.
        """
        ask_at = heard_at + self._interval
        asked = self._asked_at >= ask_at
        if delivery is not None:
            self.patience = max(2 * self._interval, delivery.longest_pause)
            if asked and self._before is not None:
                self._compare(now, self._before, delivery)
            self._before = delivery
        if not asked:
            self._arrived_at = self._taken_at = heard_at
            self._ping_taken = False
            if now >= ask_at:
                self._asked_at = now
                self._ping_ends = 0 if delivery is None else delivery.written
        # Once the peer has the ping, it has the time for an answer that it would have had without a wait.
        wait = self.patience - self._interval if self._ping_taken else self.patience
        self.dead_at = max(heard_at + self.patience, self._arrived_at + self.patience, self._taken_at + wait)
        if now < ask_at:
            self.next_look = ask_at
        elif delivery is None:
            self.next_look = self.dead_at
        else:
            self.next_look = now + min(_LONGEST_LOOK, self._interval / 4)
        return not asked and now >= ask_at

    def _compare(self, now: float, before: Delivery, delivery: Delivery) -> None:
        if delivery.arrived != before.arrived:
            self._arrived_at = now
        if not self._ping_taken and delivery.taken != before.taken:
            self._taken_at = now
            self._ping_taken = delivery.acknowledged > self._ping_ends
