"""The engine over `trio-websocket`, which is always installed.

What it does not do, we do around it: it is handed a stream that we made and close ourselves, it reads in large
pieces, and an opening that it would wait for without end is watched from below (`_Watch`), since it tells
neither of a connection that ends without an answer nor of an answer whose body never ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, NoReturn, final

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
"""Pieces of one message. Each read makes one, so a large message over a slow path honestly has a thousand."""

_QUEUE: Final = 8
"""Messages between the engine's reader and ours: what one read brings, and somewhat more."""


@asynccontextmanager
async def connect(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.connect`."""
    assert opening.address is not None
    watch = _Watch(stream, FrameMeter(opening.allowance), of_client=True)
    async with _kept(watch) as nursery:
        try:
            with lone_error_bare():
                async with trio.open_nursery() as until_open:
                    until_open.start_soon(watch.raise_when_refused)
                    connection = await wrap_client_stream(
                        nursery,
                        watch,  # type: ignore[arg-type]  # any stream will do, as its documentation says
                        opening.address.audience,
                        opening.address.path,
                        subprotocols=[opening.subprotocol],
                        extra_headers=[
                            (b"User-Agent", opening.agent.encode()),
                            *((name.encode(), value.encode()) for name, value in opening.headers.items()),
                        ],
                        max_message_size=MAX_BINARY,
                        message_queue_size=_QUEUE,
                        receive_buffer_size=READ_SIZE,
                    )
                    watch.open_for(connection)
                    until_open.cancel_scope.cancel()
        except HandshakeError as error:
            raise watch.refusal(error) from error
        websocket = TrioWebSocket(watch, connection, nursery)
        date = dict(connection.handshake_headers).get(b"date")
        websocket.date = None if date is None else date.decode("latin-1")
        yield websocket


@asynccontextmanager
async def accept(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.accept`."""
    watch = _Watch(stream, FrameMeter(opening.allowance), of_client=False)
    async with _kept(watch) as nursery:
        with lone_error_bare():
            async with trio.open_nursery() as until_open:
                until_open.start_soon(watch.raise_when_refused)
                request: WebSocketRequest = await wrap_server_stream(
                    nursery,
                    watch,
                    max_message_size=MAX_BINARY,
                    message_queue_size=_QUEUE,
                    receive_buffer_size=READ_SIZE,
                )
                offered = opening.subprotocol in request.proposed_subprotocols
                try:
                    connection = await request.accept(subprotocol=opening.subprotocol if offered else None)
                except ConnectionClosed as error:
                    raise _closed(error) from None  # the client went away when it had asked
                watch.open_for(connection)
                until_open.cancel_scope.cancel()
        yield TrioWebSocket(watch, connection, nursery)


@asynccontextmanager
async def _kept(watch: _Watch) -> AsyncIterator[trio.Nursery]:
    """A nursery for the engine's reader. At the end the reader is cancelled and the stream is closed."""
    try:
        with lone_error_bare():
            async with trio.open_nursery() as nursery:
                reading: trio.Nursery = await nursery.start(_hold_nursery, watch)
                try:
                    yield reading
                finally:
                    reading.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(watch)


async def _hold_nursery(watch: _Watch, *, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """Open a nursery for the reader, until it is cancelled.

    A cancellation from outside must not reach the reader, which has to read the answer to our close frame. The shield
    is in this task, since it must not cover the body of `_kept`.
    """
    try:
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.lowlevel.checkpoint_if_cancelled()  # the last chance, if `start` was cancelled
            nursery.cancel_scope.shield = True
            # No deadline: `_kept` cancels the nursery.
            await trio.sleep_forever()
    except ExceptionGroup:
        # What the reader finds wrong with an opening it raises here. `_Watch` has seen the same and reports it better.
        if watch.open:
            raise
    finally:
        watch.end_opening()


@final
class TrioWebSocket(WebSocket):
    def __init__(self, stream: _Watch, connection: WebSocketConnection, nursery: trio.Nursery) -> None:
        self.subprotocol = connection.subprotocol
        self.meter = stream.meter
        self._stream: Final = stream
        self._connection: Final = connection
        self._nursery: Final = nursery
        self._sending_text = False

    async def send(self, messages: Sequence[bytes | str]) -> None:
        try:
            for message in messages:
                await self._connection.send_message(message)
        except ConnectionClosed as error:
            raise _closed(error) from None

    def offer_text(self, text: str) -> bool:
        if self._sending_text:
            return False
        self._sending_text = True
        self._nursery.start_soon(self._send_text, text)
        return True

    async def _send_text(self, text: str) -> None:
        # The task that receives or sends gets the error, too.
        with suppress(ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
            await self._connection.send_message(text)
        self._sending_text = False

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
class _Watch(trio.abc.Stream):
    """The stream below the engine, with an eye on what the engine has not finished.

    In an opening the engine reads on for as long as it has hope. This keeps the first bytes of what comes and raises,
    in a task of its own, when the stream has ended or when enough of an answer has come to see that it is a refusal.
    The engine parses all that one read brings, so `meter` cuts reads into portions.
    """

    def __init__(self, stream: trio.abc.Stream, meter: FrameMeter, *, of_client: bool) -> None:
        self.transport_stream: Final = stream
        self.meter: Final = meter
        self._unparsed: bytes | bytearray | memoryview = b""
        self._connection: WebSocketConnection | None = None
        self._of_client: Final = of_client
        self._answer = b""
        self._failure: Exception | None = None
        self._over: Final = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        # The engine asks for more when it has parsed what it had. It counts a message's bytes, not its pieces.
        if len(getattr(self._connection, "_message_parts", ())) > _MAX_PIECES:
            raise trio.BrokenResourceError(f"a message in more than {_MAX_PIECES} pieces")
        try:
            if self._unparsed:
                await trio.lowlevel.checkpoint()
            else:
                self._unparsed = await self._read(max_bytes if self.meter.trusted else FIRST_READ)
            amount = self.meter.admit(self._unparsed)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(error)
            raise
        if amount == len(self._unparsed):
            data, self._unparsed = self._unparsed, b""
        else:
            view = memoryview(self._unparsed)
            data, self._unparsed = view[:amount], view[amount:]
        return bytes(data) if isinstance(data, memoryview) else data

    async def _read(self, max_bytes: int | None) -> bytes | bytearray:
        data = await self.transport_stream.receive_some(max_bytes)
        if self._connection is None:
            self._answer = (self._answer + data)[:MAX_ANSWER]
            if not data or (self._of_client and refusal_in(self._answer)):
                self._over.set()
        return data

    @property
    def open(self) -> bool:
        """Whether the opening has ended well."""
        return self._connection is not None

    def open_for(self, connection: WebSocketConnection) -> None:
        """The opening has ended well: from now on this carries `connection`."""
        self._connection = connection

    def end_opening(self) -> None:
        """The engine reads no further: if it is not open yet, it never will be."""
        self._over.set()

    async def raise_when_refused(self) -> NoReturn:
        # The caller of the opening sets the deadline.
        await self._over.wait()
        raise self.refusal(None)

    def refusal(self, error: HandshakeError | None) -> Exception:
        """What to raise for an opening that failed, from what the other end has said."""
        refused = refusal_in(self._answer) if self._of_client and self._answer else None
        if refused is not None:
            return refused
        if isinstance(error, ConnectionRejected):
            return WebSocketRefused(f"HTTP status {error.status_code}", status=error.status_code)
        if self._answer:
            return WebSocketRefused("did not receive a valid HTTP " + ("response" if self._of_client else "request"))
        return self._failure or trio.BrokenResourceError("the connection ended without a word")

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._over.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self.transport_stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if self._of_client:  # the engine then reads no answer to its request; a server's own task gets the error
                self._fail(error)
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._over.set()
        await self.transport_stream.aclose()
