"""When to retry: arithmetic, without a clock.

`RestartPolicy` is what the operator configures. `Restarts` counts: it is given how each attempt ended, and returns how
long to wait, or that no restarts are left.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final, final

import attrs

from .._model.errors import RestartLimitError, TunnelError
from .._wire.messages import LONGEST_WAIT, Spread

__all__ = ["LONGEST_WAIT", "RunEnd", "RestartPolicy", "Restarts"]

LONGEST_REDIAL_DELAY: Final = 4.0
"""Seconds between two attempts to restore a lost link, before jitter: visitors wait meanwhile."""

QUICK_HANDOVERS: Final = 10
"""Sessions in a row that a relay may drain soon, and that the next one follows without a backoff.

When a relay replaces its workers one by one, a gateway may move several times within seconds.
"""

SETTLED: Final = 5.0
"""Seconds after which a session that its relay drains is not drained soon. One dial in that time costs it little."""

FIRST_SHARE: Final = 2 / 3
"""Share of the span in which the first attempt to restore a lost link comes."""


def _finite(_policy: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"'{attribute.name}' must be a finite number of seconds: {value}")


@final
@attrs.frozen(kw_only=True)
class RestartPolicy:
    """How the restart loop behaves.

    Attributes:
        initial: the first delay, in seconds; delays double (default 1).
        maximum: the longest delay, in seconds, before jitter (default 30).
        jitter: each delay is spread by plus or minus this share of it (default 0.2).
        max_restarts: restarts before giving up (the first attempt is not counted); 0 never gives up (default 0). A
            relay that asks for another session, since it is restarted, costs none.
        stable: a session that lasted this many seconds clears the count and the delay (default 30).

    Raises:
        ValueError: a value is out of its range, and which.
    """

    initial: float = attrs.field(default=1.0, validator=[attrs.validators.gt(0), _finite])
    maximum: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0), _finite])
    jitter: float = attrs.field(default=0.2, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    max_restarts: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    stable: float = attrs.field(default=30.0, validator=attrs.validators.ge(0))


@final
@attrs.frozen(kw_only=True)
class RunEnd:
    """How an attempt ended.

    Attributes:
        connected_for: seconds that the tunnel was up; None when it never was.
        reconnect_within: seconds that a draining relay gives for the next session; None if it does not drain. The
            attempt has not ended then: its session goes on while the next one is made.
        retry_after: seconds that the relay asked us to wait.
        retry_slowly: retry only every `maximum` seconds.
        retry_at_once: retry without a wait. That counts as no restart, since the relay has not failed.
        rejected: the relay rejected a gateway that was up before; retry only every `LONGEST_WAIT` seconds.
        spread: what the relay of the last session asked of its gateways; None when it asked nothing.
    """

    connected_for: float | None = None
    reconnect_within: float | None = None
    retry_after: float | None = None
    retry_slowly: bool = False
    retry_at_once: bool = False
    rejected: bool = False
    spread: Spread | None = None


@final
class Restarts:
    """Counts restarts for one generation.

    A relay that drains has not failed. So the next session is made within the time that it gives, and that counts as no
    restart. Only a relay that drains one session after the other as soon as it is up is dialled less and less often.

    When a relay goes down, all its gateways lose their link at once. So the first attempt after a loss comes at a
    random time, within a span that the relay may have told (`RunEnd.spread`). If it has, the next attempts are spread
    alike: each delay is twice the time that the gateway has waited since the loss, up to the span. So while a relay
    comes back, its gateways together dial at most 3 times as often as it takes them (benchmarks/storm.py). A relay that
    answers `busy` is up, and says itself when to come.

    A session that can be resumed wants its link back at once, since visitors wait. Where this gateway alone has lost
    its link, it dials at once. Where its relay may be gone, its first attempt comes within two thirds of the span
    (`redial_delay`): then all gateways together dial 1.5 times as often as the relay takes them, and those that it
    refuses come in turn beside them. The relay takes the gateways of a second at once, so a delay of less than a second
    is none. Later attempts take the whole span each, since an attempt that failed says that the relay is gone.

    Args:
        policy: the policy.
        random: the source of jitter.
    """

    def __init__(self, policy: RestartPolicy, random: Random) -> None:
        self.policy: Final = policy
        self._random: Final = random
        self.used: int = 0
        """Restarts since the start, or since the last session that was stable."""
        self._waited = 0.0  # seconds, of all waits since the last loss
        self._handovers = 0  # sessions in a row that were drained soon

    def after(self, ending: RunEnd) -> float | None:
        """Seconds to wait before the next attempt; None when `max_restarts` are used up."""
        policy = self.policy
        if ending.connected_for is not None:
            self._waited = 0.0
            if ending.connected_for >= policy.stable:
                self.used = 0
        if ending.retry_at_once:
            return 0.0
        if ending.reconnect_within is not None:
            return self._handover_delay(ending, ending.reconnect_within)
        self.used += 1
        if policy.max_restarts and self.used > policy.max_restarts:
            return None
        delay = self._own_delay(ending)
        if ending.retry_after is not None:
            delay = max(delay, min(ending.retry_after, LONGEST_WAIT))
        self._waited += delay
        return delay

    def longest_delay(self) -> float:
        """Seconds to wait when `max_restarts` are used up, and the tunnel does not give up since another link is up."""
        return self._jittered(self.policy.maximum)

    def redial_delay(self, failed: int, spread: Spread | None, *, retry_after: float | None = None) -> float:
        """Seconds to wait before the next attempt to restore a link that may have been lost with its relay.

        Args:
            failed: how many attempts have failed since the loss.
            spread: what the relay has asked for the time after a loss; None if it asked nothing.
            retry_after: seconds that the relay asked for after the last attempt.
        """
        share = 0.0
        if spread is not None and retry_after is None:
            share = self._random.uniform(0, spread.span if failed else FIRST_SHARE * spread.span)
        if not failed:
            return share if share >= 1.0 else 0.0
        delay = min(self._doubled(failed), self.policy.maximum, LONGEST_REDIAL_DELAY)
        return max(self._jittered(delay) + share, min(retry_after or 0.0, LONGEST_WAIT))

    def _handover_delay(self, ending: RunEnd, within: float) -> float:
        soon = ending.connected_for is None or ending.connected_for < SETTLED
        self._handovers = self._handovers + 1 if soon else 0
        longest, excess = self._longest(ending.spread), self._handovers - QUICK_HANDOVERS
        if excess > 0:
            return self._jittered(min(self._doubled(excess), longest))
        return self._random.uniform(0, min(within, longest))

    def _doubled(self, times: int) -> float:
        """The delay that is the so many-th in a row, without cap and jitter."""
        return self.policy.initial * 2.0 ** min(times - 1, 64)  # a larger power has long passed every maximum

    def _longest(self, spread: Spread | None) -> float:
        """The longest backoff, before jitter."""
        return self.policy.maximum if spread is None else max(self.policy.maximum, spread.longest)

    def _own_delay(self, ending: RunEnd) -> float:
        policy, spread = self.policy, ending.spread
        if ending.rejected:
            return self._jittered(LONGEST_WAIT)
        longest = self._longest(spread)
        if ending.retry_slowly:
            return self._jittered(longest)
        if ending.connected_for is not None and self.used == 1 and ending.retry_after is None:
            return self._random.uniform(0, 2 * policy.initial if spread is None else spread.span)
        delay = self._doubled(self.used)
        if spread is not None and ending.retry_after is None:
            delay = max(delay, min(2 * self._waited, spread.span))
        return self._jittered(min(delay, longest))

    def limit_reached(self, cause: TunnelError) -> RestartLimitError:
        """The error for the status when `after` returns None; `cause` is how the last attempt ended."""
        allowed = self.policy.max_restarts
        return RestartLimitError(
            f"gave up after {allowed} restart{'s' if allowed > 1 else ''}; the last cause: {cause}"
        )

    def _jittered(self, delay: float) -> float:
        jitter = self.policy.jitter
        return delay * self._random.uniform(1 - jitter, 1 + jitter)
