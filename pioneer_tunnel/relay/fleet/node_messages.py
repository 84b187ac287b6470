"""What nodes say to each other: the greeting of a link, and the request and the answer that a stream begins with.

A message is JSON after its length, two big-endian bytes. All nodes of a fleet belong to one operator, and may have
different versions for a while: unknown fields are ignored, and a request that is not known gets `unknown`.

    greeting       both ends of a new link     {"type":"node","name":NODE,"process":ID}
    visit          a stream to a session       {"type":"visit","tunnel":T,"session":S}
                   `opened`                    {"type":"opened","services":[…]|null}, then the visitor's bytes
                   `gone`, `away`              the session is not there (any more), or has lost its connection
    order          of a session                {"type":"order","tunnel":T,"session":S,"order":KIND,"by":…,"within":…}
                   `done`                      {"type":"done","done":BOOL}
    gateway        a gateway's connection      {"type":"gateway","peer":ADDRESS,"certificate":HEX}
                   `opened`                    then the bytes of the connection, in clear
                   `unknown`                   this node takes none
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ..._model.addresses import Address
from ..._model.errors import RemoteProtocolError
from ..._wire.messages import Message, encode
from ..gateways.other_nodes import PassedGateway
from .peers import Order, OrderKind

__all__ = [
    "AWAY",
    "DONE",
    "GATEWAY",
    "GONE",
    "LENGTH_SIZE",
    "MOST_BYTES",
    "NODE",
    "OPENED",
    "ORDER",
    "UNKNOWN",
    "VISIT",
    "framed",
    "gateway_fields",
    "length_of",
    "opened_fields",
    "order_fields",
    "parse_gateway",
    "parse_message",
    "parse_order",
    "parse_services",
    "parse_whole",
    "visit_fields",
]

NODE: Final = "node"
VISIT: Final = "visit"
ORDER: Final = "order"
GATEWAY: Final = "gateway"
OPENED: Final = "opened"
DONE: Final = "done"
GONE: Final = "gone"
AWAY: Final = "away"
UNKNOWN: Final = "unknown"

MOST_BYTES: Final = 16 * 1024
"""Bytes of a message."""

LENGTH_SIZE: Final = 2

_MOST_SERVICES: Final = 256
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def framed(fields: Mapping[str, Any]) -> bytes:
    """A message with its length before it."""
    text = encode(fields).encode()
    return len(text).to_bytes(LENGTH_SIZE, "big") + text


def length_of(beginning: bytes) -> int:
    """The length of a message, from its first two bytes.

    Raises:
        RemoteProtocolError: it is too long.
    """
    length = int.from_bytes(beginning, "big")
    if length > MOST_BYTES:
        raise RemoteProtocolError(f"a message of {length} bytes; allowed are {MOST_BYTES}")
    return length


def parse_message(text: bytes) -> Message:
    """Read a message without its length.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    try:
        return Message.parse(text.decode())
    except UnicodeDecodeError:
        raise RemoteProtocolError("a message that is not UTF-8") from None


def parse_whole(received: bytes) -> Message | None:
    """Read a message with its length, after which nothing may come yet; None while it is not complete.

    Raises:
        RemoteProtocolError: it is malformed, or more than it has come.
    """
    if len(received) < LENGTH_SIZE:
        return None
    end = LENGTH_SIZE + length_of(received[:LENGTH_SIZE])
    if len(received) > end:
        raise RemoteProtocolError("bytes before the answer")
    return parse_message(received[LENGTH_SIZE:]) if len(received) == end else None


def visit_fields(tunnel_id: str, session_id: str) -> Mapping[str, Any]:
    """The request for a stream to a session."""
    return {"type": VISIT, "tunnel": tunnel_id, "session": session_id}


def opened_fields(services: Any) -> Mapping[str, Any]:
    """The answer when the stream is open. `services` is as of `LiveSession`."""
    return {"type": OPENED, "services": None if services is None else sorted(services)}


def parse_services(opened: Message) -> frozenset[str] | None:
    """The services that an answer names; None if the gateway knows none.

    Raises:
        RemoteProtocolError: they are no list of texts.
    """
    found = opened.fields.get("services")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) > _MOST_SERVICES or not all(isinstance(name, str) for name in found):
        raise RemoteProtocolError("'services' is no list of texts")
    return frozenset(found)


def order_fields(tunnel_id: str, session_id: str, order: Order) -> Mapping[str, Any]:
    """The request to carry out an order."""
    return {
        "type": ORDER,
        "tunnel": tunnel_id,
        "session": session_id,
        "order": str(order.kind),
        "by": order.by,
        "within": order.within,
    }


def parse_order(request: Message) -> Order | None:
    """The order of a request; None if this version does not know it.

    Raises:
        RemoteProtocolError: a field is malformed.
    """
    kind, by, within = request.text("order"), request.text("by", default=""), request.number("within", default=0)
    return Order(OrderKind(kind), by, within) if kind in {*OrderKind} else None


def gateway_fields(request: PassedGateway) -> Mapping[str, Any]:
    """The request to serve a gateway's connection."""
    return {
        "type": GATEWAY,
        "peer": None if request.peer is None else str(request.peer),
        "certificate": None if request.certificate is None else request.certificate.hex(),
    }


def parse_gateway(request: Message) -> PassedGateway:
    """Read such a request.

    Raises:
        RemoteProtocolError: a field is malformed.
    """
    peer, certificate = request.text("peer", default=""), request.text("certificate", default="")
    if certificate and not _HASH.fullmatch(certificate):
        raise RemoteProtocolError("'certificate' is no SHA-256")
    try:
        address = Address.parse(peer, listening=True) if peer else None
    except ValueError:
        raise RemoteProtocolError("'peer' is no address") from None
    return PassedGateway(peer=address, certificate=bytes.fromhex(certificate) or None)
