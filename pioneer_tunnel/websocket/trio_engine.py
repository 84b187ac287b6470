"""The engine over `trio-websocket`, which is always installed.

We work around what it lacks. We give it a stream that we made and close ourselves, and a large read size. During the
opening it waits forever when the connection ends without a response, or when the body of a response never ends. So the
stream that we give it, `_EngineStream`, detects both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn, cast, final

import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    WebSocketRequest,
    wrap_client_stream,
    wrap_server_stream,
)

from .._model.exception_groups import lone_error_bare
from .._model.text import clean_message
from .connection import (
    FIRST_READ,
    MAX_ANSWER,
    MAX_BINARY,
    MAX_TEXT,
    READ_SIZE,
    Message,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketRefused,
    refusal_in,
)
from .frame_meter import FrameMeter

__all__ = ["accept", "connect"]

_MAX_PIECES: Final = 16 * 1024
"""Pieces of one message. Each read makes one, so a large message over a slow path may have a thousand."""

_QUEUE: Final = 8
"""Messages that trio-websocket queues for us: a little more than one read brings."""


@asynccontextmanager
async def connect(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.connect`."""
    assert opening.address is not None
    engine_stream = _EngineStream(stream, FrameMeter(opening.allowance), of_client=True)
    async with _with_reader(engine_stream) as nursery:
        try:
            with lone_error_bare():
                async with trio.open_nursery() as until_open:
                    until_open.start_soon(engine_stream.raise_when_refused)
                    connection = await wrap_client_stream(
                        nursery,
                        engine_stream,  # type: ignore[arg-type]  # it documents that it accepts any stream
                        opening.address.audience,
                        opening.address.path,
                        subprotocols=[opening.subprotocol],
                        extra_headers=[(b"User-Agent", opening.agent.encode())],
                        max_message_size=MAX_BINARY,
                        message_queue_size=_QUEUE,
                        receive_buffer_size=READ_SIZE,
                    )
                    engine_stream.open_for(connection)
                    until_open.cancel_scope.cancel()
        except HandshakeError as error:
            raise engine_stream.refusal(error) from error
        yield TrioWebSocket(engine_stream, connection)


@asynccontextmanager
async def accept(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.accept`."""
    engine_stream = _EngineStream(stream, FrameMeter(opening.allowance), of_client=False)
    async with _with_reader(engine_stream) as nursery:
        with lone_error_bare():
            async with trio.open_nursery() as until_open:
                until_open.start_soon(engine_stream.raise_when_refused)
                request: WebSocketRequest = await wrap_server_stream(
                    nursery,
                    engine_stream,
                    max_message_size=MAX_BINARY,
                    message_queue_size=_QUEUE,
                    receive_buffer_size=READ_SIZE,
                )
                offered = opening.subprotocol in request.proposed_subprotocols
                try:
                    connection = await request.accept(subprotocol=opening.subprotocol if offered else None)
                except ConnectionClosed as error:
                    raise _closed(error) from None  # the client closed after its request
                engine_stream.open_for(connection)
                until_open.cancel_scope.cancel()
        yield TrioWebSocket(engine_stream, connection)


@asynccontextmanager
async def _with_reader(engine_stream: _EngineStream) -> AsyncIterator[trio.Nursery]:
    """A nursery for trio-websocket's reader task. Close the stream at the end."""
    reading = trio.CancelScope(shield=True)
    try:
        with lone_error_bare():
            async with trio.open_nursery() as nursery:
                try:
                    yield cast("trio.Nursery", _ReaderNursery(nursery, reading, engine_stream))
                finally:
                    reading.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(engine_stream)


@final
class _ReaderNursery:
    """The nursery in which trio-websocket starts its reader task.

    It shields the reader from an outside cancellation, because the reader must still receive the peer's close frame.
    """

    def __init__(self, nursery: trio.Nursery, reading: trio.CancelScope, engine_stream: _EngineStream) -> None:
        self._nursery: Final = nursery
        self._reading: Final = reading
        self._engine_stream: Final = engine_stream

    def start_soon(self, reader: Callable[[], Awaitable[object]]) -> None:
        self._nursery.start_soon(self._read, reader)

    async def _read(self, reader: Callable[[], Awaitable[object]]) -> None:
        with self._reading:
            try:
                await reader()
            except Exception:
                # trio-websocket raises errors of the opening here, and not in the task that waits for the opening. That
                # task gets a better one, from `raise_when_refused`.
                if self._engine_stream.open:
                    raise
        self._engine_stream.fail_opening()


@final
class TrioWebSocket(WebSocket):
    def __init__(self, stream: _EngineStream, connection: WebSocketConnection) -> None:
        self.subprotocol = connection.subprotocol
        self.meter = stream.meter
        self._stream: Final = stream
        self._connection: Final = connection

    async def send(self, messages: Sequence[bytes | str]) -> None:
        try:
            for message in messages:
                await self._connection.send_message(message)
        except ConnectionClosed as error:
            raise _closed(error) from None

    async def receive(self) -> list[Message]:
        try:
            message = await self._connection.get_message()
            if isinstance(message, str) and len(message) > MAX_TEXT // 4 and len(message.encode()) > MAX_TEXT:
                await self._connection.aclose(1009, f"text of more than {MAX_TEXT} bytes")
                raise WebSocketClosed(1009, f"text of more than {MAX_TEXT} bytes")
        except ConnectionClosed as error:
            raise _closed(error) from None
        return [message]

    async def close(self, code: int, reason: str = "") -> None:
        try:
            await self._connection.aclose(code, reason)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            # After a remote close the engine leaves the stream open.
            await trio.aclose_forcefully(self._stream)


def _closed(error: ConnectionClosed) -> trio.BrokenResourceError:
    reason = error.reason
    if reason is None or reason.code == 1006:
        return trio.BrokenResourceError("the connection ended without a close frame")
    return WebSocketClosed(reason.code, clean_message(reason.reason or ""))


@final
class _EngineStream(trio.abc.Stream):
    """The stream that trio-websocket uses.

    During the opening it keeps the first received bytes. `raise_when_refused` runs in a task of its own, and raises
    when the stream has ended, or when the received part of a response shows a refusal. trio-websocket parses all bytes
    of one read at once, so `meter` cuts reads into portions.
    """

    def __init__(self, stream: trio.abc.Stream, meter: FrameMeter, *, of_client: bool) -> None:
        self.transport_stream: Final = stream
        self.meter: Final = meter
        self._unparsed: bytes | bytearray | memoryview = b""
        self._connection: WebSocketConnection | None = None
        self._of_client: Final = of_client
        self._answer = b""
        self._opening_failed: Final = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        # trio-websocket reads when it has processed all earlier bytes. It limits a message's bytes, but not its pieces.
        if len(getattr(self._connection, "_message_parts", ())) > _MAX_PIECES:
            raise trio.BrokenResourceError(f"a message in more than {_MAX_PIECES} pieces")
        if self._unparsed:
            await trio.lowlevel.checkpoint()
        else:
            self._unparsed = await self._read(max_bytes if self.meter.trusted else FIRST_READ)
        amount = self.meter.admit(self._unparsed)
        if amount == len(self._unparsed):
            data, self._unparsed = self._unparsed, b""
        else:
            view = memoryview(self._unparsed)
            data, self._unparsed = view[:amount], view[amount:]
        return bytes(data) if isinstance(data, memoryview) else data

    async def _read(self, max_bytes: int | None) -> bytes | bytearray:
        if self._connection is not None:
            return await self.transport_stream.receive_some(max_bytes)
        try:
            data = await self.transport_stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._opening_failed.set()
            raise
        self._answer = (self._answer + data)[:MAX_ANSWER]
        if not data or (self._of_client and refusal_in(self._answer)):
            self._opening_failed.set()
        return data

    @property
    def open(self) -> bool:
        """Whether the opening has succeeded."""
        return self._connection is not None

    def open_for(self, connection: WebSocketConnection) -> None:
        """The opening has succeeded."""
        self._connection = connection

    def fail_opening(self) -> None:
        """The reader has ended. If the opening has not succeeded, it never will."""
        self._opening_failed.set()

    async def raise_when_refused(self) -> NoReturn:
        # The caller of the opening sets the deadline.
        await self._opening_failed.wait()
        raise self.refusal(None)

    def refusal(self, error: HandshakeError | None) -> Exception:
        """The exception for an opening that failed, from the received bytes."""
        refused = refusal_in(self._answer) if self._of_client and self._answer else None
        if refused is not None:
            return refused
        if isinstance(error, ConnectionRejected):
            return WebSocketRefused(f"HTTP status {error.status_code}", status=error.status_code)
        if self._answer:
            return WebSocketRefused("did not receive a valid HTTP " + ("response" if self._of_client else "request"))
        return trio.BrokenResourceError("the connection ended without a word")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._opening_failed.set()
        await self.transport_stream.aclose()
