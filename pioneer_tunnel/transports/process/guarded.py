"""A program that lives no longer than an `async with` block.

    async with guarded(orders, typed=None, output=output, log=log) as program:
        await program.ended.wait()

When the block is left, also when it is cancelled at any checkpoint of the start, nothing of the program is left. The
guardian sends SIGTERM, then SIGKILL, and reaps; the block waits for the guardian, shielded and with a deadline. If this
process dies, the guardian does the same by itself.

One task reads the output without a pause from start to end, so the program never blocks on a full pipe. `output` bounds
what is kept of it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, final

import trio

from ..._model.errors import ProcessExitedError, fresh_copy
from . import guardian
from .guardian import Orders
from .output import Budget, Output

__all__ = ["Program", "StartRefused", "guarded"]

_GUARDIAN: Final = Path(guardian.__file__)
_START_TIMEOUT: Final = 15.0
"""Seconds for the guardian to start. It takes 20 ms; much more means that the machine is overloaded."""
_STOP_MARGIN: Final = 8.0
"""Seconds that the guardian has after the grace: more than it needs to kill and reap everything."""
_LAST_WORDS_SECONDS: Final = 1.0
_READ_SIZE: Final = 16 * 1024
_LINES_LOGGED_A_SECOND: Final = 200
_GUARDIANS_VARIABLES: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Variables that a Python interpreter may need to start. The guardian gets no others."""


@final
class StartRefused(Exception):
    """The system refused to execute the program.

    Attributes:
        errno: the reason.
        about_folder: the reason concerns the working folder, not the program.
    """

    def __init__(self, errno: int, *, about_folder: bool) -> None:
        super().__init__(os.strerror(errno))
        self.errno: Final = errno
        self.about_folder: Final = about_folder


@final
class Program:
    """A running program. Made by `guarded`.

    Attributes:
        ended: set when it has ended.
        status: then its exit status, or minus the number of the signal that ended it; None when it is not known.
        matched: set when a line of its output matches the pattern.
    """

    def __init__(self, process: trio.Process, control: trio.SocketStream, output: Output, log: logging.Logger) -> None:
        self.ended: Final = trio.Event()
        self.status: int | None = None
        self.matched: Final = trio.Event()
        self._process: Final = process
        self._control: Final = control
        self._output: Final = output
        self._log: Final = log
        self._logged: Final = Budget(_LINES_LOGGED_A_SECOND, trio.current_time())
        self._reading: Final = trio.CancelScope(shield=True)
        self._output_ended: Final = trio.Event()
        self._answered: Final = trio.Event()
        self._refusal: StartRefused | None = None
        self._pid: int | None = None

    @property
    def newest_words(self) -> str:
        """The newest lines of its output, without secrets; empty when there are none."""
        return self._output.last_words

    async def last_words(self) -> str:
        """The newest lines once it has ended, after up to 1 s for the rest of the output."""
        # A descendant may hold the output open for longer; its output is not waited for.
        with trio.move_on_after(_LAST_WORDS_SECONDS):
            await self._output_ended.wait()
        return self._output.last_words

    async def _start(self, orders: Orders) -> None:
        with trio.move_on_after(_START_TIMEOUT):
            with suppress(trio.BrokenResourceError):  # the output tells why the guardian died
                await self._control.send_all(json.dumps(orders).encode() + b"\n")
            await self._answered.wait()
        if self._refusal is not None:
            raise fresh_copy(self._refusal)
        if self._pid is None:
            said = await self.last_words() if self._answered.is_set() else ""
            raise ProcessExitedError(
                f"the guardian of the tunnel program, {sys.executable} {_GUARDIAN.name}, did not start it"
                f"{f': {said}' if said else f' within {_START_TIMEOUT:g} seconds'}"
            )

    async def _listen(self) -> None:
        """Read the guardian's messages until it ends."""
        received = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            # No deadline: a program may run forever.
            while data := await self._control.receive_some(1024):
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self._take(line.decode().split())
        self._answered.set()
        self.ended.set()

    def _take(self, words: list[str]) -> None:
        match words:
            case ["started", process]:
                self._pid = int(process)
                self._answered.set()
            case ["refused", errno, what]:
                self._refusal = StartRefused(int(errno), about_folder=what == "folder")
                self._answered.set()
            case ["ended", status]:
                self.status = int(status)
                self.ended.set()

    async def _read(self) -> None:
        """Read the output until EOF, also while the program is being stopped: it may print a lot then."""
        stream = self._process.stdout
        assert stream is not None
        with self._reading:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                # No deadline: a program may print nothing.
                while data := await stream.receive_some(_READ_SIZE):
                    self._tell(self._output.receive(data, every_line=self._log.isEnabledFor(logging.DEBUG)))
            self._tell(self._output.end())
        self._output_ended.set()

    def _tell(self, lines: list[bytes]) -> None:
        if self._output.matched:
            self.matched.set()
        if self._log.isEnabledFor(logging.DEBUG):
            for line in lines:
                if self._logged.spend(trio.current_time()):
                    self._log.debug("the tunnel program says: %s", self._output.shown(line))
                elif self._logged.is_over:
                    self._log.debug("the tunnel program says more than %d lines a second", _LINES_LOGGED_A_SECOND)

    async def _type(self, typed: memoryview) -> None:
        """Write to the program's standard input, and close it."""
        stream = self._process.stdin
        assert stream is not None
        # No deadline: a program may never read.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await stream.send_all(typed)

    async def _stop(self, grace: float) -> None:
        """Stop the program, and wait until nothing of it is left."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(grace + _STOP_MARGIN):
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    if self._pid is None:
                        await self._control.aclose()  # the guardian may wait for the rest of its orders
                    else:
                        await self._control.send_all(b"stop\n")
                await self._process.wait()
            if self._process.returncode != 0:
                await self._stop_by_force()
        self._reading.cancel()

    async def _stop_by_force(self) -> None:
        """Kill the guardian, which hangs or was killed, and the process group of the program."""
        with suppress(ProcessLookupError):
            self._process.kill()
        if self._pid is not None:
            with suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)
        with trio.move_on_after(_STOP_MARGIN):
            await self._process.wait()


@asynccontextmanager
async def guarded(
    orders: Orders, *, typed: memoryview | None, output: Output, log: logging.Logger
) -> AsyncIterator[Program]:
    """Run a program while the block runs. Errors come out in groups, since the block runs in a nursery.

    Args:
        orders: what to run, and how.
        typed: the bytes for its standard input, followed by EOF; None for an empty input.
        output: takes its output.
        log: gets the lines of its output at DEBUG, without secrets.

    Raises:
        StartRefused: the system refused to execute it.
        ProcessExitedError: the guardian cannot be started.
    """
    process, control = await _open(with_input=typed is not None)
    try:
        program = Program(process, control, output, log)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program._read)
            nursery.start_soon(program._listen)
            try:
                await program._start(orders)
                if typed is not None:
                    nursery.start_soon(program._type, typed)
                yield program
            finally:
                await program._stop(orders["grace"])
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for stream in (process.stdin, process.stdout, control):
                if stream is not None:
                    await trio.aclose_forcefully(stream)


async def _open(*, with_input: bool) -> tuple[trio.Process, trio.SocketStream]:
    """Start a guardian, which waits for orders."""
    ours, theirs = socket.socketpair()
    try:
        # Shielded: otherwise a cancellation could lose the process that was just started. This takes only a fork.
        with theirs, trio.CancelScope(shield=True):
            process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-S", "-X", "utf8", str(_GUARDIAN), str(theirs.fileno())],
                stdin=subprocess.PIPE if with_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env={name: os.environ[name] for name in _GUARDIANS_VARIABLES if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        ours.close()
        raise ProcessExitedError(f"the guardian of the tunnel program cannot be started: {error}") from error
    except BaseException:
        ours.close()
        raise
    return process, trio.SocketStream(trio.socket.from_stdlib_socket(ours))
