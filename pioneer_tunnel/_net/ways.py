"""Whether the way that packets take to some destinations has changed. No I/O.

A way is an interface, a gateway and a source address. `Ways` is told of what may have happened (`note`), and of the
ways as they are now (`look`). It reports a change only while there is a way: a link that has none cannot be helped, and
may live when the way comes back. It reports a way that was lost and came back, also if it is the same as before: in
between it may have led elsewhere, and a link may be gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import attrs

__all__ = ["Way", "Ways"]


@final
@attrs.frozen(kw_only=True)
class Way:
    """How packets leave. What the system does not tell is 0 or empty.

    Attributes:
        interface: its number.
        gateway, source: addresses.
    """

    interface: int = 0
    gateway: bytes = b""
    source: bytes = b""


@final
class Ways:
    """The ways to some destinations, by the destination's name."""

    def __init__(self) -> None:
        self._ways: dict[str, Way | None] = {}
        self._down: Final[set[int]] = set()
        self._lost = False

    def note(self, interface: int, *, running: bool | None = None, lost: bool = False) -> None:
        """Take note of what happened to an interface.

        Args:
            interface: its number.
            running: whether it can carry packets now; None if that is not known to have changed.
            lost: whether it has lost an address or a route.
        """
        if running is not None:
            (self._down.discard if running else self._down.add)(interface)
        self._lost |= lost and any(way is not None and way.interface == interface for way in self._ways.values())

    def look(self, ways: Mapping[str, Way | None]) -> bool:
        """Take note of the ways as they are now; returns whether a change is to be reported.

        Args:
            ways: by destination; None where there is none. The first look at a destination is no change.
        """
        now = {name: None if way is None or way.interface in self._down else way for name, way in ways.items()}
        changed = self._lost or any(now[name] != self._ways[name] for name in now.keys() & self._ways.keys())
        if not any(now.values()):
            self._lost = True
            return False
        self._ways, self._lost = now, False
        return changed
