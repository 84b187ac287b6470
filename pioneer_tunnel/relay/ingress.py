"""The visitors' door: read the first head, find the tunnel by its Host, and pass every byte on as it came.

Neighbours: `server` brings the connections, and `tls_door` those whose TLS passes through; `head` reads; the registry
and the directory are asked; `pump` moves the bytes, of which `framing` says what passes. A visitor that cannot be
passed on gets a plain answer that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, final

import attrs
import trio

from ..address import Address
from ..endings import abandon, close_after_answer
from ..proxy_protocol import ProxyHeader
from ..pump import pump
from .admission import Admission, TurnedAway
from .client_hello import Alert
from .config import TunnelEntry
from .followed_stream import FollowedStream
from .framing import RequestFollower
from .head import BadRequest, HeadReader, RequestHead, error_response
from .limits import RelayLimits
from .registry import Directory, LiveSession, Registry

__all__ = ["IngressDoor", "Visit", "read_head"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds that a request head may take."""

OPEN_TIMEOUT: Final = 10.0
"""Seconds that a gateway has to take a stream."""

_READ_SIZE: Final = 16 * 1024
_BROKE_OFF: Final = error_response(502, "the gateway broke off before it answered")

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
        settle: called when it has shown which tunnel it wants.
    """

    stream: trio.abc.Stream
    visitor: Address | None
    local: Address | None
    tls: bool
    settle: Callable[[], None] = _nobody_waits


class Refusal(Exception):
    """The visitor cannot be passed on: `status` and the exception's text are what it is told."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


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
            raise Refusal(error.status, str(error)) from error
        if not reader.received:
            return None, b""
        raise Refusal(400, "the request ended before its head did")
    raise Refusal(408, f"no whole request head came within {HEAD_TIMEOUT:g} seconds")


async def refuse(stream: trio.abc.Stream, refusal: Refusal) -> None:
    """Tell a visitor why not, and close."""
    with trio.move_on_after(HEAD_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(error_response(refusal.status, str(refusal)))
        await close_after_answer(stream)


@final
class IngressDoor:
    """Passes visitors on to their tunnels.

    Args:
        admission: how many visitors a tunnel may have; by default as many as a relay that is told nothing admits.
    """

    def __init__(self, registry: Registry, directory: Directory, admission: Admission | None = None) -> None:
        self._registry: Final = registry
        self._directory: Final = directory
        self._admission: Final = admission or Admission(RelayLimits())

    async def serve(self, visit: Visit) -> None:
        """Serve a connection whose tunnel is told by its first request."""
        try:
            head, received = await read_head(visit.stream)
            if head is None:
                await visit.stream.aclose()
            else:
                await self.serve_request(visit, head, received)
        except Refusal as refusal:
            await refuse(visit.stream, refusal)

    async def serve_request(self, visit: Visit, head: RequestHead, received: bytes) -> None:
        """Serve a connection whose first head was read; `received` is all that was.

        Raises:
            Refusal: with the answer to give.
        """
        entry = await self._registry.by_host(head.host)
        if entry is None:
            raise Refusal(404, "there is no tunnel for this host")
        if entry.passes_tls:
            # What the relay can read is not for a gateway that takes nothing the relay can read.
            raise Refusal(421, "this host takes TLS alone, from end to end; use https:// and a connection of its own")
        visit.settle()  # only now: who wants what there is not makes way for others while it is told
        afresh: tuple[RequestHead, bytes] | None = (head, received)
        while afresh is not None:
            with self._room(entry):
                afresh = await self._follow(visit, entry, *afresh)

    async def _follow(
        self, visit: Visit, entry: TunnelEntry, head: RequestHead, received: bytes
    ) -> tuple[RequestHead, bytes] | None:
        """Carry the requests from `head` on, up to the end, or to one that needs another stream; returns that one."""
        carried = await self._open(entry)
        follower = RequestFollower(head)
        pieces = follower.feed(received[head.length :])
        with suppress(trio.BrokenResourceError):  # the pump finds the same
            await carried.send_all(b"".join([_proxy_header(visit), received[: head.length], *pieces]))
        followed = FollowedStream(visit.stream, follower, head_timeout=HEAD_TIMEOUT)
        with followed.scope:
            ended_well = await pump(carried, followed, apology=_BROKE_OFF)
            return followed.afresh if ended_well else None
        return None

    async def serve_hello(self, visit: Visit, entry: TunnelEntry, received: bytes) -> None:
        """Serve a connection that belongs to `entry` by its ClientHello, which is in `received`.

        Raises:
            Refusal: the gateway cannot be reached.
        """
        visit.settle()
        with self._room(entry):
            carried = await self._open(entry)
            with suppress(trio.BrokenResourceError):  # the pump finds the same
                await carried.send_all(_proxy_header(visit) + received)
            await pump(carried, visit.stream, apology=Alert.INTERNAL_ERROR.record)

    async def serve_bound(self, visit: Visit, entry: TunnelEntry) -> None:
        """Serve a connection at the address of its own that a tunnel has, whatever it speaks."""
        visit.settle()
        try:
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

    async def _open(self, entry: TunnelEntry) -> trio.abc.HalfCloseableStream:
        tried: LiveSession | None = None
        with trio.move_on_after(OPEN_TIMEOUT):
            while (session := await self._directory.find(entry.id)) is not tried and session is not None:
                try:
                    return await session.open_stream()
                except trio.BrokenResourceError:
                    tried = session  # it ended just now, or hands the tunnel over: to whom, the directory knows
            raise Refusal(503, "the gateway is not connected")
        raise Refusal(504, "the gateway takes no visitors at the moment")


def _proxy_header(visit: Visit) -> bytes:
    return ProxyHeader(visitor=visit.visitor, local=visit.local, tls=visit.tls).encode()
