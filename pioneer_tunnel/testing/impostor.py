"""The peer of a connection whose set-up fails: a captive portal, a proxy, a relay that stalls or rejects.

It uses the relay's own code for TLS, HTTP and the handshake, so its bytes are those of a real relay up to the fault.
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
"""The faults that are made by the peer, not by the network."""

IMPOSTORS: Final = (BadTls, CaptivePortal, Unavailable, StallAt, Reject)

_TLS_ALERT: Final = bytes.fromhex("15 0303 0002 02 28")
"""A record of TLS 1.2: fatal, handshake_failure."""

_SIGN_IN: Final = b"<html><title>Welcome to our network</title><p>Please sign in.</html>"


async def secured(connected: trio.abc.Stream, certificate: Certificate | None) -> tuple[trio.abc.Stream, Watched]:
    """Accept TLS if there is a certificate. Returns the stream, and the watched stream below it.

    Raises:
        trio.BrokenResourceError: the TLS handshake failed.
        trio.TooSlowError: the TLS handshake timed out.
    """
    watched = watch(connected)
    if certificate is None:
        return watched, watched
    return await accept_tls(watched, await certificate.context()), watched


async def impersonate(
    fault: Impostor, connected: trio.abc.Stream, *, relay_id: str, certificate: Certificate | None
) -> None:
    """Act out `fault` on a connection, until the gateway closes it or has its answer.

    Args:
        fault: the fault.
        connected: the connection from the gateway.
        relay_id: the relay's name in its challenge.
        certificate: the relay's certificate for TLS; None for no TLS.

    Raises:
        trio.BrokenResourceError: the gateway closed the connection.
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
    """The relay's part of the handshake, up to the fault."""
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
            # No deadline: the gateway has one, and closes the connection.
            await websocket.receive()


async def _listen(stream: trio.abc.Stream) -> None:
    # No deadline: the gateway has one, and closes the connection.
    while await stream.receive_some():
        pass
