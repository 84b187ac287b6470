"""Before a visitor's TLS is ended: whose is it to end? The ClientHello says, and the relay reads no further than that.

A name that belongs to a tunnel with `tls = "passthrough"` goes through it, byte for byte as it came, and its TLS is
ended by whoever stands at the other end. The relay has no key to it. For every other name the relay ends the TLS
itself, where the door has TLS, with a certificate that is as new as its files. What a visitor gets who cannot be served
is an alert of TLS, then the end: `unrecognized_name` when no tunnel has the name, `missing_extension` when there is no
name, `internal_error` when the gateway is not there. It would not understand HTTP.

Neighbours: `server` brings the connections and takes back those that are the relay's to read; `client_hello` reads;
`ingress` has the way to the gateway.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final, final

import attrs
import trio

from ..._net.closing import close_after_answer
from ..._net.prefixed_stream import PrefixedStream
from ..._net.tls.certificate import Certificate
from ..._net.tls.client_hello import Alert, BadClientHello, ClientHello, ClientHelloReader, looks_like_tls
from ..._net.tls.stream import TlsServerStream
from ..gateways.registry import Registry
from .ingress import IngressDoor, Refusal, Visit, refuse

__all__ = ["TlsDoor", "end_tls"]

HELLO_TIMEOUT: Final = 10.0
"""Seconds that a ClientHello may take."""

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for the rest of the handshake, when it is the relay's."""

ALERT_TIMEOUT: Final = 2.0
"""Seconds for an alert to leave."""

_READ_SIZE: Final = 2 * 1024
"""Bytes that are parsed before other tasks run. They may be 340 records, of a byte each."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.tls_door")


async def end_tls(stream: trio.abc.Stream, certificate: Certificate) -> TlsServerStream:
    """Do the server's part of a handshake; what is read from the result is in clear.

    Raises:
        trio.BrokenResourceError: it came to nothing, or the connection broke.
        trio.TooSlowError: it took too long.
    """
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            secured = TlsServerStream(stream, await certificate.context())
            await secured.do_handshake()
    except trio.BrokenResourceError:
        await stream.aclose()  # in good order, so that the alert arrives
        raise
    return secured


@final
class TlsDoor:
    """Parts the visitors whose TLS is the relay's to end from those whose is not.

    Args:
        registry: which tunnels there are.
        ingress: passes visitors on.
        certificate: what TLS is ended with; None at a door without TLS of its own.
    """

    def __init__(self, registry: Registry, ingress: IngressDoor, certificate: Certificate | None) -> None:
        self._registry: Final = registry
        self._ingress: Final = ingress
        self._certificate: Final = certificate

    async def admit(self, visit: Visit, *, tls: bool) -> Visit | None:
        """Let a connection in: as one that the relay can read, or None when it was passed through or turned away.

        Args:
            visit: of which nothing was read yet.
            tls: whether this door speaks TLS, and nothing else. If not, only what passes through it is TLS.

        Raises:
            trio.BrokenResourceError: the connection broke, or TLS came to nothing.
            trio.TooSlowError: the visitor took too long over it.
        """
        try:
            hello, received = await _read_hello(visit.stream, must=tls)
        except BadClientHello as error:
            _log.debug("a visitor's ClientHello was refused: %s", error)
            await _say(visit.stream, error.alert)
            return None
        except Refusal as refusal:
            await refuse(visit.stream, refusal)
            return None
        stream = PrefixedStream(visit.stream, received)
        if hello is None:
            if not tls:
                return attrs.evolve(visit, stream=stream)
            await stream.aclose()
            return None
        entry = None if hello.server_name is None else await self._registry.by_host(hello.server_name)
        if entry is not None and entry.passes_tls:
            try:
                await self._ingress.serve_hello(attrs.evolve(visit, tls=True), entry, received)
            except Refusal:
                await _say(visit.stream, Alert.INTERNAL_ERROR)
        elif tls:
            assert self._certificate is not None  # a door without one has no TLS of its own
            return attrs.evolve(visit, stream=await end_tls(stream, self._certificate), tls=True)
        else:
            await _say(visit.stream, Alert.MISSING_EXTENSION if hello.server_name is None else Alert.UNRECOGNIZED_NAME)
        return None


async def _read_hello(stream: trio.abc.Stream, *, must: bool) -> tuple[ClientHello | None, bytes]:
    """Read a ClientHello, and what came with it.

    None in its place when the visitor left, or, unless it `must` be one, began with something else.

    Raises:
        BadClientHello: with the alert to give.
        Refusal: with the answer to give to a visitor who may as well be one of HTTP.
        trio.BrokenResourceError: the connection broke.
        trio.TooSlowError: it did not come in time.
    """
    reader = ClientHelloReader()
    with trio.move_on_after(HELLO_TIMEOUT):
        while data := await stream.receive_some(_READ_SIZE):
            if not must and not reader.received and not looks_like_tls(data):
                return None, bytes(data)
            hello = reader.feed(data)
            if hello is not None:
                return hello, reader.received
        return None, b""
    if must or reader.received:
        raise trio.TooSlowError
    raise Refusal(408, f"nothing came within {HELLO_TIMEOUT:g} seconds")


async def _say(stream: trio.abc.Stream, alert: Alert) -> None:
    """Tell a visitor why not, in the words of TLS, and close."""
    with trio.move_on_after(ALERT_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(alert.record)
        await close_after_answer(stream)
