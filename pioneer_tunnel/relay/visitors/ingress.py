"""The visitors' door: read the first head, find the tunnel by its Host, and pass every byte on as it came.

Neighbours: `server` brings the connections, and `tls_door` those whose TLS passes through; `head` reads; the registry
and the directory are asked; `pump` moves the bytes, of which `framing` says what passes. A visitor that cannot be
passed on gets a plain answer that says why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, final

import attrs
import trio

from ..._http.head import BadRequest, HeadReader, RequestHead, error_response
from ..._model.addresses import Address
from ..._net.adopted import adopt
from ..._net.closing import abandon, close_after_answer
from ..._net.streams import ByteStream
from ..._net.tls.client_hello import Alert
from ..._wire.proxy_v2 import ProxyHeader
from ...exchange.pump import pump
from ..admission import Admission, TurnedAway
from ..config import TunnelEntry
from ..gateways.registry import Directory, LiveSession, Registry
from ..limits import RelayLimits
from .followed_stream import FollowedStream
from .turns import Turn, Turns

__all__ = ["IngressDoor", "Visit", "read_head"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds that a request head may take."""

OPEN_TIMEOUT: Final = 10.0
"""Seconds that a gateway has to take a stream."""

_READ_SIZE: Final = 16 * 1024
_BROKE_OFF: Final = "the gateway broke off before it answered"

_log: Final = logging.getLogger("pioneer_tunnel.relay.ingress")


def _nobody_waits() -> None:
    """For whoever does not care."""


@final
@attrs.frozen(kw_only=True)
class Visit:
    """A visitor's connection.

    Attributes:
        stream: what to speak over.
        visitor: where it comes from; None where nobody can tell.
        local: where it arrived.
        tls: whether it came over TLS.
        source: the address that it counts for; None when no limit per address holds for it.
        settle: called when it has shown which tunnel it wants; raises `TurnedAway` when there are too many visitors.
    """

    stream: ByteStream = attrs.field(converter=adopt)
    visitor: Address | None
    local: Address | None
    tls: bool
    source: str | None = None
    settle: Callable[[], None] = _nobody_waits


class Refusal(Exception):
    """The visitor cannot be passed on: `status` and the exception's text are what it is told.

    Attributes:
        omit_body: True when the request is a HEAD, whose response has no body.
    """

    def __init__(self, status: int, text: str, *, omit_body: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.omit_body = omit_body

    @classmethod
    def of(cls, request: BadRequest) -> Refusal:
        return cls(request.status, request.reason, omit_body=request.omit_body)


async def read_head(stream: trio.abc.Stream) -> tuple[RequestHead | None, bytes]:
    """Read a request head, and what came with it; None instead when the visitor left without a word.

    Raises:
        Refusal: with the answer to give.
        trio.BrokenResourceError: the connection broke.
    """
    reader = HeadReader()
    with trio.move_on_after(HEAD_TIMEOUT):
        try:
            while data := await stream.receive_some(_READ_SIZE):
                head = reader.feed(data)
                if head is not None:
                    return head, reader.received
        except BadRequest as error:
            raise Refusal.of(error) from error
        if not reader.received:
            return None, b""
        raise Refusal(400, "the request ended before its head did", omit_body=reader.omit_body)
    raise Refusal(408, f"no whole request head came within {HEAD_TIMEOUT:g} seconds", omit_body=reader.omit_body)


async def refuse(stream: trio.abc.Stream, refusal: Refusal) -> None:
    """Tell a visitor why not, and close."""
    with trio.move_on_after(HEAD_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(error_response(refusal.status, str(refusal), omit_body=refusal.omit_body))
        await close_after_answer(stream)


@final
class IngressDoor:
    """Passes visitors on to their tunnels.

    Args:
        admission: how many visitors a tunnel may have; by default as many as `limits` say.
        limits: how long connections may be kept; by default the limits of a relay without a table of them.
    """

    def __init__(
        self,
        registry: Registry,
        directory: Directory,
        admission: Admission | None = None,
        *,
        limits: RelayLimits | None = None,
    ) -> None:
        limits = limits or RelayLimits()
        self._registry: Final = registry
        self._directory: Final = directory
        self._admission: Final = admission or Admission(limits)
        self._turns: Final = Turns()
        self._keep_alive_timeout: Final = limits.keep_alive_timeout_ms / 1000 or math.inf

    async def serve(self, visit: Visit) -> None:
        """Serve a connection whose tunnel is told by its first request."""
        try:
            head, received = await read_head(visit.stream)
        except Refusal as refusal:
            await refuse(visit.stream, refusal)
        else:
            if head is None:
                await visit.stream.aclose()
            else:
                await self.serve_request(visit, head, received)

    async def serve_request(self, visit: Visit, head: RequestHead, received: bytes) -> None:
        """Serve a connection whose first head was read; `received` is all that was."""
        request: tuple[RequestHead, bytes] | None = (head, received)
        while request is not None:
            head, received = request
            try:
                followed = await self._pass_on(visit, head, received)
            except Refusal as refusal:
                refusal.omit_body = head.omit_body
                await refuse(visit.stream, refusal)
                return
            if not followed.handed_over or followed.scope.cancelled_caught:
                return
            if followed.refusal is not None:
                await refuse(visit.stream, Refusal.of(followed.refusal))
                return
            request = followed.next_request
        await close_after_answer(visit.stream)  # it was kept between requests for too long

    async def _pass_on(self, visit: Visit, head: RequestHead, received: bytes) -> FollowedStream:
        """Carry the request that `head` begins to its tunnel, and those after it that may use the same stream.

        Raises:
            Refusal: with the answer to give.
        """
        entry = await self._registry.by_host(head.host)
        if entry is None:
            raise Refusal(404, "there is no tunnel for this host")
        if entry.passes_tls:
            # What the relay can read is not for a gateway that takes nothing the relay can read.
            raise Refusal(421, "this host takes TLS alone, from end to end; use https:// and a connection of its own")
        _settle(visit)  # only now: who wants what there is not makes way for others while it is told
        followed = FollowedStream(
            visit.stream,
            head,
            received[head.length :],
            Turn(self._turns, entry.id, visit.source),
            head_timeout=HEAD_TIMEOUT,
            keep_alive_timeout=self._keep_alive_timeout,
        )
        with self._room(entry):
            carried = await self._open(entry)
            with suppress(trio.BrokenResourceError):  # the pump finds the same
                await carried.send_all(b"".join([_proxy_header(visit), received[: head.length], *followed.take()]))
            with followed.scope:
                apology = error_response(502, _BROKE_OFF, omit_body=head.omit_body)
                await pump(carried, followed, apology=apology)
        return followed

    async def serve_hello(self, visit: Visit, entry: TunnelEntry, received: bytes) -> None:
        """Serve a connection that belongs to `entry` by its ClientHello, which is in `received`.

        Raises:
            Refusal: the gateway cannot be reached, or there are too many visitors.
        """
        _settle(visit)
        with self._room(entry):
            carried = await self._open(entry)
            with suppress(trio.BrokenResourceError):  # the pump finds the same
                await carried.send_all(_proxy_header(visit) + received)
            await pump(carried, visit.stream, apology=Alert.INTERNAL_ERROR.record)

    async def serve_bound(self, visit: Visit, entry: TunnelEntry) -> None:
        """Serve a connection at the address of its own that a tunnel has, whatever it speaks."""
        try:
            _settle(visit)
            with self._room(entry):
                carried = await self._open(entry)
                with suppress(trio.BrokenResourceError):  # the pump finds the same
                    await carried.send_all(_proxy_header(visit))
                await pump(carried, visit.stream)
        except Refusal:
            await abandon(visit.stream)

    @contextmanager
    def _room(self, entry: TunnelEntry) -> Iterator[None]:
        """What it takes to carry one more visitor.

        Raises:
            Refusal: there is none.
        """
        try:
            with self._admission.visit(entry.id, trio.current_time()):
                yield
        except TurnedAway as reason:
            raise Refusal(503, str(reason)) from None

    async def _open(self, entry: TunnelEntry) -> ByteStream:
        tried: LiveSession | None = None
        with trio.move_on_after(OPEN_TIMEOUT):
            while (session := await self._directory.find(entry.id)) is not tried and session is not None:
                try:
                    return await session.open_stream()
                except trio.BrokenResourceError:
                    tried = session  # it ended just now, or hands the tunnel over: to whom, the directory knows
            raise Refusal(503, "the gateway is not connected")
        raise Refusal(504, "the gateway takes no visitors at the moment")


def _settle(visit: Visit) -> None:
    """Count it among the visitors.

    Raises:
        Refusal: there are too many.
    """
    try:
        visit.settle()
    except TurnedAway as reason:
        raise Refusal(503, str(reason)) from None


def _proxy_header(visit: Visit) -> bytes:
    return ProxyHeader(visitor=visit.visitor, local=visit.local, tls=visit.tls).encode()
