"""HTTP/1.1 on a visitor's connection: h11 for the protocol, a `Wire` for the bytes."""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from typing import Final, final

import h11

from .interface import Disconnected, Host, Interrupted, Wire
from .options import Options
from .scope import RequestRefused, check_framing

__all__ = ["Http1", "reason_of"]

_PHRASES: Final = {int(status): status.phrase.encode() for status in HTTPStatus}


def reason_of(status: int) -> bytes:
    """The reason phrase of a status; empty for one that is not known."""
    return _PHRASES.get(status, b"")


@final
class Http1:
    """One connection.

    Args:
        wire: the bytes.
        host: see `interface`.
        options: the limits.

    Attributes:
        protocol: h11's view of the connection.
        wire: as above.
        idle: whether it waits for the first byte of a request.
        closing: set to close the connection after the answer under way.
        broken: whether nothing more can be sent: the visitor has gone, or a send was cancelled half way.
    """

    def __init__(self, wire: Wire, host: Host, options: Options) -> None:
        self.protocol: Final = h11.Connection(h11.SERVER, max_incomplete_event_size=options.max_head_bytes)
        self.wire: Final = wire
        self.idle = False
        self.closing = False
        self.broken = False
        self._host: Final = host
        self._options: Final = options
        self._sending: Final = host.lock()

    async def read_head(self) -> h11.Request | None:
        """Wait for the next request; None if none comes: the visitor has sent EOF or is silent, or `closing` is set.

        Raises:
            Disconnected: the connection is broken.
            RequestRefused: the visitor gets this answer, and no other.
        """
        if self.closing:
            return None
        if not self.protocol.trailing_data[0]:
            self.idle = True
            try:
                data = await self.wire.receive(self._options.keep_alive_timeout)
            except Interrupted:
                return None
            finally:
                self.idle = False
            self.protocol.receive_data(data)
        try:
            async with self._host.within(self._options.head_timeout):
                event = await self.next_event()
        except TimeoutError:
            raise RequestRefused(408, "the head of the request did not come in time") from None
        except h11.RemoteProtocolError as error:
            raise RequestRefused(error.error_status_hint, str(error)) from error
        if not isinstance(event, h11.Request):
            return None
        check_framing(event)
        return event

    @property
    def more_may_come(self) -> bool:
        """Whether the visitor may be sending, as far as HTTP tells: not after a whole request, or before one."""
        at_rest = self.protocol.their_state in (h11.IDLE, h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        return not at_rest or bool(self.protocol.trailing_data[0])

    async def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """What the visitor has sent next.

        Raises:
            Disconnected: the connection is broken.
            Interrupted: `wire.interrupt` was called.
            h11.RemoteProtocolError: it is no HTTP.
        """
        while (event := self.protocol.next_event()) is h11.NEED_DATA:
            # No deadline: for a head the caller has one; a body is waited for as long as the application likes.
            self.protocol.receive_data(await self.wire.receive())
        return event  # type: ignore[return-value]  # NEED_DATA is a class of its own, which mypy does not exclude

    async def send(self, *events: h11.Event) -> None:
        """Send `events`, as one piece.

        Raises:
            Disconnected: the connection is broken.
            h11.LocalProtocolError: the application's answer is no HTTP.
        """
        async with self._sending:
            if self.broken:
                raise Disconnected("the visitor has gone")
            try:
                # No deadline: the visitor reads as slowly as it likes. The tunnel notices a dead link itself.
                await self.wire.send(b"".join([self.protocol.send(event) or b"" for event in events]))
            except BaseException:
                self.broken = True
                raise

    async def refuse(self, status: int, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """Answer with an error and no more, if no answer has begun. The connection is closed then.

        Raises:
            Disconnected: an answer has begun, or the connection is broken.
        """
        if self.protocol.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            raise Disconnected("an answer has begun")
        await self.send(
            h11.Response(
                status_code=status,
                reason=reason_of(status),
                headers=[
                    *(headers or []),
                    *self.common_headers(),
                    (b"content-length", b"0"),
                    (b"connection", b"close"),
                ],
            ),
            h11.EndOfMessage(),
        )

    def common_headers(self) -> list[tuple[bytes, bytes]]:
        """What each answer has."""
        return [(b"date", formatdate(self._host.wall_clock(), usegmt=True).encode())]
