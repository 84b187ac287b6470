"""The processes of `pioneer-tunnel relay --workers N`: the parent, and a worker."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Final, final

import trio

from .._model.errors import InvalidSettingsError
from ..relay.administration.running import serve_control_socket
from ..relay.inherited import from_systemd
from ..relay.reload import ConfigFile, follow
from ..relay.workers.parent import Parent
from ..relay.workers.worker import Worker
from ..websocket import EngineName
from .service_manager import tell_reloading, tell_systemd
from .signals import received, run_until_stopped
from .standard_error import JsonFormatter

__all__ = ["run_parent", "run_worker"]

_OF_THE_PARENT: Final = frozenset(
    {"configuration_applied", "few_descriptors", "in_clear", "listening", "restart_needed", "socket_inherited"}
)
"""Events that are the same in all workers. The parent logs them once."""


def run_worker(file: Path, engine: EngineName | None, handler: logging.Handler) -> None:
    """Run the worker that this process is."""

    def name_in_log(index: int) -> None:
        handler.addFilter(_OfWorker(index))
        if not isinstance(handler.formatter, JsonFormatter):
            handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s worker {index}: %(message)s"))

    worker = Worker.from_environment(file, engine=engine, on_index=name_in_log)
    assert worker is not None
    worker.run()


def run_parent(config: Path, workers: int) -> None:
    """Run the parent of so many workers.

    Raises:
        InvalidSettingsError, StorageError: the file cannot be used; or this system has no such workers.
        OSError: the relay cannot listen at an address.
        NoWorker: a worker does not start.
    """
    if sys.platform == "win32":
        raise InvalidSettingsError("--workers needs Unix sockets that pass others on, which Windows does not have")
    file = ConfigFile(config)
    parent = Parent(file, file.load(), workers, inherited=from_systemd())
    process = ParentProcess(parent, file)
    run_until_stopped(process.run, process.stop)


@final
class ParentProcess:
    """The parent, and what signals do to it.

    Args:
        parent: the parent.
        file: its configuration, which has been loaded.
    """

    def __init__(self, parent: Parent, file: ConfigFile) -> None:
        self._parent: Final = parent
        self._file: Final = file
        self._restarting: Final = trio.CancelScope()

    async def run(self) -> None:
        """Serve until `stop`. Reload on SIGHUP, and replace the workers on SIGUSR2."""
        parent = self._parent
        with received("SIGHUP") as reloads, received("SIGUSR2") as restarts:
            assert reloads is not None
            assert restarts is not None
            async with trio.open_nursery() as nursery:

                async def serve(*, task_status: trio.TaskStatus[object]) -> None:
                    await parent.serve(task_status=task_status)
                    nursery.cancel_scope.cancel()

                await nursery.start(serve)
                tell_systemd(f"READY=1\nMAINPID={os.getpid()}")
                answer = partial(serve_control_socket, refresh=parent.overview.refresh)
                nursery.start_soon(answer, parent.overview, self._file.path)
                nursery.start_soon(self._restart_when_asked, restarts)
                await follow(self._file, parent.apply, reload_now=_Reloads(reloads, parent))

    async def stop(self) -> None:
        """Let visitors finish, and end `run`."""
        tell_systemd("STOPPING=1")
        self._restarting.cancel()
        await self._parent.drain()

    async def _restart_when_asked(self, asked: AsyncIterator[object]) -> None:
        with self._restarting:
            async for _ in asked:
                tell_reloading()
                await self._parent.restart()
                tell_systemd("READY=1")


@final
class _Reloads(AsyncIterator[object]):
    """Signals to reload, each of which reopens the access log as well. The service manager knows how long it takes."""

    def __init__(self, signals: AsyncIterator[object], parent: Parent) -> None:
        self._signals: Final = signals
        self._parent: Final = parent
        self._reloading = False

    async def __anext__(self) -> object:
        if self._reloading:
            self._reloading = False
            tell_systemd("READY=1")
        signal = await anext(self._signals)
        self._reloading = True
        tell_reloading()
        self._parent.reopen_access_log()
        return signal


@final
class _OfWorker(logging.Filter):
    """Says in each record which worker it is of, and drops what the parent says for all."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index: Final = index

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        record.worker = self._index
        return getattr(record, "event", None) not in _OF_THE_PARENT
