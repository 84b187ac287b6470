"""Read the first request head of a connection in clear, without a task.

The event loop reads, until the head is complete. What takes time then begins in a task: to refuse the request, or to
serve a visitor that begins with TLS.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from ..._http.head import BadRequest, HeadReader, RequestHead
from ..._net.fastpath.event_loop import Reactor
from ..._net.leg import Leg, nothing
from ..._net.tls.client_hello import looks_like_tls
from ...exchange.carrier import Carrier
from ..connection import Connection, log_unforeseen
from ..request_head import HEAD_TIMEOUT, READ_SIZE, Refusal, ended_early, nothing_came, refuse, too_slow
from .tls import HELLO_TIMEOUT

__all__ = ["Arriving"]


async def _refuse(connection: Connection, refusal: Refusal) -> None:
    await refuse(connection.stream, refusal)


@final
class Arriving:
    """A connection whose first request head has not come yet.

    Args:
        connection: nothing was read from it yet.
        leg: of its stream.
        carrier: resets the connection if it is cancelled first.
        on_head: called with the head and all that was read. The leg is still attached, and belongs to the callee.
        answer: sends the answer to a request that is refused, and closes the connection.
        on_tls: called with what was read if that looks like TLS. The leg is detached.
    """

    __slots__ = (
        "_answer",
        "_carrier",
        "_connection",
        "_leg",
        "_on_head",
        "_on_tls",
        "_over",
        "_reactor",
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
        on_tls: Callable[[bytes], object],
        answer: Callable[[Connection, Refusal], Awaitable[None]] = _refuse,
    ) -> None:
        self._answer: Final = answer
        self._connection: Final = connection
        self._leg: Final = leg
        self._carrier: Final = carrier
        self._on_head: Final = on_head
        self._on_tls: Final = on_tls
        self._reader: Final = HeadReader()
        self._over = False
        self._reactor: Final = Reactor.current()
        self._timer: Final = self._reactor.timer(self._on_timeout)

    def begin(self) -> None:
        """Begin to read.

        Raises:
            OSError: the system has no memory for it.
        """
        self._leg.on_readable = self._on_readable
        self._leg.attach()
        self._carrier.own(self)
        self._timer.move(self._reactor.turn.now() + HELLO_TIMEOUT)

    def stop(self) -> None:
        """Reset the connection."""
        self._leave()
        self._leg.detach()
        self._connection.evict()

    def _leave(self) -> None:
        self._over = True
        self._timer.close()
        self._carrier.disown(self)
        self._leg.on_readable = nothing

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
        reader, leg = self._reader, self._leg
        try:
            received = leg.receive(READ_SIZE)
            if received is None:
                return
            data = bytes(received)
            if not data:
                self._end()
                return
            if not reader.received:
                if looks_like_tls(data):
                    self._leave()
                    leg.detach()
                    self._on_tls(data)
                    return
                self._timer.move(self._reactor.turn.now() + HEAD_TIMEOUT)
            head = reader.feed(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.stop()
        except BadRequest as error:
            self._refuse(Refusal.of(error))
        else:
            if head is not None:
                self._leave()
                self._on_head(self._connection, leg, head, reader.received)
            elif not leg.drained:
                self._reactor.queue(self._on_readable)

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
