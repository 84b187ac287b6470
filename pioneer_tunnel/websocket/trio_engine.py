"""The engine over `trio-websocket`, which is always installed.

It opens the WebSocket. After that wsproto, on which it is built, frames the messages, on our own reads and writes: its
own reader takes a message through a task, a channel and several copies, and waits for the writer to answer a ping.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias, final

import trio
from trio_websocket import WebSocketRequest, wrap_client_stream, wrap_server_stream

from .._model.callbacks import nothing
from .connection import WebSocket
from .frame_meter import FrameMeter
from .opening import MAX_ANSWER, Opening, WebSocketRefused, refusal_in
from .wsproto_framing import WsprotoFraming

__all__ = ["accept", "connect"]


@asynccontextmanager
async def connect(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.connect`."""
    assert opening.address is not None
    address = opening.address
    headers = {"User-Agent": opening.agent, **opening.headers}

    async def ask(head: _Head, tasks: trio.Nursery) -> None:
        connection = await wrap_client_stream(
            tasks,
            head,  # type: ignore[arg-type]  # any stream will do, as its documentation says
            address.audience,
            address.path,
            subprotocols=[opening.subprotocol],
            extra_headers=[(name.encode(), value.encode()) for name, value in headers.items()],
        )
        websocket.subprotocol = connection.subprotocol
        date = dict(connection.handshake_headers).get(b"date")
        websocket.date = None if date is None else date.decode("latin-1")

    framing = WsprotoFraming(is_client=True)
    websocket = WebSocket(stream, framing, FrameMeter(opening.allowance))
    async with websocket.running():
        await _open(_Head(websocket, of_client=True), ask)
        framing.open()
        yield websocket


@asynccontextmanager
async def accept(stream: trio.abc.Stream, opening: Opening) -> AsyncIterator[WebSocket]:
    """See `Engine.accept`."""

    async def answer(head: _Head, tasks: trio.Nursery) -> None:
        request: WebSocketRequest = await wrap_server_stream(tasks, head)
        offered = opening.subprotocol in request.proposed_subprotocols
        websocket.subprotocol = opening.subprotocol if offered else None
        await request.accept(subprotocol=websocket.subprotocol)

    framing = WsprotoFraming(is_client=False)
    websocket = WebSocket(stream, framing, FrameMeter(opening.allowance))
    async with websocket.running():
        await _open(_Head(websocket, of_client=False), answer)
        framing.open()
        yield websocket


_Handshake: TypeAlias = Callable[["_Head", trio.Nursery], Awaitable[None]]


async def _open(head: _Head, handshake: _Handshake) -> None:
    """Let trio-websocket open the WebSocket, with its reader in a nursery.

    The caller sets the deadline.
    """
    done = False
    try:
        async with trio.open_nursery() as tasks:
            head.on_end = tasks.cancel_scope.cancel
            await handshake(head, tasks)
            done = True
            tasks.cancel_scope.cancel()
    except Exception as error:
        # What the library does not accept it raises in one way or another, also in its reader.
        raise head.refusal() from error
    if not done:
        raise head.refusal()


@final
class _Head(trio.abc.Stream):
    """The stream that trio-websocket gets: of what the other end sends, it has the HTTP head alone.

    trio-websocket reads on for as long as it has hope. It tells neither of a connection that ends without an answer nor
    of an answer whose body never ends. So this sees when the opening has failed.

    Attributes:
        on_end: called when the opening has failed.
    """

    def __init__(self, websocket: WebSocket, *, of_client: bool) -> None:
        self.on_end: Callable[[], object] = nothing
        self._websocket: Final = websocket
        self._of_client: Final = of_client
        self._head = b""
        self._failure: Exception | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:  # noqa: ARG002  # our buffer is small
        if self._websocket.meter.between_frames:
            # No deadline: `_open` cancels the reader when the opening is over.
            await trio.sleep_forever()
        try:
            data = bytes(await self._websocket.receive_bytes())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(error)
            raise
        self._head = (self._head + data)[:MAX_ANSWER]
        if not data or (self._of_client and refusal_in(self._head)):
            self.on_end()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._websocket.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(error)
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self._websocket.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """trio-websocket does not accept the head. The stream below is closed with the WebSocket."""
        self.on_end()
        await trio.lowlevel.checkpoint()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.on_end()

    def refusal(self) -> Exception:
        """What to raise for an opening that failed, from what the other end has said."""
        refused = refusal_in(self._head) if self._of_client and self._head else None
        if refused is not None:
            return refused
        if self._failure is not None:
            return self._failure
        if self._head:
            return WebSocketRefused("did not receive a valid HTTP " + ("response" if self._of_client else "request"))
        return trio.BrokenResourceError("the connection ended without a word")
