"""The other workers of this machine, for a node of a fleet that is one of them.

The workers know each other's sessions without Redis: each one shows its own to the others. So while Redis is down, a
visitor who reaches another worker than its gateway is served all the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from ..gateways.registry import LocalDirectory
from .passing import Where
from .records import Holding
from .store import Store
from .unix_network import WorkerNetwork

__all__ = ["Neighbours", "where_in"]


class Neighbours(Protocol):
    """The other workers of this machine.

    Attributes:
        network: the way to the others.
        store: what all workers know of their sessions. Its `node` and `process` are those of this worker. This node
            sets its `on_change`.
        on_ended: called with a process that has ended. This node sets it.
    """

    network: WorkerNetwork
    store: Store
    on_ended: Callable[[str], object]

    def sessions(self, tunnel_id: str) -> Sequence[Holding]:
        """The sessions of the others that have a tunnel, and take new visitors. Does not wait."""

    def show(self, tunnel_id: str, holdings: Sequence[Holding]) -> None:
        """Show the others all sessions of this process that have a tunnel. Does not wait."""


def where_in(neighbours: Neighbours, local: LocalDirectory, spread: random.Random) -> Where:
    """Where the next visitor of a tunnel goes: to another worker, if this one has no session of the tunnel.

    If it has one that is lost or in doubt, and a better one is elsewhere, the visitor takes a hop. To find that out
    takes longer, and nearly all are sound.

    Args:
        neighbours: the other workers.
        local: the sessions of this one.
        spread: chooses between sessions of several workers.
    """

    here = local.tunnels

    def where(tunnel_id: str) -> Holding | None:
        if tunnel_id in here:
            return None
        found = neighbours.sessions(tunnel_id)
        if len(found) < 2:
            return found[0] if found else None
        return spread.choice(found)

    return where
