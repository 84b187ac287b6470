"""The engine over the package `websockets`: its public sans-I/O classes, which have the opening, too."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from .._model.text import clean_message
from .connection import WebSocket
from .frame_meter import FrameMeter
from .messages import MAX_BINARY
from .opening import MAX_ANSWER, Opening, WebSocketRefused, refusal_in
from .websockets_framing import WebsocketsFraming

__all__ = ["accept", "connect"]

# At DEBUG level the package logs the data, which may be a proof or a visitor's token.
_SILENT: Final = logging.getLogger("pioneer_tunnel.websocket.silent")
_SILENT.setLevel(logging.CRITICAL + 1)


@asynccontextmanager
async def connect(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.connect`."""
    assert opening.address is not None
    protocol = ClientProtocol(
        parse_uri(str(opening.address)),
        subprotocols=[Subprotocol(opening.subprotocol)],
        max_size=MAX_BINARY,
        logger=_SILENT,
    )
    framing = WebsocketsFraming(protocol)
    websocket = WebSocket(stream, framing, FrameMeter(opening.allowance))
    async with websocket.running():
        request = protocol.connect()
        request.headers["User-Agent"] = opening.agent
        request.headers.update(opening.headers)
        protocol.send_request(request)
        framing.update()
        await websocket.flush()
        answer = b""
        while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
            answer = (answer + await websocket.receive_bytes())[:MAX_ANSWER]
            if answer and (refused := refusal_in(answer)) is not None:
                raise refused
        if protocol.handshake_exc is not None:
            raise _refusal(protocol.handshake_exc)
        websocket.subprotocol, websocket.date = protocol.subprotocol, framing.date
        yield websocket


@asynccontextmanager
async def accept(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.accept`."""
    protocol = ServerProtocol(subprotocols=[Subprotocol(opening.subprotocol)], max_size=MAX_BINARY, logger=_SILENT)
    framing = WebsocketsFraming(protocol)
    websocket = WebSocket(stream, framing, FrameMeter(opening.allowance))
    async with websocket.running():
        while framing.request is None and protocol.handshake_exc is None:
            await websocket.receive_bytes()
        if framing.request is not None:
            protocol.send_response(protocol.accept(framing.request))
            framing.request.headers.clear()  # the package keeps the request for as long as the connection lives
        framing.update()
        await websocket.flush()
        if protocol.handshake_exc is not None:
            raise WebSocketRefused(clean_message(f"not a WebSocket request: {protocol.handshake_exc}"))
        websocket.subprotocol = protocol.subprotocol
        yield websocket


def _refusal(error: Exception) -> WebSocketRefused:
    if isinstance(error, InvalidStatus):
        response: Response = error.response
        return WebSocketRefused(
            f"HTTP status {response.status_code}",
            status=response.status_code,
            location=response.headers.get("Location"),
            retry_after=response.headers.get("Retry-After"),
            date=response.headers.get("Date"),
        )
    return WebSocketRefused(clean_message(str(error)))
