"""The trace of a simulated day: what happened, and when; how much of it; and the first thing that was wrong."""

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
        lines: what happened. Nothing in it is secret or drawn from the system's randomness.
        counts: of what there was how much.
        complaint: the first thing that was wrong; None while nothing was.
        complained: set with it.
    """

    def __init__(self) -> None:
        self.lines: Final[list[str]] = []
        self.counts: Final[Counter[str]] = Counter()
        self.complaint: str | None = None
        self.complained: Final = trio.Event()

    @property
    def digest(self) -> str:
        """A short name for all that happened: two runs with the same have had the same day."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def note(self, event: str, *, count: str | None = None) -> None:
        """Something has happened."""
        self.lines.append(f"{trio.current_time():>11.3f}  {event}")
        if count is not None:
            self.counts[count] += 1

    def status(self, seen: Seen) -> None:
        """A status was shown."""
        told = {name: seen.status.get(name) for name in ("state", "error_kind", "attempt", "retry_at_unix")}
        self.lines.append(f"{seen.at:>11.3f}  status {told}")
        self.counts["statuses"] += 1

    def complain(self, complaint: str) -> None:
        """Something was wrong. The first of it counts: what comes after may follow from it."""
        if self.complaint is None:
            self.complaint = complaint
            self.complained.set()
