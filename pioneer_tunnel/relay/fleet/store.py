"""What keeps the records of a fleet's tunnels: an interface.

A holding counts while the *lease* of its process lives. A process has one lease, which it renews; so a fleet pays for
its processes, not for its sessions. While a node is restarted, its two processes have a lease each, and the sessions of
both count.

Leases that have expired while they could not be renewed prove nothing. So a process that has reached the store again
takes all holdings as valid for the time of one lease, in which the others renew theirs.

A write is a compare-and-set on the version of the record. So of two nodes that want a tunnel at the same time, one has
to decide again, with the other one's holding before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NoReturn, Protocol

import trio

from .records import Holding, Record

__all__ = ["LEASE", "Changed", "Store", "StoreUnreachable"]

LEASE: Final = 15.0
"""Seconds that a lease lives after it was renewed. It is renewed three times in that time."""


class StoreUnreachable(Exception):
    """The store does not answer. A write may have been carried out all the same."""


class Changed(Exception):
    """The record has another version than the writer expected.

    Args:
        record: the record as it is.
    """

    def __init__(self, record: Record) -> None:
        super().__init__(f"the record is of version {record.version} now")
        self.record = record


class Store(Protocol):
    """What one node sees of the store.

    Attributes:
        node: the name of this node.
        process: the id of this process.
        reachable: whether the store answers, as far as is known. While it is False, `read` and `write` fail at once.
        on_change: called with the id of a tunnel when another process has changed its record, which this one has, or
            had, a holding in. It may also be called for other tunnels. It must not raise.
        on_gap: called when changes may have been missed, and holdings of this process may have got lost: the store is
            reachable again, or the lease had expired. It must not raise.
    """

    node: str
    process: str
    reachable: bool
    on_change: Callable[[str], object]
    on_gap: Callable[[], object]

    async def read(self, tunnel_id: str) -> Record:
        """The record of a tunnel now.

        Raises:
            StoreUnreachable: the store does not answer. It takes a few seconds at most to find out.
        """

    def known(self, tunnel_id: str) -> Record | None:
        """What this node knows without asking, and may act on; None if it has to `read`.

        It may be out of date: a caller that acts on it finds out, and reads. While the store is unreachable, what was
        known stays known.
        """

    async def write(self, tunnel_id: str, *, expected: int, holdings: Sequence[Holding]) -> Record:
        """Replace the holdings of a tunnel, unless its record has changed. All nodes in it learn of it.

        Args:
            tunnel_id: the tunnel.
            expected: the version of the record that the caller has decided on.
            holdings: those of other processes that stay, from that record, and all of this process. One with the fence
                0 gets a fence above all that were ever given. One that has a fence keeps it.

        Returns:
            The record as it is now.

        Raises:
            Changed: it had another version; nothing was written.
            StoreUnreachable: as `read`. Whether it was written is not known. `reachable` is False after it, until
                `on_gap` is called.
        """

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Keep the lease of this process alive, and receive changes. Ends the lease when it is cancelled.

        It starts when the store has answered, or after some seconds: a store that is down does not keep a relay from
        starting.
        """
