"""The trace of a simulated day: its events and their times, counts, and the first fault."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Final, final

import trio

from pioneer_tunnel.testing.status_recorder import Seen

__all__ = ["Trace"]


@final
class Trace:
    """See the module.

    Attributes:
        lines: the events. None contains a secret or a value from the system's randomness.
        counts: the number of events by kind.
        complaint: the first fault; None if there is none.
        complained: set with `complaint`.
    """

    def __init__(self) -> None:
        self.lines: Final[list[str]] = []
        self.counts: Final[Counter[str]] = Counter()
        self.complaint: str | None = None
        self.complained: Final = trio.Event()

    @property
    def digest(self) -> str:
        """A hash of all events: two runs with the same digest had the same events."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def note(self, event: str, *, count: str | None = None) -> None:
        """Record an event."""
        self.lines.append(f"{trio.current_time():>11.3f}  {event}")
        if count is not None:
            self.counts[count] += 1

    def status(self, seen: Seen) -> None:
        """Record a status."""
        told = {name: seen.status.get(name) for name in ("state", "error_kind", "attempt", "retry_at_unix")}
        self.lines.append(f"{seen.at:>11.3f}  status {told}")
        self.counts["statuses"] += 1

    def complain(self, complaint: str) -> None:
        """Record a fault. Only the first counts: later ones may be its consequences."""
        if self.complaint is None:
            self.complaint = complaint
            self.complained.set()
