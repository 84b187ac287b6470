"""Who answers in a relay's place, or is a relay that says no: the other end of the faults of an opening.

Neighbours: `faults` says which; `FaultyDialer` puts it at the other end of a connection. What it says is made by the
same rooms that a real relay is made of, so it is right byte for byte.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import trio

from .._net.adopted import Watched, watch
from .._net.closing import close_after_answer
from .._net.prefixed_stream import PrefixedStream
from .._net.tls.certificate import Certificate
from .._wire.handshake import SUBPROTOCOL, Rejection, RelayHandshake
from ..relay.request_head import read_head
from ..relay.visitors.tls import accept_tls
from ..websocket import Opening, load_engine
from .faults import BadTls, CaptivePortal, Reject, Stage, StallAt, Unavailable

__all__ = ["IMPOSTORS", "Impostor", "impersonate", "secured"]

Impostor: TypeAlias = BadTls | CaptivePortal | Unavailable | StallAt | Reject
"""The faults that are somebody else at the other end."""

IMPOSTORS: Final = (BadTls, CaptivePortal, Unavailable, StallAt, Reject)

_TLS_ALERT: Final = bytes.fromhex("15 0303 0002 02 28")
"""A record of TLS 1.2: fatal, handshake_failure."""

_SIGN_IN: Final = b"<html><title>Welcome to our network</title><p>Please sign in.</html>"


async def secured(connected: trio.abc.Stream, certificate: Certificate | None) -> tuple[trio.abc.Stream, Watched]:
    """A relay's end of a connection, inside TLS when there is a certificate; and the watched stream at its bottom.

    Raises:
        trio.BrokenResourceError: TLS came to nothing.
        trio.TooSlowError: it took too long.
    """
    watched = watch(connected)
    return (watched if certificate is None else await accept_tls(watched, certificate)), watched


async def impersonate(
    fault: Impostor, connected: trio.abc.Stream, *, relay_id: str, certificate: Certificate | None
) -> None:
    """Be what `fault` says to a gateway that has connected, until it goes away or was told.

    Args:
        relay_id: the relay's name in its challenge.
        certificate: what the relay ends TLS with; None when it has none.

    Raises:
        trio.BrokenResourceError: the gateway is gone.
    """
    match fault:
        case BadTls():
            await connected.receive_some()
            await connected.send_all(_TLS_ALERT)
            await close_after_answer(connected)
            return
        case StallAt(stage=Stage.FIRST_BYTE):
            await _listen(connected)
            return
    stream, _ = await secured(connected, certificate)
    head, received = await read_head(stream)
    if head is None:
        return
    match fault:
        case CaptivePortal(status=status):
            await _answer(stream, status, {"Location": "http://portal.test/sign-in"} if 300 <= status < 400 else {})
        case Unavailable(retry_after=retry_after):
            await _answer(stream, 503, {} if retry_after is None else {"Retry-After": str(retry_after)})
        case StallAt(stage=Stage.UPGRADE):
            await _listen(stream)
        case StallAt() | Reject():
            await _open(fault, PrefixedStream(stream, received), relay_id)


async def _answer(stream: trio.abc.Stream, status: int, headers: dict[str, str]) -> None:
    fields = {"Content-Type": "text/html", "Content-Length": str(len(_SIGN_IN)), "Connection": "close"} | headers
    head = "\r\n".join(
        [f"HTTP/1.1 {status} As You See", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    )
    await stream.send_all(head.encode() + _SIGN_IN)
    await close_after_answer(stream)


async def _open(fault: StallAt | Reject, stream: trio.abc.Stream, relay_id: str) -> None:
    """The opening as a relay does it, up to where it does not."""
    handshake = RelayHandshake(relay_id, public_names=())
    async with load_engine().accept(stream, Opening(subprotocol=SUBPROTOCOL)) as websocket:
        if isinstance(fault, Reject) or fault.stage is Stage.WELCOME:
            await websocket.send([handshake.challenge])
            await websocket.receive()
        if isinstance(fault, Reject):
            wait = None if fault.retry_after is None else round(fault.retry_after * 1000)
            rejection = Rejection(fault.reason, "as the plan has it", retry_after_ms=wait)
            await websocket.send([rejection.text])
            await websocket.close(1008, rejection.reason)
            return
        while True:
            # No deadline: the gateway has one, and goes away.
            await websocket.receive()


async def _listen(stream: trio.abc.Stream) -> None:
    # No deadline: the gateway has one, and goes away.
    while await stream.receive_some():
        pass
