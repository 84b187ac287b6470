"""Limits on connections and visitors: counting, without I/O and without a clock.

    a connection   arrives   it is counted, in all and for its address, or refused (`OverLimit`)
                   pends     until its TLS handshake, request head or proof is complete; it can be evicted
                   settles   it is a visitor whose tunnel is known, or a gateway whose session has its tunnel
                   leaves
    a visit        lasts     while a tunnel carries the visitor

A flood of connections that send nothing fills the limit of pending ones. When that limit is reached, the oldest pending
connection is evicted, not the new one refused: the oldest had the most time. So a legitimate visitor gets through if it
settles faster than the flood replaces all pending connections.

Settled visitors are not evicted. A share of all connections is reserved for gateways, so that many visitors cannot keep
them out. Gateways need few: one session for each tunnel.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, final

from .._storage.networks import Network, customer_of, is_within
from .counts import RelayCounts
from .limits import RelayLimits
from .rates import REMEMBERED, FailureBackoff, TokenBuckets
from .stats import ConnectionStats

__all__ = ["Admission", "Arrival", "OverLimit"]

SPARE_DESCRIPTORS: Final = 64
"""Descriptors beside those of connections: listeners, files, the event loop, and connections that are being closed."""

MOST_LEAVING: Final = 16
"""Connections that may exceed the limit while evicted ones are being closed."""


@final
class OverLimit(Exception):
    """A limit is reached; the text says which.

    Attributes:
        reason: which one, for counts: a field of `RelayLimits`, or `visitors`.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason: Final = reason


@final
class Arrival:
    """One accepted connection, from its accept to its end.

    Attributes:
        source: the address as limits count it; None when the connection is exempt from limits per address, or not
            identified yet.
        is_visitor: True once it has settled as a visitor.
    """

    __slots__ = ("_admission", "is_visitor", "source")

    def __init__(self, admission: Admission, source: str | None) -> None:
        self._admission = admission
        self.source: str | None = source
        self.is_visitor: bool = False

    def identify(self, host: str, now: float) -> None:
        """The connection is from `host`, says the balancer that it came from: count it for that address.

        Raises:
            OverLimit: that address is over a limit.
        """
        self._admission.identify(self, host, now)

    def settle(self) -> None:
        """The connection is a gateway with a session: do not evict it from now on."""
        self._admission.settle(self)

    def settle_as_visitor(self) -> None:
        """The connection is a visitor whose tunnel is known: do not evict it from now on.

        Raises:
            OverLimit: the relay has too many visitors.
        """
        self._admission.settle_as_visitor(self)

    def leave(self) -> None:
        """The connection has ended. Call once."""
        self._admission.leave(self)

    def count_refusal(self, reason: str) -> None:
        """The connection is turned away."""
        self._admission.counts.refused(reason)

    def failed(self, now: float) -> float:
        """The connection brought a wrong proof. Returns the seconds to delay the answer."""
        return self._admission.failed(self, now)


@final
class Admission:
    """Counts for all listeners of one relay.

    Args:
        limits: the operator's.
        descriptors: how many the process may open; None if that is unknown.
        proxies: the networks of proxies in front of the relay that say who visits. They have no limits per address.
        counts: counts connections and refusals; by default new ones.

    Attributes:
        counts: as above.
        most_connections: the effective limit: `limits.connections`, or less if descriptors are fewer.
    """

    def __init__(
        self,
        limits: RelayLimits,
        *,
        descriptors: int | None = None,
        proxies: Sequence[Network] = (),
        counts: RelayCounts | None = None,
    ) -> None:
        self.counts: Final = counts or RelayCounts()
        self._limits: Final = limits
        self._exempt: Final = (*limits.exempt, *proxies)
        self.most_connections: Final = (
            limits.connections
            if descriptors is None
            else max(min(limits.connections, descriptors - SPARE_DESCRIPTORS), 1)
        )
        self._most_pending: Final = max(min(limits.pending, self.most_connections // 2), 1)
        reserved = limits.reserved_for_gateways
        if reserved is None:
            reserved = self.most_connections // 8
        self._most_visitors: Final = self.most_connections - min(reserved, self.most_connections // 2)
        visits = limits.streams_per_tunnel
        self._most_visits: Final = max(self.most_connections * 3 // 16, 1) if visits is None else visits
        self._connections = 0
        self._visitors = 0
        self._by_source: Final[Counter[str]] = Counter()
        self._pending: Final[OrderedDict[Arrival, Callable[[], object]]] = OrderedDict()  # with what resets it
        self._pending_by_source: Final[dict[str, OrderedDict[Arrival, None]]] = {}
        self._connects: Final = TokenBuckets(limits.connects_per_second_per_address)
        self._failures: Final = FailureBackoff(
            limits.failed_auth_delay_ms / 1000, limits.failed_auth_delay_max_ms / 1000
        )
        self._sources: Final[dict[str, str | None]] = {}
        self._visits: Final[Counter[str]] = Counter()
        self._opens: Final = TokenBuckets(limits.opens_per_second_per_tunnel)

    @property
    def pending(self) -> int:
        """Connections that have not settled."""
        return len(self._pending)

    @property
    def connections(self) -> int:
        """Connections that have not left."""
        return self._connections

    def stats(self) -> ConnectionStats:
        """The numbers now."""
        return ConnectionStats(
            open=self._connections,
            limit=self.most_connections,
            visitors_open=self._visitors,
            visitors_limit=self._most_visitors,
            pending=len(self._pending),
            pending_limit=self._most_pending,
            accepted_total=self.counts.accepted,
            evicted_total=self.counts.evicted,
        )

    def arrive(
        self,
        host: str | None,
        now: float,
        evict: Callable[[], object],
        *,
        only_visitors: bool = False,
        passed: bool = False,
    ) -> Arrival:
        """Count a new connection. If all connections are taken, evict the oldest pending one.

        Args:
            host: the peer's IP address; None if it is unknown.
            now: the time in seconds.
            evict: resets the connection. It is called at most once, while the connection pends, and must not wait; the
                connection has to leave soon after.
            only_visitors: True at a listener where gateways cannot connect.
            passed: True if another process has accepted the connection: that one counts it as accepted.

        Raises:
            OverLimit: the connection is over a limit.
        """
        source = self.source_of(host)
        if only_visitors:
            self._refuse_too_many_visitors()
        is_full = self._connections >= self.most_connections
        if is_full and (not self._pending or self._connections >= self.most_connections + MOST_LEAVING):
            raise OverLimit("connections", "there are as many connections as there may be")
        if source is not None:
            self._count(source, now)
        if is_full:
            self._evict(next(iter(self._pending)))
        arrival = Arrival(self, source)
        self.counts.accepted += not passed
        self._connections += 1
        self._pending[arrival] = evict
        if source is not None:
            self._let_pend(arrival, source)
        if len(self._pending) > self._most_pending:
            self._evict(next(iter(self._pending)))
        return arrival

    def count_passed(self, host: str, now: float) -> bool:
        """Count a connection that was accepted, and is passed to another process before it takes a place here.

        That process has its own limits for it. Here it counts for the rate of its address, as any other one does. So
        an address gains nothing when it connects to the wrong process.

        Returns:
            False if the address connects too often: the connection is not counted, and `arrive` refuses it.
        """
        source = self.source_of(host)
        if source is not None and not self._connects.take(source, now):
            return False
        self.counts.accepted += 1
        return True

    def cancel_passed(self, host: str) -> None:
        """Undo the last `count_passed` of an address: that process took no more, and the connection arrives here."""
        source = self.source_of(host)
        if source is not None:
            self._connects.give_back(source)
        self.counts.accepted -= 1

    def identify(self, arrival: Arrival, host: str, now: float) -> None:
        """See `Arrival.identify`."""
        source = self.source_of(host)
        if source is None:
            return
        self._count(source, now)
        arrival.source = source
        if arrival in self._pending:
            self._let_pend(arrival, source)

    def _count(self, source: str, now: float) -> None:
        """Count a connection of an address.

        Raises:
            OverLimit: the address is over a limit. The connection is not counted then.
        """
        limit = self._limits.connections_per_address
        if limit and self._by_source[source] >= limit:
            raise OverLimit("connections_per_address", "one address has as many connections as it may have")
        if not self._connects.take(source, now):
            raise OverLimit("connects_per_second_per_address", "one address connects too often")
        self._by_source[source] += 1

    def _let_pend(self, arrival: Arrival, source: str) -> None:
        of_source = self._pending_by_source.setdefault(source, OrderedDict())
        of_source[arrival] = None
        limit = self._limits.pending_per_address
        if limit and len(of_source) > limit:
            self._evict(next(iter(of_source)))

    def settle(self, arrival: Arrival) -> None:
        """See `Arrival.settle`."""
        if self._pending.pop(arrival, None) is not None and arrival.source is not None:
            of_source = self._pending_by_source[arrival.source]
            del of_source[arrival]
            if not of_source:
                del self._pending_by_source[arrival.source]

    def settle_as_visitor(self, arrival: Arrival) -> None:
        """See `Arrival.settle_as_visitor`."""
        if not arrival.is_visitor:
            self._refuse_too_many_visitors()
            arrival.is_visitor = True
            self._visitors += 1
            self.settle(arrival)

    def _refuse_too_many_visitors(self) -> None:
        if self._visitors >= self._most_visitors:
            raise OverLimit("visitors", "there are as many visitors as there may be")

    def leave(self, arrival: Arrival) -> None:
        """See `Arrival.leave`."""
        self.settle(arrival)
        self._connections -= 1
        self._visitors -= arrival.is_visitor
        if arrival.source is not None:
            _count_down(self._by_source, arrival.source)

    def failed(self, arrival: Arrival, now: float) -> float:
        """See `Arrival.failed`."""
        return 0.0 if arrival.source is None else self._failures.failed(arrival.source, now)

    def begin_visit(self, tunnel_id: str, now: float, *, source: str | None = None) -> None:
        """Count a visitor of a tunnel, until `end_visit`.

        Args:
            tunnel_id: of the tunnel.
            now: the time in seconds.
            source: of a visitor who shares the connection of a proxy with others, as `source_of` returns it. It counts
                as a connection of that address.

        Raises:
            OverLimit: the tunnel has too many visitors, or too many new ones per second, or the address is over a
                limit.
        """
        if self._most_visits and self._visits[tunnel_id] >= self._most_visits:
            raise OverLimit("streams_per_tunnel", "the gateway has as many visitors as it may have")
        if not self._opens.take(tunnel_id, now):
            raise OverLimit("opens_per_second_per_tunnel", "the gateway has too many new visitors")
        if source is not None:
            self._count(source, now)
        self._visits[tunnel_id] += 1

    def cancel_visit(self, tunnel_id: str) -> None:
        """Undo `begin_visit`, since no stream was opened: the same visitor tries again in another way."""
        self._opens.give_back(tunnel_id)
        self.end_visit(tunnel_id)

    def end_visit(self, tunnel_id: str, *, source: str | None = None) -> None:
        """Count a visitor of a tunnel no more. `source` is as for `begin_visit`."""
        _count_down(self._visits, tunnel_id)
        if source is not None:
            _count_down(self._by_source, source)

    def source_of(self, host: str | None) -> str | None:
        """The address as limits count it, see `RelayLimits`; None when it is exempt. Cached for the last hosts."""
        if host is None:
            return None
        if host not in self._sources:
            if len(self._sources) >= REMEMBERED:
                self._sources.clear()
            self._sources[host] = self._read_source(host)
        return self._sources[host]

    def _read_source(self, host: str) -> str | None:
        if is_within(host, self._exempt):
            return None
        return customer_of(host)

    def _evict(self, arrival: Arrival) -> None:
        evict = self._pending[arrival]
        self.settle(arrival)
        self.counts.evicted += 1
        evict()


def _count_down(counter: Counter[str], key: str) -> None:
    """Subtract one; a key with a count of 0 is removed."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
