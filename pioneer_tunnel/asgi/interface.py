"""What the ASGI server needs of its host: a visitor's connection, and the primitives of an async library.

The server's logic is written once, and awaits only what is named here. `on_trio` implements this for Trio, and
`aio.on_asyncio` for asyncio.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias, final

import attrs

from .options import Options

__all__ = [
    "AsgiApp",
    "Disconnected",
    "Event",
    "Host",
    "Interrupted",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "Server",
    "Wire",
]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

AsgiApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[object]]
"""An ASGI 3 application: `async def app(scope, receive, send)`. Frameworks type its parameters in different ways."""


@final
class Disconnected(OSError):
    """The visitor has gone. ASGI: `send` raises an `OSError` then."""


@final
class Interrupted(Exception):
    """`Wire.receive` has ended because of its deadline, or of `Wire.interrupt`. No data is lost."""


class Wire(Protocol):
    """A visitor's connection. One task may send and one may receive at a time."""

    async def receive(self, seconds: float | None = None) -> bytes:
        """Wait for data; b"" at EOF.

        Raises:
            Disconnected: the connection is broken.
            Interrupted: nothing came within `seconds`, or `interrupt` was called.
        """

    def interrupt(self) -> None:
        """Let a `receive` that waits raise `Interrupted`; does nothing if none waits."""

    async def send(self, data: bytes) -> None:
        """Send `data`; returns once little of it waits.

        Raises:
            Disconnected: the connection is broken.
        """

    async def close(self, *, drain: bool) -> None:
        """Close it in good order.

        Args:
            drain: the visitor may still be sending. So read and drop that for up to 2 seconds, for a connection that is
                closed before loses what was sent.
        """

    def reset(self) -> None:
        """Reset it, so that what was sent never looks complete. Does nothing after `close`."""


class Event(Protocol):
    """`trio.Event`, or `asyncio.Event`."""

    def set(self) -> object: ...
    def is_set(self) -> bool: ...
    async def wait(self) -> object: ...


class Host(Protocol):
    """The primitives of an async library."""

    def event(self) -> Event:
        """A new event."""

    def lock(self) -> AbstractAsyncContextManager[object]:
        """A new lock, fair."""

    def within(self, seconds: float) -> AbstractAsyncContextManager[object]:
        """A block that is cancelled after so many seconds, and raises `TimeoutError` then."""

    def shielded_within(self, seconds: float) -> AbstractAsyncContextManager[object]:
        """The same, for a block that an outer cancellation must not end."""

    def beside(self, work: Callable[[], Awaitable[None]]) -> AbstractAsyncContextManager[object]:
        """Run `work` beside the block, and cancel it when the block ends. If `work` raises, the block is cancelled.

        When the block is cancelled from outside, `work` goes on until the block has ended.
        """

    def wall_clock(self) -> float:
        """Seconds since 1970."""


@final
@attrs.frozen(kw_only=True)
class Server:
    """What all connections of a server share.

    Attributes:
        app: the application, which has been started.
        host: the primitives of the async library.
        options: the limits.
        state: what the application keeps for its requests.
        stopping: set when the server stops.
    """

    app: AsgiApp
    host: Host
    options: Options
    state: dict[str, Any]
    stopping: Event
