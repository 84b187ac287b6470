"""Serves what other nodes ask of this one: a stream of theirs becomes a visit, an order or a gateway's connection.

A visit goes on without a task, where the session has a connection: its bytes move by the same engine as those of this
node's own visitors.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final, final

import trio

from ..._model.callbacks import nothing
from ..._model.errors import RemoteProtocolError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._net.streams import ByteStream
from ..._wire.messages import Message
from ...exchange.carrier import Carrier
from ...exchange.pump import Pump
from ...yamux import YamuxStream
from ..connection import contain_errors
from ..gateways.other_nodes import ServeGateway
from ..gateways.registry import GatewayAway, LiveSession
from ..visitors.opening import OPEN_TIMEOUT
from .node_messages import (
    AWAY,
    DONE,
    GATEWAY,
    GONE,
    MOST_BYTES,
    OPENED,
    ORDER,
    UNKNOWN,
    VISIT,
    framed,
    opened_fields,
    parse_gateway,
    parse_order,
    parse_whole,
)
from .peers import Asked, Order

__all__ = ["Hops"]

REQUEST_TIMEOUT: Final = 5.0
"""Seconds for a request."""

ORDER_TIMEOUT: Final = 10.0
"""Seconds for carrying out an order."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))


@final
class Hops:
    """The streams that other nodes open at this one.

    Args:
        asked: this node.
        carrier: carries visits without a task for each.
        tasks: the nursery for what takes one.
        serve_gateway: see `OtherNodes`.

    Attributes:
        total: visits so far.
    """

    def __init__(self, asked: Asked, carrier: Carrier, tasks: trio.Nursery, serve_gateway: ServeGateway | None) -> None:
        self._asked: Final = asked
        self._carrier: Final = carrier
        self._tasks: Final = tasks
        self._serve_gateway: Final = serve_gateway
        self.total = 0

    def take(self, node: str, stream: YamuxStream) -> None:
        """Serve a stream of `node`, which may have nothing but its request yet. Does not wait."""
        try:
            received = stream.receive_nowait(MOST_BYTES) or b""
            request = parse_whole(received)
            if request is None:
                self._tasks.start_soon(contain_errors, stream, self._read_on, node, stream, received)
            else:
                self._begin(stream, request)
        except trio.BrokenResourceError:
            stream.reset()
        except RemoteProtocolError as error:
            self._refuse(node, stream, error)

    async def _read_on(self, node: str, stream: YamuxStream, received: bytes) -> None:
        """Read a request that comes in pieces."""
        try:
            with trio.fail_after(REQUEST_TIMEOUT):
                while (request := parse_whole(received)) is None:
                    data = await stream.receive_some(MOST_BYTES)
                    if not data:
                        raise RemoteProtocolError("the stream ended within its request")
                    received += data
            self._begin(stream, request)
        except RemoteProtocolError as error:
            self._refuse(node, stream, error)
        except trio.TooSlowError:
            self._refuse(node, stream, RemoteProtocolError(f"no request came within {REQUEST_TIMEOUT:g} seconds"))

    def _refuse(self, node: str, stream: YamuxStream, error: RemoteProtocolError) -> None:
        stream.reset()
        line = f"node {node} breaks the protocol: {error}"
        _log_limiter.log(("protocol", node), line, about=about("node_protocol", peer=node, reason=error))

    def _begin(self, stream: YamuxStream, request: Message) -> None:
        stream.acknowledge()
        if request.type == VISIT:
            self._begin_visit(stream, request)
        elif request.type == ORDER:
            tunnel_id, session_id, order = request.text("tunnel"), request.text("session"), parse_order(request)
            self._tasks.start_soon(contain_errors, stream, self._carry_out, stream, tunnel_id, session_id, order)
        elif request.type == GATEWAY and self._serve_gateway is not None:
            wanted = parse_gateway(request)
            stream.put(framed({"type": OPENED}))
            self._tasks.start_soon(contain_errors, stream, self._serve_gateway, stream, wanted)
        else:
            _answer(stream, UNKNOWN)

    def _begin_visit(self, stream: YamuxStream, request: Message) -> None:
        session = self._asked.local(request.text("tunnel"), request.text("session"))
        if session is None:
            _answer(stream, GONE)
            return
        try:
            onward = session.open_stream_nowait()
        except trio.WouldBlock:
            self._tasks.start_soon(contain_errors, stream, self._visit, stream, session)
        except trio.BrokenResourceError:
            _answer(stream, GONE)
        else:
            pump = self._opened(stream, session, onward)
            if self._carrier.takes(pump):
                self._carrier.carry(pump, nothing)
            else:
                self._tasks.start_soon(contain_errors, stream, pump.run)

    async def _visit(self, stream: YamuxStream, session: LiveSession) -> None:
        """A visit of a session that opens no stream at once."""
        try:
            with trio.fail_after(OPEN_TIMEOUT):
                onward = await session.open_stream()
        except trio.TooSlowError:
            stream.reset()
        except GatewayAway:
            _answer(stream, AWAY)
        except trio.BrokenResourceError:
            _answer(stream, GONE)
        else:
            await self._opened(stream, session, onward).run()

    def _opened(self, stream: YamuxStream, session: LiveSession, onward: ByteStream) -> Pump:
        self.total += 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the pump finds out, and resets both
            stream.put(framed(opened_fields(session.services)))
        return Pump(onward, stream)

    async def _carry_out(self, stream: YamuxStream, tunnel_id: str, session_id: str, order: Order | None) -> None:
        if order is None:
            _answer(stream, UNKNOWN)
            return
        done = False
        with trio.move_on_after(ORDER_TIMEOUT):
            done = await self._asked.carry_out(tunnel_id, session_id, order)
        _answer(stream, DONE, done=done)


def _answer(stream: YamuxStream, kind: str, **fields: object) -> None:
    """Answer, and close."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it does not want to know any more
        stream.put(framed({"type": kind} | fields))
    stream.close_soon()
