"""The lifespan of an ASGI application: its startup before the first request, its shutdown after the last one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias, final

from .interface import AsgiApp, Host, Message
from .options import Options

__all__ = ["Lifespan", "LifespanError", "run_lifespan"]

Lifespan: TypeAlias = Literal["auto", "on", "off"]
"""Whether the application's lifespan is run. `auto`: yes, unless the application raises when it is asked to."""

_log: Final = logging.getLogger("pioneer_tunnel.asgi")


@final
class LifespanError(Exception):
    """The application's startup or shutdown has failed, or took too long. The text is the application's."""


@asynccontextmanager
async def run_lifespan(app: AsgiApp, mode: Lifespan, host: Host, options: Options) -> AsyncIterator[dict[str, Any]]:
    """Start the application, and shut it down at the end of the block, also when that was cancelled or raises.

    Yields:
        The state that the application keeps for its requests.

    Raises:
        LifespanError: startup or shutdown has failed, or took too long.
        ValueError: there is no such `mode`.
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"lifespan is {mode!r}; there are 'auto', 'on' and 'off'")
    state: dict[str, Any] = {}
    if mode == "off":
        yield state
        return
    lifespan = _Lifespan(app, host, state)
    async with host.beside(lifespan.run):
        with_lifespan = await lifespan.start_up(mode, options.startup_timeout)
        try:
            yield state
        finally:
            if with_lifespan:
                await lifespan.shut_down(options.shutdown_timeout)


@final
class _Lifespan:
    def __init__(self, app: AsgiApp, host: Host, state: dict[str, Any]) -> None:
        self._app: Final = app
        self._host: Final = host
        self._state: Final = state
        self._asked_to_start = False
        self._shutdown_wanted: Final = host.event()
        self._started: Final = host.event()
        self._ended: Final = host.event()
        self._failure: str | None = None
        self._raised: Exception | None = None

    async def run(self) -> None:
        """The application's own task. What it raises is reported by the methods below, or logged."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  # an application without lifespan may raise anything
            self._raised = error
            if self._started.is_set() and self._failure is None:
                _log.error("the application's lifespan has failed", exc_info=error)
        finally:
            self._started.set()
            self._ended.set()

    async def start_up(self, mode: Lifespan, seconds: float) -> bool:
        """Wait for the startup. False if the application has no lifespan, and `mode` does not insist on one."""
        try:
            async with self._host.within(seconds):
                await self._started.wait()
        except TimeoutError:
            raise LifespanError(f"the application's startup took longer than {seconds:g} seconds") from None
        if self._failure is not None:
            raise LifespanError(f"the application's startup has failed: {self._failure}") from self._raised
        if self._raised is not None:
            if mode == "on":
                raise LifespanError("the application has no lifespan, or its startup has raised") from self._raised
            _log.info("the application has no lifespan: it raised %r", self._raised)
            return False
        return not self._ended.is_set()

    async def shut_down(self, seconds: float) -> None:
        self._shutdown_wanted.set()
        try:
            async with self._host.shielded_within(seconds):
                await self._ended.wait()
        except TimeoutError:
            raise LifespanError(f"the application's shutdown took longer than {seconds:g} seconds") from None
        if self._failure is not None:
            raise LifespanError(f"the application's shutdown has failed: {self._failure}") from self._raised

    async def _receive(self) -> Message:
        if not self._asked_to_start:
            self._asked_to_start = True
            return {"type": "lifespan.startup"}
        # No deadline: the server runs for as long as it runs.
        await self._shutdown_wanted.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._started.set()
            case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                self._failure = message.get("message", "") or "it does not say why"
                self._started.set()
            case "lifespan.shutdown.complete":
                self._ended.set()
            case other:
                raise RuntimeError(f"an application cannot send {other!r} in its lifespan")
