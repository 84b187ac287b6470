"""How a relay spreads its gateways when they come back after a loss: the value of the extension `spread`.

docs/protocol.md specifies it. tunnel/restart_policy.py is what follows from it.
"""

from __future__ import annotations

from typing import Final, final

import attrs

from .messages import Message

__all__ = ["LONGEST_WAIT", "Spread"]

LONGEST_WAIT: Final = 15 * 60.0
"""Seconds: the longest that a gateway waits because a relay asks it to."""


@final
@attrs.frozen(kw_only=True)
class Spread:
    """What a relay asks of its gateways.

    Attributes:
        span: seconds. The first attempt after a loss comes at a random time within it.
        longest: seconds. The longest backoff is at least this, also where the gateway's own is shorter.
    """

    span: float
    longest: float

    @classmethod
    def parse(cls, message: Message) -> Spread:
        """Read `span_ms` and `longest_ms`. A value beyond 15 minutes, or below 0, counts as the nearest allowed one.

        Raises:
            RemoteProtocolError: one of them is missing, or no number.
        """
        return cls(span=_seconds(message, "span_ms"), longest=_seconds(message, "longest_ms"))

    def fields(self) -> dict[str, int]:
        """The fields of a message that `parse` reads, in whole milliseconds."""
        return {"span_ms": round(self.span * 1000), "longest_ms": round(self.longest * 1000)}


def _seconds(message: Message, name: str) -> float:
    return min(max(message.number(name) / 1000, 0.0), LONGEST_WAIT)
