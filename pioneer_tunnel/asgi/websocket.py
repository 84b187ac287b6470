"""A WebSocket: h11 opens it, wsproto frames its messages, and a task of its own reads, so that pings are answered.

permessage-deflate is not offered: a few bytes of it may become a gigabyte.
"""

from __future__ import annotations

import base64
import binascii
import enum
import io
import logging
from collections import deque
from contextlib import suppress
from typing import Final, final

import h11
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event as Frame, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, generate_accept_token

from .._model.text import clean_message
from .exchange import After, Answer, log_failure
from .http1 import Http1
from .interface import Disconnected, Host, Message, Server
from .scope import RequestRefused, Visitor, has_token, websocket_scope

__all__ = ["WebSocket", "is_websocket"]

_WAITING_LIMIT: Final = 64 * 1024
"""Bytes of messages that may wait for the application; beyond that, the visitor is not read."""

_MESSAGE_COST: Final = 256
"""Bytes that a message counts in addition to its data."""

_log: Final = logging.getLogger("pioneer_tunnel.asgi")


def is_websocket(request: h11.Request) -> bool:
    """Whether the request asks for a WebSocket.

    Raises:
        RequestRefused: it does, in a way that RFC 6455 does not allow.
    """
    if not has_token(request, b"upgrade", b"websocket") or not has_token(request, b"connection", b"upgrade"):
        return False
    headers = {name: value for name, value in request.headers if name.startswith((b"sec-websocket-", b"content-"))}
    if request.method != b"GET" or request.http_version < b"1.1":
        raise RequestRefused(400, "a WebSocket is opened by GET, in HTTP/1.1")
    if headers.get(b"content-length", b"0") != b"0" or has_token(request, b"transfer-encoding", b"chunked"):
        raise RequestRefused(400, "a WebSocket is opened by a request without body")
    if headers.get(b"sec-websocket-version") != b"13":
        raise RequestRefused(426, "another version of WebSocket", [(b"sec-websocket-version", b"13")])
    try:
        nonce = base64.b64decode(headers.get(b"sec-websocket-key", b""), validate=True)
    except binascii.Error:
        nonce = b""
    if len(nonce) != 16:
        raise RequestRefused(400, "no Sec-WebSocket-Key of 16 bytes")
    return True


@final
class _Inbox:
    """What waits for the application, and what it gets after that, again and again."""

    def __init__(self, host: Host) -> None:
        self._host: Final = host
        self._waiting: Final[deque[tuple[Message, int]]] = deque()
        self._last: Message | None = None
        self._size = 0
        self._changed = host.event()

    def put(self, message: Message, size: int = 0) -> None:
        self._waiting.append((message, size + _MESSAGE_COST))
        self._size += size + _MESSAGE_COST
        self._wake()

    def end(self, message: Message) -> None:
        """The end counts once."""
        if self._last is None:
            self._last = message
            self._wake()

    async def get(self) -> Message:
        while not self._waiting:
            if self._last is not None:
                return self._last
            # No deadline: a visitor may be silent for as long as it likes.
            await self._changed.wait()
        message, size = self._waiting.popleft()
        self._size -= size
        self._wake()
        return message

    async def wait_room(self) -> None:
        while self._size > _WAITING_LIMIT:
            # No deadline: the application reads as slowly as it likes.
            await self._changed.wait()

    def clear(self) -> None:
        self._waiting.clear()
        self._size = 0
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = self._host.event()


class _State(enum.Enum):
    CONNECTING = enum.auto()
    DENYING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    """We have sent a close frame; the visitor's is awaited."""
    CLOSED = enum.auto()


@final
class WebSocket:
    """One WebSocket, from the request that opens it."""

    def __init__(self, http: Http1, request: h11.Request, visitor: Visitor, server: Server) -> None:
        self._http: Final = http
        self._request: Final = request
        self._server: Final = server
        self._host: Final = server.host
        self._scope: Final = websocket_scope(request, visitor, server.state)
        self._answer: Final = Answer(http, request)
        self._inbox: Final = _Inbox(server.host)
        self._sending: Final = server.host.lock()
        self._accepted: Final = server.host.event()
        self._ended: Final = server.host.event()
        self._state = _State.CONNECTING
        self._protocol = Connection(ConnectionType.SERVER)
        self._text = io.StringIO()
        self._data = bytearray()
        self._size = 0

    async def run(self) -> After:
        """Run the application; returns what happens to the connection."""
        self._inbox.put({"type": "websocket.connect"})
        async with self._host.beside(self._read), self._host.beside(self._say_goodbye):
            failed = False
            try:
                await self._server.app(self._scope, self._receive, self._send)
            except Exception as error:  # noqa: BLE001  # an application may raise anything, and the server goes on
                log_failure(self._scope, error)
                failed = True
            return await self._finish(failed=failed)

    async def _finish(self, *, failed: bool) -> After:
        self._inbox.clear()
        if self._state is _State.CONNECTING:
            if not failed:
                path = clean_message(self._scope["path"])
                _log.error("the application has neither accepted nor closed a WebSocket at %s", path)
            await self._http.refuse(500)
            return After.CLOSE
        if self._state is _State.DENYING:
            return After.CLOSE if self._answer.complete else After.RESET
        try:
            async with self._host.within(self._server.options.close_timeout):
                if self._state is _State.OPEN:
                    with suppress(Disconnected):
                        await self._close(CloseReason.INTERNAL_ERROR if failed else CloseReason.NORMAL_CLOSURE)
                await self._ended.wait()  # for the answer to a close frame, ours or the visitor's
        except TimeoutError:
            return After.RESET
        return After.RESET if self._http.broken else After.CLOSE

    async def _say_goodbye(self) -> None:
        await self._server.stopping.wait()  # no deadline: the server runs for as long as it runs
        if self._state is _State.OPEN:
            with suppress(Disconnected):
                await self._close(CloseReason.SERVICE_RESTART)

    # What the application sends and receives

    async def _receive(self) -> Message:
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        kind: str = message["type"]
        match self._state, kind:
            case _State.CONNECTING, "websocket.accept":
                await self._accept(message)
            case _State.CONNECTING, "websocket.close":
                self._state = _State.DENYING
                await self._answer.take("http.response.start", {"status": 403})
                await self._answer.take("http.response.body", {})
                self._end(CloseReason.ABNORMAL_CLOSURE)
            case (
                (_State.CONNECTING | _State.DENYING),
                ("websocket.http.response.start" | "websocket.http.response.body"),
            ):
                self._state = _State.DENYING
                await self._answer.take(kind.removeprefix("websocket."), message)
                if self._answer.complete:
                    self._end(CloseReason.ABNORMAL_CLOSURE)
            case _State.OPEN, "websocket.send":
                data = message.get("bytes")
                await self._send_frame(TextMessage(data=message["text"]) if data is None else BytesMessage(data=data))
            case _State.OPEN, "websocket.close":
                await self._close(message.get("code", 1000), message.get("reason"))
            case ((_State.CLOSING | _State.CLOSED), ("websocket.send" | "websocket.close")):
                raise Disconnected("the WebSocket is closed")
            case _:
                raise RuntimeError(f"an application cannot send {kind!r} now")

    async def _accept(self, message: Message) -> None:
        key = next(value for name, value in self._request.headers if name == b"sec-websocket-key")
        headers = [
            (b"upgrade", b"websocket"),
            (b"connection", b"upgrade"),
            (b"sec-websocket-accept", generate_accept_token(key)),
            *((bytes(name), bytes(value)) for name, value in message.get("headers", [])),
        ]
        if message.get("subprotocol") is not None:
            headers.append((b"sec-websocket-protocol", message["subprotocol"].encode("ascii")))
        switching = h11.InformationalResponse(status_code=101, headers=headers, reason=b"Switching Protocols")
        await self._http.send(switching)
        self._protocol = Connection(ConnectionType.SERVER, trailing_data=self._http.protocol.trailing_data[0])
        self._state = _State.OPEN
        self._accepted.set()

    async def _close(self, code: int, reason: str | None = None) -> None:
        self._state = _State.CLOSING
        self._end(code, reason)
        await self._send_frame(CloseConnection(code=code, reason=reason))

    async def _send_frame(self, frame: Frame) -> None:
        """Send a frame. One task at a time: the reading task answers pings.

        Raises:
            Disconnected: the visitor has gone, or the WebSocket is closed, maybe while this waited for its turn.
        """
        async with self._sending:
            if self._http.broken:
                raise Disconnected("the visitor has gone")
            try:
                data = self._protocol.send(frame)
            except LocalProtocolError as error:
                raise Disconnected("the WebSocket is closed") from error
            try:
                await self._http.wire.send(bytes(data))
            except BaseException:
                self._http.broken = True
                raise

    # What the visitor sends

    async def _read(self) -> None:
        await self._accepted.wait()  # no deadline: the application accepts when it likes
        try:
            while await self._take_events():
                # No deadline: a visitor may be silent for as long as it likes.
                data = await self._http.wire.receive()
                if not data:
                    break
                self._protocol.receive_data(data)
        except Disconnected:
            self._http.broken = True
        self._state = _State.CLOSED
        self._end(CloseReason.ABNORMAL_CLOSURE)
        self._ended.set()

    async def _take_events(self) -> bool:
        """Take what has arrived; False once the visitor says no more."""
        for event in self._protocol.events():
            if isinstance(event, TextMessage | BytesMessage):
                self._size += len(event.data)
                if self._size > self._server.options.max_message_bytes:
                    await self._break_off(CloseReason.MESSAGE_TOO_BIG, "the message is too large")
                    return False
                self._append(event)
                await self._inbox.wait_room()
            elif isinstance(event, Ping):
                with suppress(Disconnected):  # what has ended the WebSocket is heard of next
                    await self._send_frame(event.response())
            elif isinstance(event, CloseConnection):
                if self._protocol.state is ConnectionState.REMOTE_CLOSING:
                    self._state = _State.CLOSED
                    self._end(event.code, event.reason)
                    with suppress(Disconnected):  # the application has closed it at the same time
                        await self._send_frame(event.response())
                elif self._protocol.state is not ConnectionState.CLOSED:  # what came is no WebSocket frame
                    await self._break_off(event.code, event.reason)
                return False
        return True

    def _append(self, event: TextMessage | BytesMessage) -> None:
        """Put the next part of a message to the parts before it, of which there may be millions."""
        if isinstance(event, TextMessage):
            self._text.write(event.data)
        else:
            self._data += event.data
        if event.message_finished:
            message: Message = {"type": "websocket.receive"}
            if isinstance(event, TextMessage):
                message["text"], self._text = self._text.getvalue(), io.StringIO()
            else:
                message["bytes"], self._data = bytes(self._data), bytearray()
            if self._state is _State.OPEN:
                self._inbox.put(message, self._size)
            self._size = 0

    async def _break_off(self, code: int, reason: str | None) -> None:
        if self._state is _State.OPEN:
            await self._close(code, reason)

    def _end(self, code: int, reason: str | None = None) -> None:
        """Let the application hear of the end, after the messages before it."""
        self._inbox.end({"type": "websocket.disconnect", "code": int(code), "reason": reason or ""})
