"""Read the first request head of a connection in clear, without a task.

Most visitors send it with the end of TCP's handshake, so it is there when the connection is accepted. Otherwise the
event loop reads, until the head is complete. What takes time then begins in a task: to refuse the request, or to serve
a visitor that begins with TLS.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from ..._http.head import BadRequest, HeadReader, RequestHead
from ..._model.callbacks import nothing
from ..._net.fastpath.event_loop import Reactor
from ..._net.fastpath.timers import Timer
from ..._net.leg import Leg
from ..._net.tls.client_hello import looks_like_tls
from ...exchange.carrier import Carrier
from ..connection import Connection, log_unforeseen
from ..request_head import HEAD_TIMEOUT, READ_SIZE, Refusal, ended_early, nothing_came, too_slow
from .tls import HELLO_TIMEOUT

__all__ = ["Arriving"]


@final
class Arriving:
    """A connection whose first request head has not come yet.

    Args:
        connection: the connection.
        leg: of its stream. It may take what has come before it is attached.
        carrier: resets the connection if it is cancelled first.
        on_head: called with the head and all that was read. The leg belongs to the callee, and may be attached.
        answer: sends the answer to a request that is refused, and closes the connection.
        in_task: called with what was read if that looks like TLS, or if the event loop cannot watch the connection. The
            leg is detached.
        passes: called with what came first. It returns True if it has passed the connection to another process.
    """

    __slots__ = (
        "_answer",
        "_carrier",
        "_connection",
        "_in_task",
        "_leg",
        "_on_head",
        "_over",
        "_passes",
        "_reader",
        "_timer",
    )

    def __init__(
        self,
        connection: Connection,
        leg: Leg,
        carrier: Carrier,
        *,
        on_head: Callable[[Connection, Leg, RequestHead, bytes], object],
        in_task: Callable[[bytes], object],
        passes: Callable[[Connection, bytes], bool],
        answer: Callable[[Connection, Refusal], Awaitable[None]],
    ) -> None:
        self._answer: Final = answer
        self._connection: Final = connection
        self._leg: Final = leg
        self._carrier: Final = carrier
        self._on_head: Final = on_head
        self._in_task: Final = in_task
        self._passes: Final = passes
        self._reader: Final = HeadReader()
        self._over = False
        self._timer: Timer | None = None  # while it waits

    def begin(self, received: bytes = b"") -> None:
        """Begin to read. `received` was read already, in pieces of at most `READ_SIZE`."""
        if 0 < len(received) < READ_SIZE:
            self._leg.note_drained()
        try:
            data = received or self._leg.receive(READ_SIZE)
        except trio.BrokenResourceError:
            self.stop()
            return
        if data:  # an end is read again, by a leg that can close
            self._take(bytes(data))
        if not self._over:
            self._wait()

    def _wait(self) -> None:
        """Let the event loop read what is missing."""
        try:
            self._leg.attach()
        except OSError:
            self._leave_to_task()
            return
        self._leg.on_readable = self._on_readable
        self._carrier.own(self)
        self._timer = Reactor.current().timer(self._on_timeout)
        self._timer.move(trio.current_time() + (HEAD_TIMEOUT if self._reader.received else HELLO_TIMEOUT))

    def stop(self) -> None:
        """Reset the connection."""
        self._leave()
        self._leg.detach()
        self._connection.evict()

    def _leave(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.close()
            self._carrier.disown(self)
            self._leg.on_readable = nothing

    def _leave_to_task(self, received: bytes = b"") -> None:
        self._leave()
        self._leg.detach()
        self._in_task(received or self._reader.received)

    def _on_readable(self) -> int:
        if self._over:
            return 0  # it was queued before the end
        try:
            self._read()
        except Exception as error:  # noqa: BLE001  # it concerns this connection alone
            log_unforeseen(error)
            self.stop()
        return 0

    def _read(self) -> None:
        try:
            received = self._leg.receive(READ_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.stop()
            return
        if received is None:
            return
        if not received:
            self._end()
            return
        if not self._reader.received:
            assert self._timer is not None
            self._timer.move(trio.current_time() + HEAD_TIMEOUT)
        self._take(bytes(received))
        if not (self._over or self._leg.drained):
            Reactor.current().queue(self._on_readable)

    def _take(self, data: bytes) -> None:
        reader = self._reader
        if not reader.received:
            if looks_like_tls(data):
                self._leave_to_task(data)
                return
            if self._connection.may_pass and self._passes(self._connection, data):
                self._leave()
                self._leg.detach()
                self._connection.close()
                return
        try:
            head = reader.feed(data)
        except BadRequest as error:
            self._refuse(Refusal.of(error))
        else:
            if head is not None:
                self._leave()
                self._on_head(self._connection, self._leg, head, reader.received)

    def _end(self) -> None:
        if self._reader.received:
            self._refuse(ended_early(self._reader))
        else:
            self._leave()
            self._leg.close()
            self._connection.close()

    def _on_timeout(self) -> None:
        self._refuse(too_slow(self._reader) if self._reader.received else nothing_came(HELLO_TIMEOUT))

    def _refuse(self, refusal: Refusal) -> None:
        self._leave()
        self._leg.detach()
        self._connection.start(self._answer, self._connection, refusal)
