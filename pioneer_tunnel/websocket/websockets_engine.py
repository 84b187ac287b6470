"""The engine over the `websockets` package: its public sans-I/O classes on a Trio stream, with masking in C.

Received pings and closes need a reply. A task sends the replies, so that the receiver never waits for the sender. It
ends when all are sent: most connections are idle, and a task that waits takes 3 KiB.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, final

import trio
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from .._model.errors import fresh_copy
from .._model.exception_groups import lone_error_bare
from .._model.text import clean_message
from .._net.adopted import adopt
from .._net.link import Bytes
from .._net.streams import ByteStream
from .binary_frames import BinaryFrames, encode
from .connection import (
    FIRST_READ,
    MAX_ANSWER,
    MAX_BINARY,
    MAX_FRAGMENTS,
    MAX_QUEUED_PONGS,
    MAX_TEXT,
    READ_SIZE,
    Message,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketRefused,
    messages_of,
    refusal_in,
)
from .frame_meter import FrameMeter

__all__ = ["accept", "connect"]

_FED_AT_ONCE: Final = 64 * 1024
"""Bytes that the protocol gets at once. With 256 KiB it takes three times as long for each byte."""

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
    request = protocol.connect()
    request.headers["User-Agent"] = opening.agent
    request.headers.update(opening.headers)
    protocol.send_request(request)
    websocket = WebsocketsWebSocket(stream, protocol, FrameMeter(opening.allowance))
    async with _with_replies(websocket, stream):
        await websocket.flush()
        answer = b""
        while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
            answer = (answer + await websocket.receive_bytes())[:MAX_ANSWER]
            if answer and (refused := refusal_in(answer)) is not None:
                raise refused
        if protocol.handshake_exc is not None:
            raise _refusal(protocol.handshake_exc)
        yield websocket


@asynccontextmanager
async def accept(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.accept`."""
    protocol = ServerProtocol(subprotocols=[Subprotocol(opening.subprotocol)], max_size=MAX_BINARY, logger=_SILENT)
    websocket = WebsocketsWebSocket(stream, protocol, FrameMeter(opening.allowance))
    async with _with_replies(websocket, stream):
        while websocket.request is None and protocol.handshake_exc is None:
            await websocket.receive_bytes()
        if websocket.request is not None:
            protocol.send_response(protocol.accept(websocket.request))
            websocket.request = None  # its headers take memory for as long as the connection lives
        await websocket.flush()
        if protocol.handshake_exc is not None:
            raise WebSocketRefused(clean_message(f"not a WebSocket request: {protocol.handshake_exc}"))
        yield websocket


@asynccontextmanager
async def _with_replies(websocket: WebsocketsWebSocket, stream: trio.abc.Stream) -> AsyncIterator[None]:
    """Have tasks for replies. Close the stream at the end."""
    try:
        with lone_error_bare():
            async with trio.open_nursery() as nursery:
                websocket.reply_in(nursery)
                try:
                    yield
                finally:
                    websocket.reply_in(None)
                nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)


@final
class WebsocketsWebSocket(WebSocket):
    def __init__(self, stream: trio.abc.Stream, protocol: ClientProtocol | ServerProtocol, meter: FrameMeter) -> None:
        self.meter = meter
        self.request: Request | None = None
        self._stream: Final = adopt(stream)
        self._protocol: Final = protocol
        self._inbox: list[Message] = []
        self._text: list[bytes] | None = None
        self._text_size = 0
        self._closed: WebSocketClosed | None = None
        self._eof = False
        self._buffer = memoryview(bytearray(FIRST_READ))
        self._unparsed = self._buffer[:0]
        self._begun = self._buffer[:0]  # of a message, whose rest comes with the next read
        self._is_full = False  # whether the last read has filled the buffer, so that more has come
        self._unsent: list[Bytes] = []
        self._is_client: Final = isinstance(protocol, ClientProtocol)
        self._frames: BinaryFrames | None = None  # once the opening is over and the peer is trusted
        self._watched: ByteStream | None = None  # what reads and writes without waiting
        self._flushing = False
        self._flushed: Final = trio.lowlevel.ParkingLot()
        self._tasks: trio.Nursery | None = None  # for a task that sends replies
        self._replying = False  # whether there is one

    @property
    def subprotocol(self) -> str | None:  # type: ignore[override]  # decided when the opening is over
        return self._protocol.subprotocol

    async def send(self, messages: Sequence[bytes | str]) -> None:
        self._raise_if_not_open()
        for message in messages:
            if isinstance(message, str):
                self._protocol.send_text(message.encode())
            else:
                self._protocol.send_binary(message)
        await self.flush()

    async def send_binary(self, chunks: Sequence[Bytes]) -> None:
        self._queue(chunks)
        await self.flush()

    def send_binary_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        if self._flushing or self._watched is None:
            return None
        self._queue(chunks)
        self._unsent = self._watched.send_nowait(self._unsent)
        return not self._unsent

    def _queue(self, chunks: Sequence[Bytes]) -> None:
        protocol = self._protocol
        if protocol.state is not State.OPEN:
            self._raise_if_not_open()
        if protocol.writes:
            self._unsent += protocol.data_to_send()
        for message, size in messages_of(chunks):
            self._unsent += encode(message, size, mask=self._is_client)

    def _raise_if_not_open(self) -> None:
        if self._protocol.state is not State.OPEN:
            raise fresh_copy(self._closed or trio.BrokenResourceError("the WebSocket is closed"))

    def _take_writes(self) -> list[Bytes]:
        unsent, self._unsent = self._unsent, []
        return unsent + self._protocol.data_to_send()

    async def flush(self) -> None:
        """Send what the protocol has queued. One task at a time; the others wait for it."""
        while self._flushing:
            await self._flushed.park()
        self._flushing = True
        try:
            while writes := self._take_writes():
                await self._stream.send_pieces(writes)
        finally:
            self._flushing = False
            self._flushed.unpark_all()

    async def receive(self) -> list[Message]:
        while not self._inbox:
            if self._closed is not None:
                raise fresh_copy(self._closed)
            await self.receive_bytes()
        messages, self._inbox = self._inbox, []
        return messages

    def offer_text(self, text: str) -> bool:
        if self._protocol.writes or self._unsent or self._protocol.state is not State.OPEN:
            return False
        self._protocol.send_text(text.encode())
        self._reply_soon()  # unless the next `send` takes it first
        return True

    def watch(self, on_readable: Callable[[], object]) -> bool:
        self._watched = self._stream.watch(on_readable)
        return self._watched is not None

    def unwatch(self) -> None:
        if self._watched is not None:
            self._watched.unwatch()

    def receive_nowait(self) -> list[Message] | None:
        if not self._inbox:
            if self._closed is not None:
                raise fresh_copy(self._closed)
            if self._eof:
                self._raise_if_eof()
            if not self._unparsed:
                assert self._watched is not None
                amount = self._watched.receive_into_nowait(self._free() if self._begun else self._buffer)
                if amount is None:
                    return None
                self.drained = self._watched.drained
                self._keep(amount)
            self._parse()
            if self._unparsed or self._closed is not None:
                self.drained = False
        messages, self._inbox = self._inbox, []
        return messages

    async def receive_bytes(self) -> memoryview:
        """Wait for bytes, let the protocol parse them, and return them; empty at the end of the connection.

        When there are many small frames, the next call parses the rest, after other tasks have run.
        """
        self._raise_if_eof()
        if self._unparsed:
            await trio.lowlevel.checkpoint()
        else:
            self._keep(await self._stream.receive_into(self._free()))
        data = self._unparsed
        self._parse()
        return data[: len(data) - len(self._unparsed)]

    def _raise_if_eof(self) -> None:
        if self._eof:
            raise trio.BrokenResourceError("the connection ended without a close frame")

    def _free(self) -> memoryview:
        """The part of the buffer to read into."""
        size = len(self._begun)
        self._buffer[:size] = self._begun
        self._begun = self._buffer[:size]
        return self._buffer[size:]

    def _keep(self, amount: int) -> None:
        """Keep what was read. The buffer grows when a trusted peer fills it."""
        buffer = self._buffer
        if self._begun:
            amount = amount and len(self._begun) + amount  # an incomplete message at EOF is lost
            self._begun = buffer[:0]
        self._unparsed = buffer[:amount]
        self._is_full = amount == len(buffer)
        if self._is_full and amount < READ_SIZE and self.meter.trusted:
            self._buffer = memoryview(bytearray(min(4 * amount, READ_SIZE)))

    def _parse(self) -> None:
        """Parse what was read, or as many frames of it as a turn may have."""
        data = self._unparsed
        if not data:
            self._eof = True
            self._protocol.receive_eof()
            self._take_events()
        elif self._frames is not None:
            used, pieces = self._frames.split(data, more=self._is_full)
            rest = data[used:]
            if self._frames.incomplete:
                self._unparsed, self._begun = rest[:0], rest
            else:
                self._unparsed = rest
            for binary, piece in pieces:
                if not binary:
                    self._feed(piece)
                elif self._closed is None:
                    self._inbox.append(piece)
            if self._frames.failure is not None:
                self._fail(*self._frames.failure)
        else:
            amount = self.meter.admit(data)
            self._unparsed = data[amount:]
            self._feed(data[:amount])
            if self.meter.trusted and self.meter.between_frames:
                self._frames = BinaryFrames(masked=not self._is_client)

    def _feed(self, data: Bytes) -> None:
        for start in range(0, len(data), _FED_AT_ONCE):
            # The protocol copies it, so the buffer can be reused.
            self._protocol.receive_data(data[start : start + _FED_AT_ONCE])  # type: ignore[arg-type]  # any buffer
        self._take_events()

    def _take_events(self) -> None:
        """Process the protocol's events and errors."""
        protocol = self._protocol
        for event in protocol.events_received():
            if isinstance(event, Frame):
                self._take(event)
            elif isinstance(event, Request):
                self.request = event
            elif isinstance(event, Response):
                self.date = event.headers.get("Date")
        if protocol.parser_exc is not None and self._closed is None and not self._eof:
            sent = protocol.close_sent
            self._closed = WebSocketClosed(1002 if sent is None else sent.code, clean_message(str(protocol.parser_exc)))
        if len(protocol.writes) > MAX_QUEUED_PONGS:
            self._fail(1008, "too many pings")
        if protocol.writes:
            self._reply_soon()

    def _take(self, frame: Frame) -> None:
        match frame.opcode:
            case Opcode.BINARY:
                self._inbox.append(frame.data)
            case Opcode.TEXT | Opcode.CONT if frame.opcode is Opcode.TEXT or self._text is not None:
                text = self._text = self._text or []
                text.append(bytes(frame.data))
                self._text_size += len(frame.data)
                if self._text_size > MAX_TEXT:
                    self._fail(1009, f"text of more than {MAX_TEXT} bytes")
                elif len(text) > MAX_FRAGMENTS:
                    self._fail(1009, f"text in more than {MAX_FRAGMENTS} pieces")
                elif frame.fin:
                    self._text, self._text_size = None, 0
                    try:
                        self._inbox.append(b"".join(text).decode())
                    except UnicodeDecodeError:
                        self._fail(1007, "text that is not UTF-8")
            case Opcode.CONT:
                self._inbox.append(frame.data)
            case Opcode.CLOSE:
                close = self._protocol.close_rcvd
                assert close is not None
                self._closed = WebSocketClosed(close.code, clean_message(close.reason))

    def _fail(self, code: int, reason: str) -> None:
        """Close because the peer violated a limit that is ours and not the protocol's."""
        if self._closed is None:
            self._closed = WebSocketClosed(code, reason)
            self._protocol.fail(code, reason)
            self._reply_soon()

    def reply_in(self, tasks: trio.Nursery | None) -> None:
        """Send replies in tasks of this nursery, from now on. None: send no more."""
        self._tasks = tasks

    def _reply_soon(self) -> None:
        if self._tasks is not None and not self._replying:
            self._replying = True
            self._tasks.start_soon(self._send_replies)

    async def _send_replies(self) -> None:
        """Send pongs, the reply to a close frame, and offered texts."""
        try:
            while self._protocol.writes:
                await self.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the task that receives or sends gets the error, too
        finally:
            self._replying = False

    async def close(self, code: int, reason: str = "") -> None:
        try:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(code, reason)
            await self.flush()
            while not self._eof and self._closed is None:
                self._inbox.clear()  # these messages are never read, and the peer may send any number of them
                await self.receive_bytes()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self._stream)


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
