"""A WebSocket over a Trio stream of ours: one class, `WebSocket`, and two engines that open it.

An engine opens the WebSocket by a library, and gives it a `Framing` by a library. The engine over the package
`websockets` (extra `speed`) is used when it can be imported with its C extension. The engine over `trio-websocket` is
always installed. `load_engine` chooses.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Final, Protocol

import trio

from .._model.engine_names import EngineName
from .._model.errors import UnsupportedTransportError
from .connection import WebSocket
from .frame_meter import Allowance
from .link import WebSocketLink
from .messages import MAX_BINARY, MAX_TEXT, Message, WebSocketClosed
from .opening import Opening, WebSocketRefused

__all__ = [
    "MAX_BINARY",
    "MAX_TEXT",
    "ENGINES",
    "Allowance",
    "Engine",
    "EngineName",
    "Message",
    "Opening",
    "WebSocket",
    "WebSocketClosed",
    "WebSocketLink",
    "WebSocketRefused",
    "load_engine",
]


class Engine(Protocol):
    """What an engine's module offers."""

    def connect(self, stream: trio.abc.Stream, opening: Opening) -> AbstractAsyncContextManager[WebSocket]:
        """Open a WebSocket as client over `stream`. On exit, the stream is closed.

        Raises:
            WebSocketRefused: the server's response does not accept the WebSocket.
            trio.BrokenResourceError: the connection broke first.
        """

    def accept(self, stream: trio.abc.Stream, opening: Opening) -> AbstractAsyncContextManager[WebSocket]:
        """Accept a WebSocket as server: `stream` has the client's request next. On exit, the stream is closed.

        Raises:
            WebSocketRefused: the request does not ask for a WebSocket; the client has been told.
            trio.BrokenResourceError: the connection broke first.
        """


def _can_import_websockets() -> bool:
    # Without its C extension, `websockets` masks a frame with one XOR of two integers of the frame's size. Measured
    # for 64 KiB: 120 µs. The other engine, which looks bytes up in tables, takes 73 µs.
    package = find_spec("websockets")
    # Not `find_spec("websockets.speedups")`: it imports the package, which takes a tenth of the import of this one.
    return (
        package is not None
        and PathFinder.find_spec("websockets.speedups", package.submodule_search_locations) is not None
    )


ENGINES: Final[tuple[EngineName, ...]] = (
    ("websockets", "trio-websocket") if _can_import_websockets() else ("trio-websocket",)
)
"""The installed engines, the fastest first."""


def load_engine(name: EngineName | None = None) -> Engine:
    """The engine `name`; by default the fastest installed one.

    Raises:
        UnsupportedTransportError: it is not installed.
    """
    name = name or ENGINES[0]
    if name not in ENGINES:
        raise UnsupportedTransportError(
            f"the WebSocket engine {name!r} is not installed; have {', '.join(ENGINES)}"
            " (pip install 'pioneer-tunnel[speed]')"
        )
    if name == "websockets":
        from . import websockets_engine  # noqa: PLC0415  # only where the extra is installed

        return websockets_engine
    from . import trio_engine  # noqa: PLC0415  # only when it is used

    return trio_engine
