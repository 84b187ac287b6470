"""What one tunnel of a gateway counts while it runs. `Tunnel.stats` and `RemoteAccess.stats` make a value of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, final

from .._model.counters import ServiceCounters
from .._model.stats import SessionStats, TunnelStats

__all__ = ["TunnelCounts"]


@final
class TunnelCounts:
    """The counts of a tunnel, over all its sessions. See `TunnelStats` for what each one means.

    Args:
        since_unix: when counting begins, in seconds since 1970.

    Attributes:
        services: counts visitors' streams.
        attempts, sessions, losses, resumes: how often.
        failures, refusals: by reason.
    """

    def __init__(self, since_unix: float = 0.0) -> None:
        self._since: Final = since_unix
        self.services: Final = ServiceCounters()
        self.attempts: int = 0
        self.sessions: int = 0
        self.losses: int = 0
        self.resumes: int = 0
        self.failures: Final[Counter[str]] = Counter()
        self.refusals: Final[Counter[str]] = Counter()

    def stats(self, sessions: Sequence[SessionStats] = ()) -> TunnelStats:
        """The numbers now, with those of the sessions that are up."""
        return TunnelStats(
            since_unix=self._since,
            sessions=tuple(sessions),
            streams=self.services.total(),
            services=self.services.stats(),
            attempts_total=self.attempts,
            sessions_total=self.sessions,
            losses_total=self.losses,
            resumes_total=self.resumes,
            failures_total=dict(self.failures),
            refusals_total=dict(self.refusals),
        )
