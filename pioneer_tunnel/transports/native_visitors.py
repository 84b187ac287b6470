"""The visitors of a native session: each stream begins with a PROXY header, and is delivered after that."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from .._model.errors import RemoteProtocolError
from .._model.services import FIRST_SERVICE
from .._wire.proxy_v2 import MAX_LENGTH, ProxyHeader
from ..yamux import YamuxStream
from .counts import TunnelCounts
from .interface import Deliver
from .service_offer import ServiceOffer
from .tunnel_stream import TunnelStream

__all__ = ["receive_visitor"]

HEADER_TIMEOUT: Final = 5.0
"""Seconds that a stream's PROXY header may take."""


def receive_visitor(
    stream: YamuxStream, offer: ServiceOffer, counts: TunnelCounts, deliver: Deliver, header_readers: trio.Nursery
) -> None:
    """Deliver a visitor: now if its whole PROXY header has come, else when the rest of the header comes."""
    try:
        received = stream.receive_nowait(MAX_LENGTH) or b""
    except trio.BrokenResourceError:
        return  # the visitor has already left
    if not _deliver_if_complete(stream, received, offer, counts, deliver):
        header_readers.start_soon(_read_header, stream, received, offer, counts, deliver)


async def _read_header(
    stream: YamuxStream, received: bytes, offer: ServiceOffer, counts: TunnelCounts, deliver: Deliver
) -> None:
    """Wait for the rest of a header. `Limits.unaccepted` bounds how many wait: their streams are not accepted yet."""
    with trio.move_on_after(HEADER_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        # A complete header is never longer than MAX_LENGTH, so this never asks for 0 bytes.
        while more := await stream.receive_some(MAX_LENGTH - len(received)):
            received += more
            if _deliver_if_complete(stream, received, offer, counts, deliver):
                return
    stream.reset()


def _deliver_if_complete(
    stream: YamuxStream, received: bytes, offer: ServiceOffer, counts: TunnelCounts, deliver: Deliver
) -> bool:
    """Deliver `stream`, or reset it when that fails; False when its header is not complete."""
    try:
        parsed = ProxyHeader.parse(received)
    except RemoteProtocolError:
        counts.refusals["bad_header"] += 1
        stream.reset()
        return True
    if parsed is None:
        return False
    header, used = parsed
    if not offer.takes(header):
        counts.refusals["unknown_service"] += 1
        stream.reset()
        return True
    counter = counts.services.of(header.service or FIRST_SERVICE)
    counter.from_visitors.total += len(received) - used
    stream.count_as(counter)
    try:
        deliver(TunnelStream(stream, header, received[used:]))
    except trio.WouldBlock:
        counts.refusals["backlog_full"] += 1
        stream.reset()
    return True
