"""What a process remembers of its contact with the store: the part that all stores have in common."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

import trio

from ..._model.callbacks import nothing
from .records import Record
from .routes import KnownRoutes
from .store import LEASE, Store

__all__ = ["ContactStore"]


class ContactStore(Store):
    """A store that is reached over something that may fail.

    Args:
        node: the name of this node.
        process: the id of this process; by default a new one.
        lease: seconds that its lease lives after it was renewed.
        routes: what it knows; by default a new cache.

    Attributes:
        lease: as given.
        operations: how many reads, writes and renewals there were so far.
        leaving: whether this process drains. The record of a tunnel that loses its last holding then says so, see
            `Record`.
    """

    def __init__(
        self, node: str, *, process: str | None = None, lease: float = LEASE, routes: KnownRoutes | None = None
    ) -> None:
        self.node = node
        self.process = process or secrets.token_hex(8)
        self.reachable = False
        self.on_change: Callable[[str], object] = nothing
        self.on_gap: Callable[[], object] = nothing
        self.lease: Final = lease
        self.operations = 0
        self.leaving = False
        self._routes: Final = KnownRoutes() if routes is None else routes
        self._seen = 0
        self._ever_reached = False
        self._trusting_until = 0.0

    def known(self, tunnel_id: str) -> Record | None:
        return self._routes.get(tunnel_id, even_old=self._trusting or not self.reachable)

    @property
    def _trusting(self) -> bool:
        """Whether holdings count although the lease of their process has expired."""
        return trio.current_time() < self._trusting_until

    def _note(self, tunnel_id: str, record: Record) -> Record:
        """Take note of a record that comes from the store."""
        self._seen = max((self._seen, record.version, *(holding.fence for holding in record.holdings)))
        self._routes.put(tunnel_id, record)
        return record

    def _renewed(self, *, lived: bool) -> None:
        """The lease was renewed; `lived` is False if it had expired."""
        if not self.reachable:
            if self._ever_reached:
                self._trusting_until = trio.current_time() + self.lease
            self._ever_reached = self.reachable = True
        elif lived:
            return
        self.on_gap()
