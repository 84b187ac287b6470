"""What signals do to a running command: the first SIGINT or SIGTERM stops it in order, the second one at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from .._model.exception_groups import lone_error_bare
from .._model.log_fields import about
from .._net.freed_memory import manage_freed_memory

__all__ = ["received", "run_until_stopped"]

_log: Final = logging.getLogger("pioneer_tunnel.cli")


@contextmanager
def received(name: str) -> Iterator[AsyncIterator[object] | None]:
    """Receive the signal `name`, which would otherwise end the process. None where the system has no such signal.

    Those that come and are not received are dropped at the end.
    """
    number = getattr(signal, name, None)
    if number is None:
        yield None
        return
    # At its end Trio raises them again, for what was there before.
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with trio.open_signal_receiver(number) as signals:
            yield signals
    finally:
        signal.signal(number, before)


def run_until_stopped(serve: Callable[[], Awaitable[object]], stop: Callable[[], Awaitable[object]]) -> None:
    """Run `serve` until it returns.

    Args:
        serve: the command.
        stop: makes `serve` return soon. Called at the first SIGINT or SIGTERM. The second one cancels `serve`.
    """

    async def until_stopped() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manage_freed_memory)
                with trio.CancelScope() as serving:
                    nursery.start_soon(_stop_on, signals, stop, serving, nursery)
                    await serve()
                nursery.cancel_scope.cancel()

    with lone_error_bare():
        trio.run(until_stopped)


async def _stop_on(
    signals: AsyncIterator[int],
    stop: Callable[[], Awaitable[object]],
    serving: trio.CancelScope,
    nursery: trio.Nursery,
) -> None:
    stopping = False
    async for number in signals:  # also while `serving` ends, which takes seconds at most
        name = signal.Signals(number).name
        if not stopping:
            stopping = True
            _log.info("stopping: %s", name, extra=about("stopping", reason=name))
            nursery.start_soon(stop)
        elif not serving.cancel_called:
            _log.info("stopping at once: %s", name, extra=about("stopping", reason=name))
            serving.cancel()
