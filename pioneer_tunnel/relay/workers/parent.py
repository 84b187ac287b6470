"""The parent of the workers: it starts them, replaces those that end, and tells them what to do. It serves no visitors.

A worker that ends by itself is replaced at once, and later and later when that happens again and again. Its sockets
stay open, and another worker accepts there until its successor does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

import attrs
import trio

from ..._model.errors import TunnelError
from ..._model.exception_groups import lone_error_bare
from ..._model.log_fields import about
from ..._net.descriptor_limit import descriptor_limit
from ..addresses import RelayAddresses
from ..admission import SPARE_DESCRIPTORS
from ..config import RelayConfig
from ..inherited import Inherited
from ..reload import Changes, ConfigFile, check_access
from ..sites import Sites
from ..spawning import own_command
from ..start_log import log_changes, log_start
from .crew import Crew
from .folder import private_folder
from .overview import Overview
from .process import NoWorker, WorkerProcess
from .setup import Setup
from .shares import share_of
from .sockets import SharedSockets

__all__ = ["Parent"]

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds until a worker is started again that has ended again."""

LIVED: Final = 10.0
"""Seconds after which the end of a worker counts as the first one."""

STUCK_TIMEOUT: Final = 10.0
"""Seconds beyond `drain_timeout_ms` after which a worker that drains is ended."""

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
        stand_in: the worker that accepts at its sockets while there is none.
        changing: is held while the process is replaced.
    """

    index: int
    base: bytes
    current: WorkerProcess | None = None
    failures: int = 0
    stand_in: WorkerProcess | None = None
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
        self._crew: Final = Crew(self._replace_soon)
        self._folder: Path | None = None
        self._applying: Final = trio.Lock()
        self._drain_asked: Final = trio.Event()
        self._ended: Final = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._replacing: trio.Nursery
        self._overview: Final = Overview(
            self._crew.processes, lambda: self._config, self._drain_asked.is_set, since_unix=wall_clock()
        )
        self._sites: Final = Sites(
            self._overview,
            lambda: self._config,
            ready=self._is_ready,
            wall_clock=wall_clock,
            refresh=self._overview.refresh,
        )

    @property
    def overview(self) -> Overview:
        """What the workers do, for `relay status`."""
        return self._overview

    def _is_ready(self) -> bool:
        return not self._drain_asked.is_set() and any(slot.current is not None for slot in self._slots)

    # What it does

    async def serve(self, *, task_status: trio.TaskStatus[RelayAddresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the workers, until drained or cancelled. It is started when all of them listen.

        Raises:
            OSError: the relay cannot listen at an address.
            NoWorker: a worker did not start.
        """
        try:
            with lone_error_bare(), private_folder() as folder:
                self._folder = folder
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await self._serve(task_status)
                    nursery.cancel_scope.cancel()
        finally:
            self._sockets.close()
            self._ended.set()

    async def drain(self) -> None:
        """Stop in order, and wait for that. The workers drain, see `Relay.drain`."""
        self._drain_asked.set()
        await self._ended.wait()

    async def apply(self, config: RelayConfig) -> None:
        """Serve the tunnels of `config`, which the file holds, in all workers: see `Relay.apply`.

        Raises:
            InvalidSettingsError, StorageError, OSError: see `Relay.apply`. Nothing has changed then, in no worker.
        """
        async with self._applying:
            changes = Changes.between(self._config, config)
            await trio.to_thread.run_sync(check_access, config)
            applied = attrs.evolve(self._config, tunnels=config.tunnels)
            opened = {} if self._drain_asked.is_set() else await self._sockets.open(applied)
            self._config, self._tunnels = applied, self._file.content
            async with trio.open_nursery() as nursery:
                for process in self._crew.processes:
                    process.give({name: of_all[process.index] for name, of_all in opened.items()})
                    nursery.start_soon(self._apply_at, process, self._tunnels.decode())
            self._close_unused()
            self._share_out(moved=True)
            log_changes(changes)

    def reopen_access_log(self) -> None:
        """Let each worker reopen the file of the access log. Does not wait."""
        for process in self._crew.processes:
            process.tell("reopen")

    async def restart(self) -> None:
        """Replace the workers one by one. They start with the file as it is now, and with the package as it is now.

        A worker drains when its successor listens. The next one is replaced when its gateways have come back, or after
        some seconds. If the first one cannot be replaced, nothing changes; the log says why.
        """
        earlier = self._config, self._tunnels
        replaced: list[int] = []
        try:
            config = await trio.to_thread.run_sync(self._file.load)
            share_of(config, len(self._slots))
            await self._sockets.open(config)
            self._config, self._tunnels = config, self._file.content
            for slot in self._slots:
                async with self._applying, slot.changing:
                    tunnels = await self._start_next(slot, self._tunnels)
                replaced.append(slot.index)
                await self._crew.wait_moved(tunnels)
            _log.info("all workers are replaced", extra=about("workers_replaced"))
        except (NoWorker, TunnelError, OSError) as error:
            if not replaced:
                self._config, self._tunnels = earlier
            which = f"worker {len(replaced)}"
            fields = about("no_successor", worker=len(replaced), reason=error)
            _log.error("there is no successor of %s, and it goes on: %s", which, error, extra=fields)
        self._close_unused()

    async def _serve(self, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        assert self._nursery is not None
        config = self._config
        await self._sockets.open(config)
        sites = await self._sites.open(self._inherited)
        self._inherited.close_rest()
        self._nursery.start_soon(self._sites.serve, lambda: False)
        async with trio.open_nursery() as replacing:
            self._replacing = replacing
            async with trio.open_nursery() as starting:
                for slot in self._slots:
                    starting.start_soon(self._replace, slot, None)
            addresses = attrs.evolve(
                self._sockets.addresses(config),
                dashboard=None if config.dashboard is None else sites[config.dashboard],
                metrics=None if config.metrics is None else sites[config.metrics],
            )
            log_start(config, addresses, most_connections=self._most_connections(config))
            task_status.started(addresses)
            # No deadline: it serves until it is drained or cancelled.
            await self._drain_asked.wait()
            replacing.cancel_scope.cancel()
        self._sockets.close()
        for process in self._crew.processes:
            process.tell("drain")
        with trio.move_on_after(config.drain_timeout_ms / 1000 + STUCK_TIMEOUT):
            await self._crew.wait_all_ended()

    def _most_connections(self, config: RelayConfig) -> int:
        """How many connections all workers take."""
        descriptors = descriptor_limit()
        most = config.limits.connections
        return most if descriptors is None else min(most, len(self._slots) * (descriptors - SPARE_DESCRIPTORS))

    def _close_unused(self) -> None:
        """Close the sockets of addresses that the configuration does not name any more."""
        if len({slot.base for slot in self._slots}) == 1:
            self._sockets.keep_only(self._config)

    async def _apply_at(self, process: WorkerProcess, content: str) -> None:
        try:
            await process.call("apply", content)
        except NoWorker as error:
            if process.ended.is_set() or process.retired:
                return
            # It was checked here. So this is no mistake of the operator, and the others have applied it.
            line = "worker %d does not apply the configuration, and is replaced: %s"
            fields = about("worker_replaced", worker=process.index, reason=error)
            _log.error(line, process.index, error, extra=fields)
            self._replace_soon(process)

    # Starting and replacing

    async def _replace(self, slot: _Slot, process: WorkerProcess | None) -> None:
        """Start a worker in the place of `process`, unless another one has its place by now.

        Args:
            slot: where.
            process: the one before it; None for a place without one.

        Raises:
            NoWorker: it does not listen. The one before it goes on.
        """
        async with slot.changing:
            if slot.current is process:
                await self._start_next(slot, slot.base)

    async def _start_next(self, slot: _Slot, base: bytes) -> Sequence[str]:
        """Start a worker, and when it listens, let the one before it drain. The caller holds `slot.changing`.

        Args:
            slot: where.
            base: the file whose keys are in force there from now on.

        Returns:
            The ids of the tunnels of the one before it.

        Raises:
            NoWorker: it does not listen. The one before it goes on.
        """
        before = slot.current
        slot.current = await self._start(slot.index, base)
        slot.base = base
        self._share_out()
        return () if before is None or before.ended.is_set() else await self._crew.retire(before)

    async def _start(self, index: int, base: bytes) -> WorkerProcess:
        """Start a worker, and wait until it listens.

        Raises:
            NoWorker: it does not.
        """
        assert self._nursery is not None
        assert self._folder is not None
        process = self._crew.start(index, self._command)
        self._nursery.start_soon(self._watch, process)
        setup = Setup(
            index=index,
            workers=len(self._slots),
            base=base.decode(),
            tunnels=self._tunnels.decode(),
            process=process.id,
            folder=str(self._folder),
            connected=self._crew.missing,
        )
        try:
            await process.begin(setup.to_wire(), self._sockets.of_worker(index))
            if process.ended.is_set():
                raise NoWorker(f"it has ended: {process.how_it_ended}")
        finally:
            if not process.listens:
                process.end()
        line = "worker %d, process %d, listens"
        _log.info(line, index, process.pid, extra=about("worker_listens", worker=index))
        return process

    def _share_out(self, *, moved: bool = False) -> None:
        """Let others accept at the sockets of workers that are missing.

        Args:
            moved: the addresses have changed.
        """
        serving = [slot.current for slot in self._slots if slot.current is not None]
        for slot in self._slots:
            stand_in = serving[slot.index % len(serving)] if slot.current is None and serving else None
            if slot.stand_in is not None and (moved or stand_in is not slot.stand_in):
                slot.stand_in.tell("stand back", slot.index)
                slot.stand_in = None
            if stand_in is not None and slot.stand_in is None:
                slot.stand_in = stand_in
                for name, listening in self._sockets.only_of_worker(slot.index).items():
                    stand_in.tell("stand in", {"worker": slot.index, "name": name}, listening)

    def _replace_soon(self, process: WorkerProcess) -> None:
        """Replace a worker that shall go. Does not wait."""
        if not self._drain_asked.is_set():
            self._replacing.start_soon(self._replace_quietly, process)

    async def _replace_quietly(self, process: WorkerProcess) -> None:
        try:
            await self._replace(self._slots[process.index], process)
        except NoWorker as error:
            fields = about("no_successor", worker=process.index, reason=error)
            _log.error("there is no successor of worker %d: %s", process.index, error, extra=fields)

    async def _watch(self, process: WorkerProcess) -> None:
        """Wait for the end of a worker, and replace it if that end was not asked for."""
        slot = self._slots[process.index]
        try:
            await process.run()
        finally:
            self._crew.ended(process)
            self._overview.keep_counts_of(process)
        if slot.current is process:
            slot.current = None
            if not self._drain_asked.is_set():
                self._share_out()
                slot.failures = slot.failures + 1 if trio.current_time() < process.since + LIVED else 0
                line = "worker %d, process %d, has ended: %s; another one is started"
                fields = about("worker_ended", worker=slot.index, reason=process.how_it_ended)
                _log.error(line, slot.index, process.pid, process.how_it_ended, extra=fields)
                self._replacing.start_soon(self._revive, slot)

    async def _revive(self, slot: _Slot) -> None:
        """Start a worker in the place of one that has ended, until that succeeds."""
        while slot.current is None:
            if slot.failures:
                await trio.sleep(min(FIRST_DELAY * 2 ** (slot.failures - 1), LONGEST_DELAY))
            try:
                await self._replace(slot, None)
            except NoWorker as error:
                slot.failures += 1
                fields = about("worker_not_started", worker=slot.index, reason=error)
                _log.error("worker %d cannot be started: %s", slot.index, error, extra=fields)
