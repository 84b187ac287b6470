"""What all workers do, as the statistics of one relay, and of each worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, final

import trio

from ..._model.certificate_status import CertificateStatus
from ..config import RelayConfig
from ..stats import RelayStats, WorkerStats
from .process import NoWorker, WorkerProcess
from .reports import Report, past, summed_up, total

__all__ = ["Overview"]

REPORT_TIMEOUT: Final = 5.0
"""Seconds that a worker has to report. Of one that is stuck, the last report counts."""

REPORT_AGE: Final = 0.5
"""Seconds for which reports are good, so that who reads several pages gets one state."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.workers")


@final
class Overview:
    """What all workers do.

    Args:
        processes: those that have not ended.
        config: returns the configuration of now.
        draining: returns whether the relay stops.
        since_unix: when counting began.
    """

    def __init__(
        self,
        processes: Collection[WorkerProcess],
        config: Callable[[], RelayConfig],
        draining: Callable[[], bool],
        *,
        since_unix: float,
    ) -> None:
        self._processes: Final = processes
        self._config: Final = config
        self._draining: Final = draining
        self._since: Final = since_unix
        self._past: list[RelayStats] = []
        self._reporting: Final = trio.Lock()
        self._reported_at = float("-inf")

    @property
    def certificates(self) -> dict[str, CertificateStatus]:
        """The status of each certificate that the relay orders, by host."""
        reports = sorted((report for _, report in self._reports()), key=lambda report: report.orders_certificates)
        return {name: status for report in reports for name, status in report.certificates.items()}

    @property
    def pids(self) -> list[int]:
        """The processes of all workers, those that drain among them."""
        return sorted(process.pid for process in self._processes)

    def stats(self) -> RelayStats:
        """What all workers do and have done, as far as they have reported; see `refresh`."""
        reports = self._reports()
        return total(
            [*(report.stats for _, report in reports), *self._past],
            since_unix=self._since,
            draining=self._draining(),
            tunnels=dict.fromkeys([*(entry.id for entry in self._config().tunnels), *_signed(reports)]),
            workers=[_of_worker(process, report) for process, report in reports],
        )

    async def refresh(self) -> None:
        """Let all workers report, unless they have done so half a second ago. It takes 5 seconds at most."""
        async with self._reporting:
            if trio.current_time() < self._reported_at + REPORT_AGE:
                return
            async with trio.open_nursery() as nursery:
                for process in self._processes:
                    if process.listens:
                        nursery.start_soon(_let_report, process)
            self._reported_at = trio.current_time()

    def keep_counts_of(self, process: WorkerProcess) -> None:
        """A worker has ended. What it has counted stays in the sums."""
        if process.report is not None:
            self._past = [summed_up([*self._past, past(process.report.stats)])]

    def _reports(self) -> list[tuple[WorkerProcess, Report]]:
        processes = sorted(self._processes, key=lambda process: (process.index, process.since))
        return [(process, process.report) for process in processes if process.report is not None]


def _signed(reports: Iterable[tuple[WorkerProcess, Report]]) -> Iterator[str]:
    """The ids of all tunnels that the workers of a node of a fleet tell of: an operator has signed some of them."""
    for _, report in reports:
        if report.stats.fleet is not None:
            yield from report.stats.tunnels


async def _let_report(process: WorkerProcess) -> None:
    try:
        process.report = Report.from_wire(await process.call("report", timeout=REPORT_TIMEOUT))
    except NoWorker as error:
        _log.debug("worker %d does not report: %s", process.index, error)


def _of_worker(process: WorkerProcess, report: Report) -> WorkerStats:
    return WorkerStats(
        index=process.index,
        pid=process.pid,
        version=report.version,
        since_unix=report.stats.since_unix,
        draining=report.stats.draining,
        connections=report.stats.connections,
        streams=report.stats.streams,
        sessions_open=report.stats.sessions_open,
        cpu_seconds_total=report.cpu_seconds,
        memory_bytes=report.memory_bytes,
    )
