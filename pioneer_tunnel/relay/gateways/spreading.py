"""What a relay asks of its gateways for the time after a loss, so that they do not come back all at once. No I/O.

The span is the time in which the relay could take them all: its sessions divided by the handshakes per second that its
operator allows. It is no measurement of this relay: how fast it is shows only when it is overloaded, and strangers can
overload it. The longest backoff is the same, so that gateways which look for a relay that is away for long come at the
rate, too.
"""

from __future__ import annotations

from typing import Final, final

from ..._wire.handshake import Extensions
from ..._wire.messages import LONGEST_WAIT, SPREAD, Spread

__all__ = ["Spreading"]

LEAST_CHANGE: Final = 1.0
"""Seconds of the span that are worth a message. The relay takes the gateways of a second at once."""


@final
class Spreading:
    """The extension `spread` of one relay.

    Args:
        rate: handshakes per second; 0 means no limit, and no advice.
    """

    def __init__(self, rate: float) -> None:
        self._rate: Final = rate

    @property
    def offer(self) -> Extensions:
        """For the challenge."""
        return {SPREAD: {}} if self._rate else {}

    def advice(self, sessions: int) -> Spread:
        """What to ask while there are so many sessions."""
        span = min(sessions / self._rate, LONGEST_WAIT) if self._rate else 0.0
        return Spread(span=span, longest=span)

    @staticmethod
    def is_outdated(told: Spread, advice: Spread) -> bool:
        """Whether a gateway that was told `told` should be told `advice`: the span has doubled or halved."""
        less, more = sorted((told.span, advice.span))
        return more - less >= LEAST_CHANGE and more >= 2 * less
