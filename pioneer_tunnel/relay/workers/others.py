"""The other workers, as a worker knows them: their processes, and their sessions, which the parent tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set as AbstractSet
from pathlib import Path
from typing import Any, Final, final

import cattrs

from ..fleet.neighbours import Neighbours
from ..fleet.node_names import worker_name
from ..fleet.records import Holding, Record
from ..fleet.unix_network import WorkerNetwork
from .channel import Channel
from .records import ParentStore
from .setup import Setup

__all__ = ["OtherWorkers"]


@final
class OtherWorkers(Neighbours):
    """The other workers.

    Args:
        machine: the name of the relay, or of its node in a fleet.
        setup: what the parent says.
        channel: leads to the parent.
        on_holder: called with the id of a tunnel that another worker has, which does not drain.
    """

    def __init__(self, machine: str, setup: Setup, channel: Channel, on_holder: Callable[[str], object]) -> None:
        self.name = worker_name(machine, setup.index)
        self.store: ParentStore = ParentStore(self.name, setup.process, channel)
        self.leaving: set[str] = set()
        self.on_killed: Callable[[str], object] = lambda _process: None
        self._machine: Final = machine
        self._channel: Final = channel
        self._on_holder: Final = on_holder
        self._who: Final[dict[int, str]] = {}
        self.network = WorkerNetwork(self.name, setup.process, Path(setup.folder), self._who.get, workers=setup.workers)

    def sessions(self, tunnel_id: str) -> Sequence[Holding]:
        not_these = {self.store.process, *self.leaving}
        return [holding for holding in self.store.known(tunnel_id).holdings if holding.process not in not_these]

    def show(self, tunnel_id: str, holdings: Sequence[Holding]) -> None:
        self._channel.tell("sessions", {"tunnel": tunnel_id, "holdings": cattrs.unstructure([*holdings])})

    def know(self, workers: dict[str, int]) -> None:
        """Trust these processes, and no other ones: the workers of now, by their process ids."""
        self._who.clear()
        self._who.update({int(pid): worker_name(self._machine, index) for pid, index in workers.items()})

    def note_leaving(self, process: str, *, ended: bool) -> None:
        """Another process drains, or has ended: that it has a tunnel does not help new visitors."""
        self.leaving.add(process)
        if ended:
            self.on_killed(process)

    def hear_record(self, message: Any) -> None:
        """The parent says that the record of a tunnel has changed.

        A session of this process may be in the record before it has the tunnel here, and before that helps no visitor.
        """
        record = self.store.hear(message)
        if _processes(record) - self.leaving - {self.store.process}:
            self._on_holder(message["tunnel"])


def _processes(record: Record) -> AbstractSet[str]:
    return {holding.process for holding in record.holdings}
