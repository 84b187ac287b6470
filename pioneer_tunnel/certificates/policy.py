"""Decides which certificate is ordered next, and when. Sans-I/O: the caller says what time it is.

All times are wall time, in seconds since 1970, since that is what certificates are valid by. Nothing here depends on
how long the caller has slept, so a machine that was suspended does no harm. When the clock is set back, what waits is
set back with it (`note_time`): it waits no longer than it should.

    a name without a certificate     is ordered at once
    a certificate                    is renewed at the time that the authority suggests (RFC 9773); without a
                                     suggestion, after about two thirds of its life
    a name that fails                waits 1, 4, 16, 64, … minutes, up to a day; or until the authority allows it
    an authority that fails          makes all names wait for 1, 2, 4, … minutes, up to an hour; or as long as it says
    an authority's rate limit        makes the name wait as long as the authority says, by default an hour, and all
                                     others for a minute

All delays are spread, so that many relays do not come at once. In any hour there are at most 4 orders for one name, and
40 in total; public authorities count failures by the hour. These counts and a name's failures are kept over a restart
(`records`): a program that crashes again and again does not order again and again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any, Final, final

import attrs

from .._model.certificate_status import CertificateStatus

__all__ = ["MOST_ORDERS", "MOST_ORDERS_OF_A_NAME", "Lifetime", "Schedule"]

MOST_ORDERS: Final = 40
"""Orders in an hour."""
MOST_ORDERS_OF_A_NAME: Final = 4
"""Orders in an hour for one name."""

_HOUR: Final = 3600.0
_DAY: Final = 24 * _HOUR
_FIRST_DELAY: Final = 60.0
_LONGEST_WAIT: Final = 7 * _DAY
_RATE_LIMIT_DELAY: Final = _HOUR
_LATEST: Final = 0.95
"""The share of its life after which a certificate is renewed, whatever the authority suggests."""


@final
@attrs.frozen
class Lifetime:
    """When a certificate is valid."""

    not_before: float
    not_after: float

    def at(self, share: float) -> float:
        """The time when this share of its life is over."""
        return self.not_before + share * (self.not_after - self.not_before)


@final
@attrs.define
class _Record:
    """What happened to the orders for a name.

    Attributes:
        orders: when it was ordered, during the last hour.
        failures: how often in a row that has failed.
        retry_at: not before this time.
        by_authority: whether the authority has said so.
        message: why it failed.
    """

    orders: list[float] = attrs.field(factory=list)
    failures: int = 0
    retry_at: float = 0.0
    by_authority: bool = False
    message: str | None = None


@final
@attrs.define
class _Held:
    lifetime: Lifetime
    renew_at: float
    check_at: float = 0.0


@final
class Schedule:
    """Which certificate is ordered next, and when.

    Args:
        random: spreads delays.
    """

    def __init__(self, random: Random) -> None:
        self._random: Final = random
        self._records: dict[str, _Record] = {}
        self._held: Final[dict[str, _Held]] = {}
        self._authority_failures = 0
        self._authority_message: str | None = None
        self._pause_until = 0.0
        self._seen_at = -math.inf

    # What happens

    def note_time(self, now: float) -> None:
        """The time is `now`. To be called before each look at what is to be done."""
        back, self._seen_at = self._seen_at - now, now
        if 0 < back < math.inf:
            self._pause_until -= back
            for record in self._records.values():
                record.retry_at -= back
                record.orders = [order - back for order in record.orders]
            for held in self._held.values():
                held.check_at -= back

    def note_certificate(self, name: str, lifetime: Lifetime) -> None:
        """There is a certificate: a new one, or one from the disk."""
        share = 2 / 3 - self._random.uniform(0, 0.03)
        self._held[name] = _Held(lifetime, lifetime.at(share))

    def note_suggestion(self, name: str, renew_at: float | None, *, check_at: float) -> None:
        """The authority suggests when to renew. None when it suggests nothing.

        Args:
            check_at: when to ask again.
        """
        held = self._held[name]
        held.check_at = check_at
        if renew_at is not None:
            held.renew_at = min(renew_at, held.lifetime.at(_LATEST))

    def note_order(self, name: str, now: float) -> None:
        """An order begins."""
        self._record(name).orders.append(now)

    def note_success(self, name: str) -> None:
        """It has succeeded."""
        record = self._record(name)
        record.failures, record.retry_at, record.by_authority, record.message = 0, 0.0, False, None
        self._note_authority_works()

    def note_failure(self, name: str, now: float, message: str, *, retry_after: float | None = None) -> None:
        """It has failed, for a reason that concerns this name alone.

        Args:
            message: why, for a person.
            retry_after: seconds that the authority wants; None if it says nothing.
        """
        record = self._record(name)
        record.failures += 1
        delay = self._spread(min(_FIRST_DELAY * 4 ** min(record.failures - 1, 10), _DAY))
        record.by_authority = retry_after is not None
        record.retry_at = now + max(delay, min(retry_after or 0.0, _LONGEST_WAIT))
        record.message = message
        self._note_authority_works()

    def note_rate_limit(self, name: str, now: float, message: str, *, retry_after: float | None = None) -> None:
        """The authority has limited its rate."""
        self.note_failure(name, now, message, retry_after=_RATE_LIMIT_DELAY if retry_after is None else retry_after)
        self._pause_until = now + self._spread(_FIRST_DELAY)

    def note_authority_failure(self, now: float, message: str, *, retry_after: float | None = None) -> None:
        """An order has failed, for a reason that concerns every name."""
        self._authority_failures += 1
        self._authority_message = message
        delay = self._spread(min(_FIRST_DELAY * 2 ** min(self._authority_failures - 1, 10), _HOUR))
        self._pause_until = now + max(delay, min(retry_after or 0.0, _LONGEST_WAIT))

    def retry_now(self) -> None:
        """Wait no longer after a failure, unless the authority has said how long. The limits of an hour stay."""
        for record in self._records.values():
            if not record.by_authority:
                record.retry_at = 0.0
        if self._authority_failures:
            self._pause_until = 0.0

    def _note_authority_works(self) -> None:
        self._authority_failures, self._authority_message = 0, None

    # What to do

    def next_order(self, names: Sequence[str], now: float) -> str | None:
        """The name to order a certificate for now; None if there is none."""
        if self._free_at(now) > now:
            return None
        due = [name for name in names if self._due(name, now) <= now]
        return min(due, key=lambda name: self._rank(name, now), default=None)

    def _rank(self, name: str, now: float) -> tuple[int, bool, float]:
        """The lowest is first. Names that fail are last: many of them must not keep others waiting."""
        record = self._records.get(name)
        return 0 if record is None else record.failures, self._is_valid(name, now), self._due(name, now)

    def next_check(self, names: Collection[str], now: float) -> str | None:
        """The name whose certificate the authority is to be asked about; None if there is none."""
        if self._pause_until > now:
            return None
        due = [name for name in names if self._is_valid(name, now) and self._held[name].check_at <= now]
        return min(due, key=lambda name: self._held[name].check_at, default=None)

    def wake_at(self, names: Collection[str], now: float) -> float:
        """When there will be something to do; infinity if never."""
        checks = [max(self._held[name].check_at, self._pause_until) for name in names if self._is_valid(name, now)]
        orders = [max(self._due(name, now), self._free_at(now)) for name in names]
        return min(checks + orders, default=math.inf)

    def _due(self, name: str, now: float) -> float:
        """When a certificate for `name` is to be ordered, as far as the name itself decides."""
        record, held = self._records.get(name), self._held.get(name)
        renew_at = 0.0 if held is None else held.renew_at
        if record is None:
            return renew_at
        return max(renew_at, record.retry_at, _free_at(record.orders, MOST_ORDERS_OF_A_NAME, now))

    def _free_at(self, now: float) -> float:
        """When the next order may begin, whatever its name is."""
        orders = [order for record in self._records.values() for order in record.orders]
        return max(self._pause_until, _free_at(orders, MOST_ORDERS, now))

    def _is_valid(self, name: str, now: float) -> bool:
        held = self._held.get(name)
        return held is not None and now < held.lifetime.not_after

    # What to tell

    def status(self, name: str, now: float) -> CertificateStatus:
        """What is to be told of `name`."""
        held, record = self._held.get(name), self._records.get(name, _Record())
        due = max(self._due(name, now), self._free_at(now))
        wanted = held is None or held.renew_at <= now
        message = record.message or (self._authority_message if wanted else None)
        if message is None and held is None:
            message = "no certificate yet"
        return CertificateStatus(
            not_after_unix=None if held is None else int(held.lifetime.not_after),
            renew_at_unix=None if held is None else int(held.renew_at),
            message=message,
            retry_at_unix=math.ceil(due) if wanted and due > now else None,
        )

    # What is kept

    def records(self, now: float) -> dict[str, Any]:
        """What has to be kept over a restart, for JSON."""
        for record in self._records.values():
            record.orders = [order for order in record.orders if now - _HOUR < order <= now]
        return {
            name: attrs.asdict(record) for name, record in self._records.items() if record.orders or record.failures
        }

    def restore(self, records: Mapping[str, Any], now: float) -> None:
        """Take what `records` has returned.

        Raises:
            ValueError: it is something else.
        """
        try:
            restored = {
                str(name): _Record(
                    [float(order) for order in record["orders"]],
                    int(record["failures"]),
                    # The clock may have been wrong when it was written.
                    min(float(record["retry_at"]), now + _LONGEST_WAIT),
                    bool(record["by_authority"]),
                    None if record["message"] is None else str(record["message"]),
                )
                for name, record in records.items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no records of orders: {error}") from error
        self._records = restored

    def _record(self, name: str) -> _Record:
        return self._records.setdefault(name, _Record())

    def _spread(self, seconds: float) -> float:
        return seconds * self._random.uniform(1, 1.25)


def _free_at(orders: Collection[float], most: int, now: float) -> float:
    """When there may be another one of `orders`, of which an hour has `most`."""
    recent = sorted(order for order in orders if now - _HOUR < order <= now)
    return recent[-most] + _HOUR if len(recent) >= most else 0.0
