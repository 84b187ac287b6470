"""The parent of the workers: it starts them, replaces those that end, and tells them what to do. It serves nobody itself.

A worker that ends by itself is replaced at once, and later and later when that happens again and again. Its sockets
stay open, so those who wait to be accepted are served by its successor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, final

import attrs
import trio

from ..._model.certificate_status import CertificateStatus
from ..._model.errors import StorageError, TunnelError
from ..._model.exception_groups import lone_error_bare
from ..._model.log_fields import about
from ..addresses import RelayAddresses
from ..config import RelayConfig, config_of
from ..inherited import Inherited
from ..listeners import name_of
from ..reload import Changes, ConfigFile
from ..server import check_access
from ..sites import Sites
from ..spawning import own_command
from ..start_log import log_start
from ..stats import RelayStats, WorkerStats
from ..tunnels import each_address
from .process import NoWorker, WorkerProcess
from .reports import Report, past, total
from .setup import Setup
from .shares import share_of
from .sockets import SharedSockets

__all__ = ["Parent"]

MOST_WORKERS: Final = 256
REPORT_TIMEOUT: Final = 5.0
"""Seconds that a worker has to report. Of one that is stuck, the last report counts."""

REPORT_AGE: Final = 0.5
"""Seconds for which reports are good, so that who reads several pages gets one state."""

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds until a worker is started again that has ended again."""

LIVED: Final = 10.0
"""Seconds after which the end of a worker counts as the first one."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.workers")


@final
@attrs.define(eq=False)
class _Slot:
    """The place of a worker.

    Attributes:
        index: from 0.
        base: the file whose keys are in force there.
        current: the process that serves; None while there is none.
        failures: how often one after the other it has ended, or has not started.
        changing: is held while the process is replaced.
    """

    index: int
    base: bytes
    current: WorkerProcess | None = None
    failures: int = 0
    changing: trio.Lock = attrs.field(factory=trio.Lock)


@final
class Parent:
    """Runs the workers of a relay.

    Args:
        file: the relay's file, which has been loaded.
        config: what it holds.
        workers: how many workers there are.
        inherited: sockets that listen already; by default none.
        command: starts a worker; by default as this process was started.
        wall_clock: seconds since 1970, for statistics.

    Raises:
        InvalidSettingsError: the relay cannot have so many workers, or the package for its metrics is missing.
    """

    def __init__(
        self,
        file: ConfigFile,
        config: RelayConfig,
        workers: int,
        *,
        inherited: Inherited | None = None,
        command: Sequence[str] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        share_of(config, workers)  # or it cannot be divided
        self._file: Final = file
        self._config = config
        self._tunnels = file.content
        self._command: Final = command or own_command()
        self._inherited: Final = inherited or Inherited()
        self._sockets: Final = SharedSockets(workers, self._inherited)
        self._slots: Final = [_Slot(index, file.content) for index in range(workers)]
        self._processes: Final[set[WorkerProcess]] = set()
        self._past: RelayStats | None = None
        self._reported_at = float("-inf")
        self._reporting: Final = trio.Lock()
        self._applying: Final = trio.Lock()
        self._drain_asked: Final = trio.Event()
        self._ended: Final = trio.Event()
        self._changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._reviving: Final = trio.CancelScope()
        self._since: Final = wall_clock()
        self._sites: Final = Sites(
            self, lambda: self._config, ready=self._is_ready, wall_clock=wall_clock, refresh=self.refresh
        )

    # What it tells

    @property
    def certificates(self) -> dict[str, CertificateStatus]:
        """The status of each certificate that the relay orders, by host."""
        return {name: status for report in self._reports() for name, status in report.certificates.items()}

    def stats(self) -> RelayStats:
        """What all workers do and have done, as far as they have reported; see `refresh`."""
        reports = [process.report.stats for process in self._processes if process.report is not None]
        return total(
            reports if self._past is None else [*reports, self._past],
            since_unix=self._since,
            draining=self._drain_asked.is_set(),
            tunnels=[entry.id for entry in self._config.tunnels],
            workers=[_told(process) for process in sorted(self._processes, key=_order) if process.report is not None],
        )

    async def refresh(self) -> None:
        """Let all workers report, unless they have done so half a second ago. It takes 5 seconds at most."""
        async with self._reporting:
            if trio.current_time() < self._reported_at + REPORT_AGE:
                return
            async with trio.open_nursery() as nursery:
                for process in self._processes:
                    if process.listens:
                        nursery.start_soon(self._ask_report, process)
            self._reported_at = trio.current_time()

    def _is_ready(self) -> bool:
        return not self._drain_asked.is_set() and any(slot.current is not None for slot in self._slots)

    async def _ask_report(self, process: WorkerProcess) -> None:
        try:
            process.report = Report.from_wire(await process.call("report", timeout=REPORT_TIMEOUT))
        except NoWorker as error:
            _log.debug("worker %d does not report: %s", process.index, error)

    def _reports(self) -> list[Report]:
        return [process.report for process in self._processes if process.report is not None]

    # What it does

    async def serve(self, *, task_status: trio.TaskStatus[RelayAddresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the workers, until drained or cancelled. It is started when all of them listen.

        Raises:
            OSError: the relay cannot listen at an address.
            NoWorker: a worker did not start.
        """
        try:
            with lone_error_bare():
                async with trio.open_nursery() as nursery:
                    await self._serve(nursery, task_status)
        finally:
            self._sockets.close()
            self._ended.set()

    async def drain(self) -> None:
        """Stop in order, and wait for that. The workers drain, see `Relay.drain`."""
        self._drain_asked.set()
        await self._ended.wait()

    async def _serve(self, nursery: trio.Nursery, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        self._nursery = nursery
        config = self._config
        await self._sockets.open(config)
        sites = await self._sites.open(self._inherited)
        self._inherited.close_rest()
        nursery.start_soon(self._sites.serve, lambda: False)
        async with trio.open_nursery() as starting:
            for slot in self._slots:
                starting.start_soon(self._start, slot)
        addresses = RelayAddresses(
            all_control=tuple(self._sockets.bound(name_of(one)) for one in each_address(config.control_addr)),
            all_ingress=tuple(self._sockets.bound(name_of(one)) for one in each_address(config.ingress_addr)),
            all_tunnels=self._bound(config),
            all_http=tuple(self._sockets.bound(name_of(one)) for one in each_address(config.http_addr)),
            dashboard=None if config.dashboard is None else sites[config.dashboard],
            metrics=None if config.metrics is None else sites[config.metrics],
        )
        log_start(config, addresses, most_connections=config.limits.connections)
        task_status.started(addresses)
        # No deadline: it serves until it is drained or cancelled.
        await self._drain_asked.wait()
        self._reviving.cancel()
        self._sockets.close()
        for process in self._processes:
            process.tell("drain")
        while self._processes:
            await self._changed.wait()  # no deadline: each worker has one
        nursery.cancel_scope.cancel()

    def _bound(self, config: RelayConfig) -> dict[str, tuple[Any, ...]]:
        """The addresses of each tunnel with a `bind_addr`, by its id."""
        found: dict[str, tuple[Any, ...]] = {}
        for tunnel in config.tunnels:
            for route in tunnel.routes:
                for address in each_address(route.bind_addr):
                    found[tunnel.id] = (*found.get(tunnel.id, ()), self._sockets.bound(name_of(address, route)))
        return found

    # Starting and replacing

    async def _start(self, slot: _Slot, base: bytes | None = None) -> WorkerProcess:
        """Start a worker, and wait until it listens. It is the current one then.

        Raises:
            NoWorker: it does not listen.
        """
        assert self._nursery is not None
        slot.base = base or slot.base
        process = WorkerProcess(slot.index, self._command, partial(self._answer, slot), partial(self._hear, slot))
        self._processes.add(process)
        self._nursery.start_soon(self._watch, slot, process)
        setup = Setup(
            index=slot.index, workers=len(self._slots), base=slot.base.decode(), tunnels=self._tunnels.decode()
        )
        try:
            await process.begin(setup.to_wire(), self._sockets.of_worker(slot.index))
        except BaseException:
            process.tell("end")
            raise
        slot.current = process
        line = "worker %d, process %d, listens"
        _log.info(line, slot.index, process.pid, extra=about("worker_listens", worker=slot.index))
        return process

    async def _watch(self, slot: _Slot, process: WorkerProcess) -> None:
        """Wait for the end of a worker, and replace it if nobody has asked for that."""
        try:
            await process.run()
        finally:
            self._processes.discard(process)
            self._changed.set()
            self._changed = trio.Event()
            if process.report is not None:
                stats = past(process.report.stats)
                self._past = stats if self._past is None else self._sum_of_past([self._past, stats])
        if slot.current is process:
            slot.current = None
            if not self._drain_asked.is_set():
                why = process.how_it_ended
                line = "worker %d, process %d, has ended: %s; another one is started"
                fields = about("worker_ended", worker=slot.index, reason=why)
                _log.error(line, slot.index, process.pid, why, extra=fields)
                slot.failures = 0 if trio.current_time() - process.since >= LIVED else slot.failures + 1
                assert self._nursery is not None
                self._nursery.start_soon(self._revive, slot)

    async def _revive(self, slot: _Slot) -> None:
        """Start a worker in the place of one that has ended."""
        with self._reviving:
            pass
