"""One WebSocket over a stream of ours, behind one small class, by either of two engines.

`websockets` (extra `speed`) is taken when it can be imported together with its C masking; `trio-websocket` is always
there. Both are opened here, so that nobody else names an engine.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractAsyncContextManager
from typing import Final, Literal, Protocol, TypeAlias

import trio

from .._model.errors import UnsupportedTransportError
from .connection import (
    MAX_BINARY,
    MAX_TEXT,
    Message,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketRefused,
)
from .frame_meter import Allowance
from .link import WebSocketLink

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

EngineName: TypeAlias = Literal["websockets", "trio-websocket"]


class Engine(Protocol):
    """What an engine's module offers."""

    def connect(self, stream: trio.abc.Stream, opening: Opening) -> AbstractAsyncContextManager[WebSocket]:
        """Open the client's side over `stream`, and close both on the way out.

        Raises:
            WebSocketRefused: the answer is not a WebSocket's.
            trio.BrokenResourceError: the connection broke first.
        """

    def accept(self, stream: trio.abc.Stream, opening: Opening) -> AbstractAsyncContextManager[WebSocket]:
        """Answer a client's request, which is the next thing to be read from `stream`.

        Raises:
            WebSocketRefused: the request is not a WebSocket's; the client has been told.
            trio.BrokenResourceError: the connection broke first.
        """


def _can_import_websockets() -> bool:
    # Without its C extension `websockets` masks in Python, byte by byte, and the other engine is the faster one.
    return (
        importlib.util.find_spec("websockets") is not None
        and importlib.util.find_spec("websockets.speedups") is not None
    )


ENGINES: Final[tuple[EngineName, ...]] = (
    ("websockets", "trio-websocket") if _can_import_websockets() else ("trio-websocket",)
)
"""The engines that this installation has, the fastest first."""


def load_engine(name: EngineName | None = None) -> Engine:
    """The engine called `name`, by default the fastest that is installed.

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
    from . import trio_engine  # noqa: PLC0415  # only when it is the one

    return trio_engine
