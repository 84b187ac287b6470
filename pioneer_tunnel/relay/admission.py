"""Who may come in, and how many: pure bookkeeping for the doors of a relay; the time is given in.

    a connection   arrives   it is counted, in all and for its address, or turned away (`TurnedAway`)
                   pends     until it has shown what it wants: TLS, a request head, a gateway's proof
                   settles   a visitor whose head was read, a gateway whose proof was verified
                   leaves
    a visit        lasts     as long as a tunnel carries the visitor

Whoever floods the relay with connections that never come to the point fills the room for those that pend. So when that
is full it is not the newcomer that is turned away, who may well have something to say, but the oldest that makes way:
it has had the most time. A visitor that says what it wants gets through as long as it takes less time for it than the
flood needs to come around.

Visitors that have settled do not make way, and may be many. So they may not take all connections: a share of them is
reserved for gateways, which have no more sessions than there are tunnels with keys.

Neighbours: `limits` has the numbers, `rates` the clockwork; `server` lets connections arrive and leave, `ingress` and
`control` settle them.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, final

from .limits import RelayLimits
from .rates import REMEMBERED, Failures, TokenBuckets

__all__ = ["Admission", "Arrival", "TurnedAway"]

SPARE_DESCRIPTORS: Final = 64
"""What a relay needs beside its connections: listeners, files, the event loop, and room for those on their way out."""


MOST_LEAVING: Final = 16
"""Connections beyond the limit, while those that make way for them are being closed."""


@final
class TurnedAway(Exception):
    """There is no room for one more; the text says of what."""


@final
class Arrival:
    """One connection, from its accept to its end.

    Attributes:
        source: the address that it counts for; None when no limit per address holds for it.
        is_visitor: whether it has settled as one.
    """

    __slots__ = ("_admission", "evict", "is_visitor", "source")

    def __init__(self, admission: Admission, source: str | None, evict: Callable[[], object]) -> None:
        self._admission = admission
        self.source = source
        self.evict = evict
        self.is_visitor = False

    def settle(self) -> None:
        """It is a gateway that has proved itself, and does not make way for others any more."""
        self._admission.settle(self)

    def settle_as_visitor(self) -> None:
        """It has shown which tunnel it wants, and does not make way for others any more.

        Raises:
            TurnedAway: there are as many visitors as there may be.
        """
        self._admission.settle_as_visitor(self)

    def leave(self) -> None:
        """It has ended. To be called once."""
        self._admission.leave(self)

    def failed(self, now: float) -> float:
        """It has brought a proof that is none; returns the seconds that the answer waits."""
        return self._admission.failed(self, now)


@final
class Admission:
    """Counts for all doors of one relay.

    Args:
        limits: what the operator decides.
        descriptors: how many the process may have; None where nobody knows.
    """

    def __init__(self, limits: RelayLimits, *, descriptors: int | None = None) -> None:
        self._limits: Final = limits
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
        self._pending: Final[OrderedDict[Arrival, None]] = OrderedDict()
        self._pending_by_source: Final[dict[str, OrderedDict[Arrival, None]]] = {}
        self._connects: Final = TokenBuckets(limits.connects_per_second_per_address)
        self._failures: Final = Failures(limits.failed_auth_delay_ms / 1000, limits.failed_auth_delay_max_ms / 1000)
        self._sources: Final[dict[str, str | None]] = {}
        self._visits: Final[Counter[str]] = Counter()
        self._opens: Final = TokenBuckets(limits.opens_per_second_per_tunnel)

    def arrive(
        self, host: str | None, now: float, evict: Callable[[], object], *, only_visitors: bool = False
    ) -> Arrival:
        """Count a connection from `host`, an IP address, or None where it is not known.

        When all connections are taken, the oldest that pends makes way.

        Args:
            only_visitors: whether it came where no gateway comes in.
            evict: called when the connection, before it has settled, makes way for another. It must not wait, and the
                connection leaves soon after.

        Raises:
            TurnedAway: there is no room for it.
        """
        limits, source = self._limits, self._source(host)
        if only_visitors:
            self._refuse_too_many_visitors()
        is_full = self._connections >= self.most_connections
        if is_full and (not self._pending or self._connections >= self.most_connections + MOST_LEAVING):
            raise TurnedAway("there are as many connections as there may be")
        if source is not None:
            if limits.connections_per_address and self._by_source[source] >= limits.connections_per_address:
                raise TurnedAway("one address has as many connections as it may have")
            if not self._connects.take(source, now):
                raise TurnedAway("one address connects too often")
        if is_full:
            self._make_way(next(iter(self._pending)))
        arrival = Arrival(self, source, evict)
        self._connections += 1
        self._pending[arrival] = None
        if source is not None:
            self._by_source[source] += 1
            of_source = self._pending_by_source.setdefault(source, OrderedDict())
            of_source[arrival] = None
            if limits.pending_per_address and len(of_source) > limits.pending_per_address:
                self._make_way(next(iter(of_source)))
        if len(self._pending) > self._most_pending:
            self._make_way(next(iter(self._pending)))
        return arrival

    def settle(self, arrival: Arrival) -> None:
        """See `Arrival.settle`."""
        if self._pending.pop(arrival, self) is None and arrival.source is not None:
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
            raise TurnedAway("there are as many visitors as there may be")

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

    @contextmanager
    def visit(self, tunnel_id: str, now: float) -> Iterator[None]:
        """Count a visitor of a tunnel, for as long as the block lasts.

        Raises:
            TurnedAway: the tunnel has enough of them, or they come too often.
        """
        if self._most_visits and self._visits[tunnel_id] >= self._most_visits:
            raise TurnedAway("the gateway has as many visitors as it may have")
        if not self._opens.take(tunnel_id, now):
            raise TurnedAway("the gateway has too many new visitors")
        self._visits[tunnel_id] += 1
        try:
            yield
        finally:
            _count_down(self._visits, tunnel_id)

    def _source(self, host: str | None) -> str | None:
        if host is None:
            return None
        if host not in self._sources:
            if len(self._sources) >= REMEMBERED:
                self._sources.clear()
            self._sources[host] = self._read_source(host)
        return self._sources[host]

    def _read_source(self, host: str) -> str | None:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        if any(address in network for network in self._limits.exempt):
            return None
        if isinstance(address, ipaddress.IPv6Address):
            return str(ipaddress.IPv6Network((address, 64), strict=False))
        return str(address)

    def _make_way(self, arrival: Arrival) -> None:
        self.settle(arrival)
        arrival.evict()


def _count_down(counter: Counter[str], key: str) -> None:
    """One less, and nothing is kept of whom there is none of."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
