"""The file of an access log. Lines wait in a queue of bounded length; a task writes them in batches, in a thread.

Whatever happens to the file, no visitor waits for it: while it cannot be written, lines are dropped and counted. The
log of the program says so once, and says when it works again, and how many lines are missing.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, Literal, NoReturn, final

import trio

from .._model.log_fields import about
from .._storage.files import OPENING
from .entry import AccessLogFormat, Entry

__all__ = ["STANDARD_OUTPUT", "AccessLog"]

STANDARD_OUTPUT: Final = Path("-")
"""In place of a path."""

MOST_WAITING: Final = 8192
"""Lines that may wait; more are dropped."""

BATCH_DELAY: Final = 0.2
"""Seconds in which lines gather before they are written."""

LAST_TIMEOUT: Final = 2.0
"""Seconds for what waits when the log ends."""

RETRY_INTERVAL: Final = 5.0
"""Seconds between attempts while the file cannot be written."""

_NEW_FILE: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | OPENING
_PASSING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN})
"""After these errors the same file may be written again."""

_log: Final = logging.getLogger("pioneer_tunnel.access_log")


@final
class AccessLog:
    """An access log. It is written while `kept` is entered.

    Args:
        path: of the file, which is made with mode 0600 if there is none; `-` for standard output.
        form: of its lines.
        shortened: whether visitors' addresses are shortened to a /24 or a /48.
        shared: whether other processes write the same file. Then it is locked for each batch, so that lines stay whole.
    """

    def __init__(
        self,
        path: Path,
        form: AccessLogFormat = AccessLogFormat.COMMON,
        *,
        shortened: bool = False,
        shared: bool = False,
    ) -> None:
        self.shortened: Final = shortened
        self._path: Final = path
        self._form: Final = form
        self._shared: Final = shared
        self._waiting: Final[deque[Entry]] = deque()
        self._dropped = 0
        self._news = trio.Event()
        self._reopens = False
        self._one_writes: Final = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False  # whether the last line of the file is not whole
        self._failed = False

    def write(self, entry: Entry) -> None:
        """Write a line, soon. It does not wait and never fails."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
        else:
            self._waiting.append(entry)
            self._news.set()

    def reopen(self) -> None:
        """Close the file, and open it again at its path, as after a rename by logrotate. Does not wait."""
        self._reopens = True
        self._news.set()

    @classmethod
    def configured(
        cls, path: Path | None, form: AccessLogFormat, addresses: Literal["full", "short"], *, shared: bool = False
    ) -> AccessLog | None:
        """The log that a configuration asks for; None if it has no path."""
        return None if path is None else cls(path, form, shortened=addresses == "short", shared=shared)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Write what comes. At the end, also when cancelled, write what waits, for 2 seconds at most."""
        async with trio.open_nursery() as nursery:
            writing = trio.CancelScope()
            await nursery.start(self._run, writing)
            # Shielded, so that streams which end because of the same cancellation are logged. Only now, as a `start`
            # that is cancelled leaves no one to end it.
            writing.shield = True
            try:
                yield
            finally:
                writing.cancel()

    async def _run(self, writing: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with writing:
            await self._write_all(task_status)

    async def _write_all(self, task_status: trio.TaskStatus[None]) -> NoReturn:
        try:
            self._reopens = True  # so that a file that cannot be written shows at once
            await self._write_waiting()
            task_status.started()
            while True:
                # No deadline: there is nothing to write without a visitor.
                await self._news.wait()
                await trio.sleep(RETRY_INTERVAL if self._failed and not self._reopens else BATCH_DELAY)
                self._news = trio.Event()
                await self._write_waiting()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LAST_TIMEOUT):
                await self._write_waiting(last=True)

    async def _write_waiting(self, *, last: bool = False) -> None:
        batch, reopens = [*self._waiting], self._reopens
        self._waiting.clear()
        self._reopens = False
        # Abandoned if cancelled: a file on a network may block for any time.
        write = functools.partial(self._write, batch, reopens=reopens, last=last)
        written, error = await trio.to_thread.run_sync(write, abandon_on_cancel=True)
        self._dropped += len(batch) - written
        self._tell(error)

    def _tell(self, error: OSError | None) -> None:
        if error is not None:
            if not self._failed:
                self._failed = True
                fields = about("access_log_failed", file=self._path, reason=error.strerror)
                line = "the access log %s cannot be written, and is incomplete: %s"
                _log.error(line, self._path, error.strerror, extra=fields)
        elif self._failed or self._dropped:
            self._failed = False
            fields = about("access_log_incomplete", file=self._path, dropped=self._dropped)
            line = "the access log %s is written again; lines that are missing: %d"
            _log.warning(line, self._path, self._dropped, extra=fields)
            self._dropped = 0

    # In a thread

    def _write(self, batch: list[Entry], *, reopens: bool, last: bool) -> tuple[int, OSError | None]:
        """Returns how many entries were written, and what went wrong."""
        data = b"".join(entry.line(self._form).encode("ascii") + b"\n" for entry in batch)
        with self._one_writes:
            sent = 0
            try:
                if reopens:
                    self._close()
                if self._descriptor is None:
                    self._descriptor = self._open()
                    self._torn = False
                with _locked(self._descriptor) if self._shared else nullcontext():
                    if self._torn and data:
                        os.write(self._descriptor, b"\n")
                        self._torn = False
                    try:
                        while sent < len(data):
                            sent += os.write(self._descriptor, data[sent:])
                    except OSError:
                        if self._shared:  # else a line of another process would follow a part of this one
                            sent -= _cut_off_part(self._descriptor, data[:sent])
                        raise
            except OSError as error:
                if sent:
                    self._torn = not data[:sent].endswith(b"\n")
                if error.errno not in _PASSING:
                    self._close()
                return data[:sent].count(b"\n"), error
            finally:
                if last:
                    self._close()
            return len(batch), None

    def _open(self) -> int:
        if self._path == STANDARD_OUTPUT:
            return os.dup(1)
        return os.open(self._path, _NEW_FILE, 0o600)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Be the only process that writes, while the block runs. Blocks. A process that is killed holds no lock."""
    import fcntl  # noqa: PLC0415  # Windows has none, and no processes that share a log

    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


def _cut_off_part(descriptor: int, written: bytes) -> int:
    """Remove the part of a line at the end of a file, after `written` was appended; returns its length."""
    part = len(written) - written.rfind(b"\n") - 1
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - part)
    except OSError:  # it is a pipe
        return 0
    return part
