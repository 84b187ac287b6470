"""Whether visitors reach the local gateway: what their dials show, and probes while it does not answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from .._model.errors import LocalGatewayError
from .._model.log_fields import about

__all__ = ["LocalWatch"]

LOCAL_FAILURES: Final = 3
"""Local dials that fail in a row before the status says so."""

PROBE_INTERVAL: Final = 5.0

_log: Final = logging.getLogger("pioneer_tunnel.supervisor")


@final
class LocalWatch:
    """The local gateway of one generation.

    Args:
        probe: dials it, and raises `LocalGatewayError` when it does not answer. None to probe nothing.
        changed: called when `error` has changed.

    Attributes:
        error: why visitors do not reach it; None if they do, or if that is not known.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]] | None, changed: Callable[[], None]) -> None:
        self.error: LocalGatewayError | None = None
        self._probe: Final = probe
        self._changed: Final = changed
        self._failures = 0
        self._failing = trio.Event()
        self._probing = trio.CancelScope()

    def tunnel_is_up(self, tasks: trio.Nursery) -> None:
        """The tunnel was down and is up: forget the past. In `tasks`, probe now, and while it does not answer."""
        self.stop()
        self._failures = 0
        self._failing = trio.Event()
        self.error = None
        if self._probe is not None:
            self._probing = trio.CancelScope()
            tasks.start_soon(self._watch, self._probe, self._probing)

    def stop(self) -> None:
        """The tunnel is down: probe no more."""
        self._probing.cancel()

    def dial_failed(self, message: str) -> None:
        """A visitor did not reach it."""
        self._failures += 1
        if self._failures >= LOCAL_FAILURES:
            self._fails(LocalGatewayError(message))

    def answers(self) -> None:
        """A visitor or a probe has reached it."""
        self._failures = 0
        if self._failing.is_set():
            self._failing = trio.Event()
            self.error = None
            self._changed()

    def _fails(self, error: LocalGatewayError) -> None:
        self.error = error
        self._failing.set()
        self._changed()

    async def _watch(self, probe: Callable[[], Awaitable[None]], probing: trio.CancelScope) -> None:
        with probing:
            while True:
                try:
                    await probe()
                except LocalGatewayError as error:
                    self._fails(error)
                except Exception as error:  # noqa: BLE001  # its mistake must not end the tunnel
                    fields = about("unforeseen", reason=type(error).__name__)
                    _log.exception("a check of the local gateway failed in a way that was not foreseen", extra=fields)
                    self._fails(LocalGatewayError(f"its check failed, see the log: {type(error).__name__}"))
                else:
                    self.answers()
                while True:
                    # No deadline: the event is set when a local dial fails.
                    await self._failing.wait()
                    await trio.sleep(PROBE_INTERVAL)
                    if self._failing.is_set():  # otherwise a visitor has reached the gateway
                        break
