"""The other workers of this machine, for a node of a fleet that is one of them.

The workers know each other's sessions without Redis: each one shows its own to the others. So while Redis is down, a
visitor who reaches another worker than its gateway is served all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol

import trio

from ..gateways.registry import LocalDirectory
from .directory import FleetDirectory
from .passing import Where
from .records import Holding
from .remote import RemoteSession
from .store import Store
from .unix_network import WorkerNetwork

__all__ = ["Neighbours", "where_in"]


class Neighbours(Protocol):
    """The other workers of this machine.

    Attributes:
        network: the way to the others.
        store: what all workers know of their sessions. Its `node` and `process` are those of this worker. This node
            sets its `on_change`.
        leaving: the processes that take no new visitors.
        on_ended: called with a process that has ended. This node sets it.
    """

    network: WorkerNetwork
    store: Store
    leaving: Container[str]
    on_ended: Callable[[str], object]

    def sessions(self, tunnel_id: str) -> Sequence[Holding]:
        """The sessions of the others that have a tunnel, and take new visitors. Does not wait."""

    def show(self, tunnel_id: str, holdings: Sequence[Holding]) -> None:
        """Show the others all sessions of this process that have a tunnel. Does not wait."""


def where_in(directory: FleetDirectory, local: LocalDirectory, leaving: Container[str]) -> Where:
    """Where the next visitor of a tunnel goes, as far as this process has no session of it.

    If it has one that is lost or in doubt, and a better one is elsewhere, the visitor takes a hop.

    Args:
        directory: of this node.
        local: the sessions of this process.
        leaving: processes that take no new visitors: these wait here for the next session.
    """

    def where(tunnel_id: str) -> Holding | None:
        if local.has(tunnel_id):
            return None  # to find out the state of that session takes longer
        try:
            holder = directory.find_nowait(tunnel_id)
        except trio.WouldBlock:
            return None
        # Not `isinstance`, which takes long for a protocol.
        if type(holder) is RemoteSession and holder.holding.process not in leaving:
            return holder.holding
        return None

    return where
