"""The other workers, as a worker knows them: their processes, and their sessions, which the parent tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, final

import cattrs

from ..._model.callbacks import nothing
from ..fleet.neighbours import Neighbours
from ..fleet.node_names import worker_name
from ..fleet.records import Holding
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
        name = worker_name(machine, setup.index)
        self.store: ParentStore = ParentStore(name, setup.process, channel)
        self.on_ended: Callable[[str], object] = nothing
        self._machine: Final = machine
        self._channel: Final = channel
        self._on_holder: Final = on_holder
        self._who: Final[dict[int, str]] = {}
        self._leaving: Final[set[str]] = set()
        self.network = WorkerNetwork(name, setup.process, Path(setup.folder), self._who.get, workers=setup.workers)

    def sessions(self, tunnel_id: str) -> Sequence[Holding]:
        found = self.store.known(tunnel_id).holdings
        return [each for each in found if each.process != self.store.process and each.process not in self._leaving]

    def show(self, tunnel_id: str, holdings: Sequence[Holding]) -> None:
        self._channel.tell("sessions", {"tunnel": tunnel_id, "holdings": cattrs.unstructure([*holdings])})

    def know(self, workers: dict[str, int]) -> None:
        """Trust these processes, and no other ones: the workers of now, by their process ids."""
        self._who.clear()
        self._who.update({int(pid): worker_name(self._machine, index) for pid, index in workers.items()})

    def note_leaving(self, process: str, *, ended: bool) -> None:
        """Another process drains, or has ended: that it has a tunnel does not help new visitors."""
        self._leaving.add(process)
        if ended:
            self.on_ended(process)

    def hear_record(self, message: Any) -> None:
        """The parent says that the record of a tunnel has changed.

        A session of this process may be in the record before it has the tunnel here, and before that helps no visitor.
        """
        record = self.store.hear(message)
        if record.processes - self._leaving - {self.store.process}:
            self._on_holder(message["tunnel"])
