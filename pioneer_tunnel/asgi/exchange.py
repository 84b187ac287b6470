"""A request, the application, and its answer."""

from __future__ import annotations

import enum
import logging
from contextlib import suppress
from typing import Final, final

import h11

from .._model.text import clean_message
from .http1 import Http1, reason_of
from .interface import Disconnected, Interrupted, Message, Server, Wire
from .scope import Visitor, http_scope

__all__ = ["After", "Answer", "Exchange", "log_failure"]

_AHEAD_LIMIT: Final = 64 * 1024
_NO_BODY: Final = frozenset({204, 304})

_log: Final = logging.getLogger("pioneer_tunnel.asgi")


class After(enum.Enum):
    """What happens to the connection."""

    NEXT = enum.auto()
    """It takes the next request."""
    CLOSE = enum.auto()
    """It is closed in good order."""
    RESET = enum.auto()
    """It is reset, so that an answer that was cut off does not look complete."""


def log_failure(scope: Message, error: Exception) -> None:
    """Log what an application has raised: as an error, unless it came of the visitor having gone."""
    path = clean_message(scope["path"])  # the visitor chooses it
    if _is_about_disconnect(error):
        _log.info("the visitor of %s has gone, and the application has raised", path, exc_info=error)
    else:
        _log.error("the application has failed at %s", path, exc_info=error)


def _is_about_disconnect(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_about_disconnect(part) for part in error.exceptions)
    while error is not None and not isinstance(error, Disconnected):
        error = error.__cause__ or error.__context__
    return error is not None


@final
class Answer:
    """The application's side of a response: its messages become HTTP. For `HEAD`, 204 and 304 without a body.

    Attributes:
        begun: whether anything was sent.
        complete: whether all of it was sent.
    """

    def __init__(self, http: Http1, request: h11.Request) -> None:
        self.begun = False
        self.complete = False
        self._http: Final = http
        self._request: Final = request
        self._head: h11.Response | None = None
        self._body_ended = False
        self._with_trailers = False
        self._trailers: list[tuple[bytes, bytes]] = []

    async def take(self, kind: str, message: Message) -> None:
        """Send what a message says.

        Args:
            kind: its type; `message["type"]` may have a prefix.

        Raises:
            Disconnected: the visitor has gone.
            RuntimeError: the application cannot send this now.
            h11.LocalProtocolError: this is no HTTP.
        """
        if kind == "http.response.start" and self._head is None:
            self._head = self._response(message)
            self._with_trailers = message.get("trailers", False)
        elif kind == "http.response.body" and self._head is not None and not self._body_ended:
            await self._send_body(self._head, message.get("body", b""), more=message.get("more_body", False))
        elif kind == "http.response.trailers" and self._body_ended and not self.complete:
            self._trailers += message.get("headers", [])
            if not message.get("more_trailers", False):
                await self._send(h11.EndOfMessage(headers=self._trailers), complete=True)
        else:
            raise RuntimeError(f"an application cannot send {message['type']!r} now")

    def _response(self, message: Message) -> h11.Response:
        headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", [])]
        if not any(name.lower() == b"date" for name, _ in headers):
            headers += self._http.common_headers()
        if self._http.closing:
            headers.append((b"connection", b"close"))
        status = message["status"]
        return h11.Response(status_code=status, headers=headers, reason=reason_of(status))

    async def _send_body(self, head: h11.Response, body: bytes, *, more: bool) -> None:
        events: list[h11.Event] = [] if self.begun else [head]
        if body and self._request.method != b"HEAD" and head.status_code not in _NO_BODY:
            events.append(h11.Data(data=body))
        self._body_ended = not more
        ends = self._body_ended and not self._with_trailers
        if ends:
            events.append(h11.EndOfMessage())
        await self._send(*events, complete=ends)

    async def _send(self, *events: h11.Event, complete: bool) -> None:
        self.begun = True
        await self._http.send(*events)
        self.complete = complete


@final
class Exchange:
    """One request.

    The application runs in the task of the connection. It reads the request's body from the connection itself, as far
    as it asks for it: so a visitor sends no faster than the application reads.
    """

    def __init__(self, http: Http1, request: h11.Request, visitor: Visitor, server: Server) -> None:
        self._app: Final = server.app
        self._http: Final = http
        self._protocol: Final = http.protocol
        self._wire: Final[Wire] = http.wire
        self._answer: Final = Answer(http, request)
        self._scope: Final = http_scope(request, visitor, server.state)
        self._receiving: Final = server.host.lock()
        self._over: Final = server.host.event()
        self._body_read = False
        self._visitor_gone = False

    async def run(self) -> After:
        """Run the application; returns what happens to the connection."""
        answer = self._answer
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  # an application may raise anything, and the server goes on
            log_failure(self._scope, error)
        else:
            if not answer.complete and not self._http.broken:
                path = clean_message(self._scope["path"])
                _log.error("the application has returned without a complete answer at %s", path)
        if not answer.begun and not self._http.broken:
            await self._http.refuse(500)
            return After.CLOSE
        if not answer.complete:
            return After.RESET
        return After.NEXT if self._is_ready_for_next() else After.CLOSE

    def _is_ready_for_next(self) -> bool:
        """Skip the rest of the request, if it has arrived."""
        try:
            while self._protocol.their_state is h11.SEND_BODY:
                if self._protocol.next_event() is h11.NEED_DATA:
                    return False
        except h11.RemoteProtocolError:
            return False
        return self._protocol.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}

    async def _send(self, message: Message) -> None:
        await self._answer.take(message["type"], message)
        if self._answer.complete:
            self._over.set()
            self._wire.interrupt()  # a task of the application may wait in `receive` to hear that the visitor has gone

    async def _receive(self) -> Message:
        async with self._receiving:
            try:
                if not self._is_over():
                    return await self._next_part() if not self._body_read else await self._wait_until_gone()
            except Disconnected:
                self._visitor_gone = self._http.broken = True
            except Interrupted:
                pass
            except h11.RemoteProtocolError as error:
                await self._refuse_body(error)
            return {"type": "http.disconnect"}

    def _is_over(self) -> bool:
        return self._visitor_gone or self._answer.complete or self._http.broken

    async def _next_part(self) -> Message:
        if self._protocol.they_are_waiting_for_100_continue:
            await self._http.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        parts: list[bytes] = []
        event = await self._http.next_event()
        while isinstance(event, h11.Data):
            parts.append(bytes(event.data))
            event = self._protocol.next_event()  # type: ignore[assignment]  # NEED_DATA ends the loop
        self._body_read = isinstance(event, h11.EndOfMessage)
        return {"type": "http.request", "body": b"".join(parts), "more_body": not self._body_read}

    async def _wait_until_gone(self) -> Message:
        """Wait for EOF or a reset. What comes before belongs to the next request, and is kept, up to a limit."""
        ahead = len(self._protocol.trailing_data[0])
        while ahead < _AHEAD_LIMIT:
            # No deadline: the application waits for as long as its answer takes.
            data = await self._wire.receive()
            self._protocol.receive_data(data)
            if not data:
                self._visitor_gone = True
                return {"type": "http.disconnect"}
            ahead += len(data)
        await self._over.wait()  # no deadline: the same
        return {"type": "http.disconnect"}

    async def _refuse_body(self, error: h11.RemoteProtocolError) -> None:
        """A body that is no HTTP, or is cut off. The application hears that the visitor has gone."""
        self._visitor_gone = True
        if self._protocol.trailing_data[1]:
            return  # cut off by EOF: there may be an answer
        _log.debug("the body of a request is malformed: %s", error)
        if not self._answer.begun:
            with suppress(Disconnected):
                await self._http.refuse(error.error_status_hint)
                self._answer.begun = self._answer.complete = True
        self._http.broken = True
