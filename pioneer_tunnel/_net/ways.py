"""Whether the way that packets take to some destinations has changed. No I/O.

A way is an interface, a gateway and a source address. `Ways` hears of what may have happened (`note`), and of the
ways as they are now (`look`). It reports a new way, and a way that was lost and came back, also if it is the same as
before: in between it may have led elsewhere. It does not report a loss: a link without a way cannot be helped, and may
live when the way comes back.
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
    """The ways to some destinations, by the destination's IP address."""

    def __init__(self) -> None:
        self._ways: dict[str, Way | None] = {}
        self._down: Final[set[int]] = set()
        self._lost: Final[set[str]] = set()  # the destinations without a way, or that have lost one since the last look

    def note(
        self, interface: int, *, running: bool | None = None, lost: bool = False, ipv6: bool | None = None
    ) -> None:
        """Take note of what happened to an interface.

        Args:
            interface: its number.
            running: whether it can carry packets now; None if that is not known to have changed.
            lost: whether it has lost an address or a route.
            ipv6: whether what it has lost was for IPv6; None for both versions.
        """
        if running is not None:
            (self._down.discard if running else self._down.add)(interface)
        if lost:
            self._lost.update(
                name
                for name, way in self._ways.items()
                if way is not None and way.interface == interface and ipv6 in (None, ":" in name)
            )

    def look(self, ways: Mapping[str, Way | None]) -> bool:
        """Take note of the ways as they are now; returns whether a change is to be reported.

        Args:
            ways: by destination; None where there is none. The first look at a destination is no change.
        """
        changed = False
        for name, way in ways.items():
            if way is None or way.interface in self._down:
                self._lost.add(name)
            else:
                changed |= name in self._lost or self._ways.get(name, way) != way
                self._lost.discard(name)
        self._ways = dict(ways)
        return changed
