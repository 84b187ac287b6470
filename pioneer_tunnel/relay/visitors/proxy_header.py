"""Reads the PROXY header that a balancer in front of the relay sends before a visitor's bytes.

Whether a header is expected depends on the address that the kernel names as the peer, and on nothing that was sent:

    a balancer's, see `accept_proxy_from`   a header has to come, of version 1 or 2. Without one the connection is reset
    any other                               no header is read. What looks like one is data from the visitor
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from ..._model.errors import RemoteProtocolError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._net.prefixed_stream import PrefixedStream
from ..._storage.networks import Network, is_within
from ..._wire.proxy_v1 import parse_v1
from ..._wire.proxy_v2 import MAX_LENGTH, ProxyHeader
from ..admission import Arrival, OverLimit
from .visit import Visit

__all__ = ["introduce"]

HEADER_TIMEOUT: Final = 10.0
"""Seconds for a PROXY header."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.server"))


async def introduce(visit: Visit, arrival: Arrival, balancers: Sequence[Network]) -> Visit:
    """Read the PROXY header of a balancer's connection. A connection of anybody else is returned as it is.

    From then on limits per address count the connection for its visitor. A header without a visitor, as health checks
    have it, leaves the balancer as the visitor, without limits per address.

    Args:
        visit: a new connection, from which nothing was read.
        arrival: what counts it.
        balancers: the networks of balancers.

    Raises:
        trio.BrokenResourceError: no header came, or the visitor's address is at a limit. The log says so.
    """
    peer = visit.visitor
    if peer is None or not balancers or not is_within(peer.host, balancers):
        return visit
    try:
        with trio.fail_after(HEADER_TIMEOUT):
            header, rest = await _read(visit.stream)
    except (RemoteProtocolError, trio.TooSlowError) as error:
        why = str(error) or f"none came within {HEADER_TIMEOUT:g} seconds"
        line = f"a connection from {peer.host} needs a PROXY header, and was reset: {why}"
        _log_limiter.log(peer.host, line, about=about("proxy_header_missing", peer=peer, reason=why))
        raise trio.BrokenResourceError(why) from error
    stream = PrefixedStream(visit.stream, rest) if rest else visit.stream
    if header.visitor is None:
        return attrs.evolve(visit, stream=stream, tls=header.tls)
    try:
        arrival.identify(header.visitor.host, trio.current_time())
    except OverLimit as reason:
        arrival.count_refusal(reason.reason)
        fields = about("connection_refused", peer=header.visitor, reason=reason.reason)
        _log_limiter.log(str(reason), f"a connection was turned away: {reason}", about=fields)
        raise trio.BrokenResourceError(str(reason)) from None
    return attrs.evolve(
        visit,
        stream=stream,
        visitor=header.visitor,
        local=header.local or visit.local,
        tls=header.tls,
        source=arrival.source,
    )


async def _read(stream: trio.abc.Stream) -> tuple[ProxyHeader, bytes]:
    """Read a header. Returns it and what was read after it.

    Raises:
        RemoteProtocolError: what came is no header.
        trio.BrokenResourceError: the connection broke, or ended before its first byte.
    """
    received = b""
    while data := await stream.receive_some(MAX_LENGTH):
        received += data
        found = parse_v1(received) if received.startswith(b"P") else ProxyHeader.parse(received)
        if found is not None:
            header, end = found
            return header, received[end:]
    if not received:
        raise trio.BrokenResourceError("the balancer has left")
    raise RemoteProtocolError("the connection ended within it")
