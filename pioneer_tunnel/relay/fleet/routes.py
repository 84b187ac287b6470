"""The routes that a node knows: the records that it has read or written, for a while.

A route may be out of date. That costs its next visitor one question too many: the node that does not have the session
any more says so, and the record is read again. So no one has to tell all nodes of each change.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, final

import trio

from .records import Record

__all__ = ["ROUTE_LIFETIME", "KnownRoutes"]

ROUTE_LIFETIME: Final = 60.0
"""Seconds for which a route is used without asking. So long it may take until visitors use a link that is nearer."""

MOST_ROUTES: Final = 65_536
"""Routes that a node knows; beyond that, the one that was used least recently is evicted."""


@final
class KnownRoutes:
    """Records by tunnel id. Only those with a holding: that a gateway is not connected is not worth knowing.

    Args:
        most: how many; one more evicts the one that was used least recently.
    """

    def __init__(self, *, most: int = MOST_ROUTES) -> None:
        self._most: Final = most
        self._routes: Final[OrderedDict[str, tuple[Record, float]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._routes)

    def __contains__(self, tunnel_id: object) -> bool:
        return tunnel_id in self._routes

    def get(self, tunnel_id: str, *, even_old: bool) -> Record | None:
        """The record of a tunnel.

        Args:
            even_old: also if its lifetime is over, since the store cannot be asked.
        """
        found = self._routes.get(tunnel_id)
        if found is None or not (even_old or trio.current_time() - found[1] < ROUTE_LIFETIME):
            return None
        self._routes.move_to_end(tunnel_id)
        return found[0]

    def put(self, tunnel_id: str, record: Record) -> None:
        """Take note of a record that has just come from the store."""
        self._routes.pop(tunnel_id, None)
        if record.holdings:
            self._routes[tunnel_id] = record, trio.current_time()
            if len(self._routes) > self._most:
                self._routes.popitem(last=False)
