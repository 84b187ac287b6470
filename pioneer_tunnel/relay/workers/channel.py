"""Calls between the parent and a worker, over a socket pair. No other process can reach it: it has no name.

A message is a head (the length of the body, and the number of descriptors that come with it), and a body of JSON:

    {"call": 7, "method": "apply", "params": …}     an answer is wanted
    {"answer": 7, "result": …}                      or "error", with "kind", the error kind, where it has one
    {"method": "drain", "params": …}                no answer is wanted

Messages arrive in the order in which they were sent. Those without an answer are heard in that order, too.
"""

from __future__ import annotations

import array
import itertools
import json
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, final

import attrs
import trio

from ..._model.errors import TunnelError
from ..._model.log_fields import about
from ..._model.status import ErrorKind

__all__ = ["Answer", "CallFailed", "Channel", "Hear"]

Answer: TypeAlias = Callable[[str, Any], Awaitable[Any]]
"""Answers a call: gets the method and its params, and returns what JSON can hold, or raises."""

Hear: TypeAlias = Callable[[str, Any, Sequence[socket.socket]], object]
"""Hears a message without an answer. The sockets that came with it are the hearer's. It must not wait."""

MOST_BYTES: Final = 256 * 1024 * 1024
"""Bytes of a message. A relay's file, which may have 64 MiB, goes as a text of JSON."""

MOST_QUEUED: Final = 512 * 1024 * 1024
"""Bytes that may wait for the other end. Who takes none for so long is stuck, and gets no more."""

MOST_DESCRIPTORS: Final = 200
"""Descriptors of a message. Linux takes 253."""

_PIECE: Final = 256 * 1024
_HEAD: Final = struct.Struct("!IB")
_CLOSE_ON_EXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_log: Final = logging.getLogger("pioneer_tunnel.relay.workers")


@final
class CallFailed(Exception):
    """The other end could not do it. The text says why.

    Attributes:
        kind: the error kind; None if the error has none.
    """

    def __init__(self, text: str, kind: ErrorKind | None = None) -> None:
        super().__init__(text)
        self.kind: Final = kind


@final
@attrs.define(eq=False)
class _Pending:
    """A call that waits for its answer."""

    done: trio.Event = attrs.field(factory=trio.Event)
    message: dict[str, Any] | None = None


@final
class Channel:
    """One end of a channel.

    Args:
        connection: one end of a socket pair. The channel closes it.
        answer: answers calls. They are answered side by side.
        hear: hears messages without an answer.
    """

    def __init__(self, connection: socket.socket, answer: Answer, hear: Hear) -> None:
        self._socket: Final = trio.socket.from_stdlib_socket(connection)
        self._answer: Final = answer
        self._hear: Final = hear
        self._numbers: Final = itertools.count(1)
        self._pending: Final[dict[int, _Pending]] = {}
        self._queue: Final[deque[tuple[bytes, list[int]]]] = deque()
        self._queued = 0
        self._news = trio.Event()
        self._received: Final = bytearray()
        self._descriptors: Final[deque[int]] = deque()
        self._closed = False

    async def run(self) -> None:
        """Carry messages, until the other end is gone, or `close`."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        except* (OSError, trio.ClosedResourceError) as group:
            _log.debug("the channel to another process has ended: %s", group.exceptions[0])
        finally:
            self.close()

    def close(self) -> None:
        """Close the channel. Calls that wait for an answer fail."""
        self._closed = True
        self._socket.close()
        for _, descriptors in self._queue:
            _close_all(descriptors)
        self._queue.clear()
        _close_all(self._descriptors)
        self._descriptors.clear()
        for pending in self._pending.values():
            pending.done.set()
        self._pending.clear()

    def tell(self, method: str, params: Any = None, sockets: Sequence[socket.socket] = ()) -> None:
        """Send a message without an answer. Does not wait. If the other end is gone, nothing happens.

        Args:
            method: what to do.
            params: what JSON can hold.
            sockets: the other end gets copies of these.
        """
        self._send({"method": method, "params": params}, sockets)

    async def call(self, method: str, params: Any = None) -> Any:
        """Call a method of the other end, and return its result. The caller sets the deadline.

        Raises:
            CallFailed: it could not do it.
            trio.BrokenResourceError: the other end is gone.
        """
        number = next(self._numbers)
        pending = self._pending[number] = _Pending()
        try:
            self._send({"call": number, "method": method, "params": params})
            if not self._closed:
                await pending.done.wait()
        finally:
            self._pending.pop(number, None)
        if (message := pending.message) is None:
            raise trio.BrokenResourceError("the other process has ended")
        if "error" in message:
            kind = message.get("kind")
            raise CallFailed(message["error"], None if kind is None else ErrorKind(kind))
        return message["result"]

    def _send(self, message: dict[str, Any], sockets: Sequence[socket.socket] = ()) -> None:
        if self._closed:
            return
        assert len(sockets) <= MOST_DESCRIPTORS
        body = json.dumps(message).encode()
        self._queued += len(body)
        if self._queued > MOST_QUEUED:
            _log.error("another process takes no messages; its channel is closed", extra=about("unforeseen"))
            self.close()
            return
        # Copies: the caller may close its own before they are sent.
        self._queue.append((_HEAD.pack(len(body), len(sockets)) + body, [os.dup(one.fileno()) for one in sockets]))
        self._news.set()

    async def _write(self) -> None:
        while True:
            # No deadline: there may be nothing to say for days.
            await self._news.wait()
            self._news = trio.Event()
            while self._queue:
                data, descriptors = self._queue.popleft()
                try:
                    await self._write_message(memoryview(data), descriptors)
                finally:
                    self._queued -= len(data) - _HEAD.size
                    _close_all(descriptors)

    async def _write_message(self, data: memoryview, descriptors: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while data:
            # No deadline: `MOST_QUEUED` bounds what waits for an end that is stuck.
            sent = await self._socket.sendmsg([data], rights)
            rights = []  # they have gone with the first byte
            data = data[sent:]

    async def _read(self, answering: trio.Nursery) -> None:
        while True:
            # No deadline: as above.
            data, ancillary, flags, _ = await self._socket.recvmsg(
                _PIECE, socket.CMSG_SPACE(MOST_DESCRIPTORS * 4), _CLOSE_ON_EXEC
            )
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    self._descriptors.extend(received)
            if not data:
                return
            if flags & socket.MSG_CTRUNC:
                _log.error("this process has no descriptors left for what it is sent", extra=about("few_descriptors"))
                return
            self._received.extend(data)
            while (message := self._next()) is not None:
                self._take(*message, answering)

    def _next(self) -> tuple[dict[str, Any], list[socket.socket]] | None:
        """The next message that is complete, and its sockets."""
        if len(self._received) < _HEAD.size:
            return None
        length, amount = _HEAD.unpack_from(self._received)
        end = _HEAD.size + length
        if length > MOST_BYTES:
            raise OSError("a message is too long")
        if len(self._received) < end:
            return None
        message: dict[str, Any] = json.loads(self._received[_HEAD.size : end])
        del self._received[:end]
        return message, [_received_socket(self._descriptors.popleft()) for _ in range(amount)]

    def _take(self, message: dict[str, Any], sockets: list[socket.socket], answering: trio.Nursery) -> None:
        if "answer" in message:
            pending = self._pending.get(message["answer"])
            if pending is not None:
                pending.message = message
                pending.done.set()
        elif "call" in message:
            answering.start_soon(self._answer_call, message["call"], message["method"], message["params"])
        else:
            self._hear(message["method"], message["params"], sockets)

    async def _answer_call(self, number: int, method: str, params: Any) -> None:
        try:
            answer = {"result": await self._answer(method, params)}
        except TunnelError as error:
            answer = {"error": str(error), "kind": error.kind}
        except OSError as error:
            answer = {"error": error.strerror or str(error)}
        except Exception as error:  # noqa: BLE001  # the other end has to know, and to go on
            _log.exception("an unforeseen failure in answering %s", method, extra=about("unforeseen"))
            answer = {"error": f"an unforeseen failure, see the log: {type(error).__name__}"}
        self._send({"answer": number, **answer})


def _received_socket(descriptor: int) -> socket.socket:
    received = socket.socket(fileno=descriptor)
    received.set_inheritable(False)
    return received


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
