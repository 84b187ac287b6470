"""Who asks in a request: the visitor, or whom a trusted proxy names. And which later requests may share its stream.

One stream to a gateway has one PROXY header. So a request of somebody else, on the connection of a proxy, needs a
stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Final, NamedTuple, final

import attrs

from ..._http.head import RequestHead
from ..._http.requests import host_of
from ..._model.addresses import Address
from ..._storage.networks import Network, is_within
from ...access.guard import Guard
from ..admission import Admission
from .forwarded_for import named_visitor
from .visit import Visit

__all__ = ["Asker", "Askers"]


class Asker(NamedTuple):
    """Who asks in a request.

    Attributes:
        visit: as of the one who asks.
        source: counts as a connection of that address; None if the connection is counted already.
        stream_of: see `RequestFollower`.
        guard: has let the request through, and checks later ones; None where there are no rules.
    """

    visit: Visit
    source: str | None
    stream_of: Callable[[RequestHead], Hashable]
    guard: Guard | None = None

    @classmethod
    def visitor(cls, visit: Visit) -> Asker:
        """The visitor itself, for all requests of its connection."""
        return cls(visit, None, host_of)

    def once(self) -> Asker:
        """The same for one request. Each later one needs a stream of its own."""
        return self._replace(stream_of=_a_stream_of_its_own)

    def guarded_by(self, guard: Guard) -> Asker:
        """The same, so that each later request that is not let through at once needs a stream of its own."""
        return self._replace(guard=guard, stream_of=partial(_stream_of_allowed, guard, self.visit, self.stream_of))


@final
class Askers:
    """Finds out who asks.

    Args:
        trusted: the networks of HTTP proxies that say whom each request is from.
        admission: knows which addresses count together.
    """

    def __init__(self, trusted: Sequence[Network], admission: Admission) -> None:
        self._trusted: Final = trusted
        self._admission: Final = admission

    def of(self, visit: Visit, head: RequestHead) -> Asker:
        """Who asks in the request `head` of a connection."""
        proxy = self.proxy_of(visit)
        if proxy is None:
            return Asker.visitor(visit)
        visitor, tls = named_visitor(head, proxy, self._trusted)
        source = self._admission.source_of(visitor.host)
        named = attrs.evolve(visit, visitor=visitor, source=source, tls=visit.tls if tls is None else tls)
        return Asker(named, source, partial(self._host_and_visitor, proxy))

    def proxy_of(self, visit: Visit) -> Address | None:
        """The proxy that a connection is from, if it says whom its requests are from."""
        proxy = visit.visitor
        return proxy if self._trusted and proxy is not None and is_within(proxy.host, self._trusted) else None

    def _host_and_visitor(self, proxy: Address, head: RequestHead) -> Hashable:
        return head.host, named_visitor(head, proxy, self._trusted)


def _a_stream_of_its_own(_head: RequestHead) -> Hashable:
    return object()


def _stream_of_allowed(
    guard: Guard, visit: Visit, stream_of: Callable[[RequestHead], Hashable], head: RequestHead
) -> Hashable:
    """`stream_of` a request that is let through at once. Any other needs a stream of its own, to be checked first."""
    return stream_of(head) if guard.allows_now(head, visit.host, visit.source) else object()
