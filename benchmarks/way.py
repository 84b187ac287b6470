"""A way to the origin, and who can open one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeAlias, final

import attrs

from .connections import Endpoint
from .processes import Process, Program

__all__ = ["MEMORY_GROUPS", "PROCESSES", "SPEED_GROUPS", "Contestant", "Open", "Programs", "Way"]

PROCESSES: Final = ("relay", "gateway")
MEMORY_GROUPS: Final = ("idle", "stalled", "streams")
"""What is measured once, since it repeats."""
SPEED_GROUPS: Final = ("throughput", "latency", "connections", "http", "busy", "reconnect")
"""What is measured in each round, in this order: some tunnels still have much to carry after `busy`, and
`reconnect` ends a process."""


@final
@attrs.frozen(kw_only=True)
class Way:
    """A way to the origin that is open now.

    Attributes:
        endpoint: where visitors connect.
        processes: those that carry it, by the names in `PROCESSES`.
        relay: the program, if its gateway connects again after a restart.
        control: the port where that gateway connects.
    """

    endpoint: Endpoint
    processes: Mapping[str, Process] = attrs.field(factory=dict)
    relay: Program | None = None
    control: int | None = None


Open: TypeAlias = Callable[[Endpoint], AbstractContextManager[Way]]
"""Opens a way to an origin."""


@final
@attrs.frozen(kw_only=True)
class Contestant:
    """Who may be in the race.

    Attributes:
        name: of one or two words, without spaces.
        about: what it is, in a few words.
        open: opens a way.
        missing: why it cannot run here, and what to do about it; None if it can.
        groups: what is measured of it.
        by_default: whether it runs if `--only` names none.
        most_streams: how many visitors it takes at a time.
    """

    name: str
    about: str
    open: Open
    missing: str | None = None
    groups: tuple[str, ...] = (*MEMORY_GROUPS, *SPEED_GROUPS)
    by_default: bool = True
    most_streams: int = 10_000


@final
@attrs.frozen
class Programs:
    """Where other tunnels' programs are: those that `--program` names, and those on PATH."""

    named: Mapping[str, Path] = attrs.field(factory=dict)

    def find(self, name: str) -> Path | None:
        if name in self.named:
            return self.named[name]
        found = shutil.which(name)
        return Path(found) if found else None

    def missing(self, name: str, remedy: str) -> str | None:
        """None if it is there, or else a line that tells what to do."""
        return None if self.find(name) else f"there is no {name} ({remedy})"
