"""TLS of visitors: read the ClientHello, then pass the connection through or end its TLS.

    the name in the ClientHello             then
    belongs to a tunnel with passthrough    the tunnel gets every byte unchanged; TLS ends behind the tunnel, and the
                                            relay has no key to it
    anything else, `ingress_tls` is on      the relay ends TLS with its own certificate, or with that of the name
    anything else, `ingress_tls` is off     a TLS alert, then the end

A visitor of a passthrough tunnel that cannot be served also gets an alert, since it does not understand HTTP yet:
`internal_error` when its gateway cannot be reached, and `access_denied` when the access rules do not admit the
visitor's address. Without TLS at the listener, the alert is `unrecognized_name` when no passthrough tunnel has the
name, and `missing_extension` when there is no name. With TLS there, and automatic certificates, it is
`unrecognized_name` when there is no certificate for the name.

An ACME authority that validates by TLS-ALPN-01 is answered here, unless the name's TLS passes through.
"""

from __future__ import annotations

import logging
import ssl
from contextlib import suppress
from http import HTTPStatus
from typing import Final, final

import attrs
import trio

from ..._model.log_fields import about
from ..._net.closing import close_after_answer
from ..._net.prefixed_stream import PrefixedStream
from ..._net.tls.by_name import Certificates, answer_challenge, context_for, is_challenge, read_hello
from ..._net.tls.certificate import Certificate
from ..._net.tls.client_hello import Alert, BadClientHello, ClientHello, ClientHelloReader, looks_like_tls
from ..._net.tls.stream import TlsServerStream
from ..gateways.registry import Registry, RegistryAway
from ..request_head import Refusal, nothing_came
from .ingress import Ingress
from .passing import Passing, Stage
from .visit import Visit

__all__ = ["SniRouter", "accept_gateway", "accept_tls"]

HELLO_TIMEOUT: Final = 10.0
"""Seconds for a ClientHello."""

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for the rest of a handshake that the relay does itself."""

ALERT_TIMEOUT: Final = 2.0
"""Seconds for sending an alert and closing."""

_READ_SIZE: Final = 2 * 1024
"""Bytes that are parsed before other tasks run. They may be 340 records of one byte each."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.tls_door")


async def accept_tls(stream: trio.abc.Stream, context: ssl.SSLContext) -> TlsServerStream:
    """Do a TLS handshake as the server, and return the stream in clear.

    Raises:
        trio.BrokenResourceError: the handshake failed, or the connection broke.
        trio.TooSlowError: it took longer than `HANDSHAKE_TIMEOUT`.
    """
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            secured = TlsServerStream(stream, context)
            await secured.do_handshake()
    except trio.BrokenResourceError:
        await stream.aclose()  # a FIN, not a RST, so that the alert arrives
        raise
    return secured


async def accept_gateway(stream: trio.abc.Stream, certificate: Certificate | Certificates) -> TlsServerStream | None:
    """Do a TLS handshake at an address for gateways alone.

    Returns:
        The stream in clear. None when an ACME authority came, or when there is no certificate for the name.

    Raises:
        trio.BrokenResourceError, trio.TooSlowError: as `accept_tls`.
    """
    if isinstance(certificate, Certificate):
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            return await accept_tls(stream, await certificate.context())
    try:
        with trio.fail_after(HELLO_TIMEOUT):
            hello, received = await read_hello(stream)
        return await _by_name(PrefixedStream(stream, received), hello, certificate)
    except BadClientHello as error:
        await _send_alert(stream, error.alert)
        return None


async def _by_name(
    stream: trio.abc.Stream, hello: ClientHello, certificate: Certificate | Certificates
) -> TlsServerStream | None:
    with trio.fail_after(HANDSHAKE_TIMEOUT):  # to find the context may take time, too
        if is_challenge(hello) and not isinstance(certificate, Certificate):
            await answer_challenge(stream, hello, certificate)
            return None
        return await accept_tls(stream, await context_for(hello, certificate))


@final
class SniRouter:
    """Routes connections of visitors by the server name (SNI) in their ClientHello.

    Args:
        registry: the route of each name.
        ingress: carries the visitors of passthrough tunnels.
        certificate: the relay's own, or those of each name; None when no listener needs it.
        passing: as of the ingress.
    """

    def __init__(
        self,
        registry: Registry,
        ingress: Ingress,
        certificate: Certificate | Certificates | None,
        passing: Passing | None = None,
    ) -> None:
        self._registry: Final = registry
        self._ingress: Final = ingress
        self._certificate: Final = certificate
        self._passing: Final = passing

    async def route(self, visit: Visit, *, tls: bool) -> Visit | None:
        """Serve a passthrough visitor to its end, or return a visit in clear that the relay itself has to serve.

        Args:
            visit: a new connection, from which nothing was read.
            tls: True at a listener with TLS: anything but TLS is refused. At a listener without TLS, only visitors of
                passthrough tunnels may use TLS.

        Returns:
            The visit in clear. None when the connection was served or refused here, or was passed on.

        Raises:
            trio.BrokenResourceError: the connection broke, or the handshake failed.
            trio.TooSlowError: the visitor was too slow.
        """
        try:
            hello, received = await _read_hello(visit.stream, tls=tls)
        except BadClientHello as error:
            fields = about("client_hello_refused", peer=visit.visitor, reason=error)
            _log.debug("a visitor's ClientHello was refused: %s", error, extra=fields)
            self._ingress.counts.refused("bad_request")
            await _send_alert(visit.stream, error.alert)
            return None
        except Refusal as refusal:
            await self._ingress.refuse(visit, refusal)
            return None
        stream = PrefixedStream(visit.stream, received)
        if hello is None:
            if not tls:
                return attrs.evolve(visit, stream=stream)
            await stream.aclose()
            return None
        try:
            route = None if hello.server_name is None else await self._registry.by_host(hello.server_name)
        except RegistryAway:
            # Not to be opened here: the tunnel may be one whose TLS ends at the gateway.
            self._ingress.counts.refused("registry_away")
            await _send_alert(visit.stream, Alert.INTERNAL_ERROR)
            return None
        if (
            route is not None
            and self._passing is not None
            and visit.connection is not None
            and self._passing.pass_visitor(visit.connection, Stage.HELLO, route, received, visit=visit)
        ):
            return None
        if route is not None and route.passes_tls:
            try:
                await self._ingress.serve_hello(attrs.evolve(visit, tls=True), route, received)
            except Refusal as refusal:
                self._ingress.counts.refused(refusal.reason, route.entry.id)
                alert = Alert.ACCESS_DENIED if refusal.status == HTTPStatus.FORBIDDEN else Alert.INTERNAL_ERROR
                await _send_alert(visit.stream, alert)
        elif tls:
            assert self._certificate is not None  # the configuration was checked for it
            try:
                secured = await _by_name(stream, hello, self._certificate)
            except BadClientHello as error:
                if route is None:
                    self._ingress.counts.refused("unknown_host")
                else:
                    self._ingress.counts.refused("no_certificate", route.entry.id)
                await _send_alert(visit.stream, error.alert)
                return None
            return None if secured is None else attrs.evolve(visit, stream=secured, tls=True)
        else:
            self._ingress.counts.refused("unknown_host")
            alert = Alert.MISSING_EXTENSION if hello.server_name is None else Alert.UNRECOGNIZED_NAME
            await _send_alert(visit.stream, alert)
        return None


async def _read_hello(stream: trio.abc.Stream, *, tls: bool) -> tuple[ClientHello | None, bytes]:
    """Read a ClientHello.

    Args:
        tls: True when nothing but a ClientHello is expected.

    Returns:
        The ClientHello, and all bytes that were read. None in its place when the visitor ended the connection, or when
        `tls` is False and the first bytes are not TLS.

    Raises:
        BadClientHello: with the alert to send.
        Refusal: nothing came in time, and the visitor may expect HTTP.
        trio.BrokenResourceError: the connection broke.
        trio.TooSlowError: the ClientHello did not come in time.
    """
    reader = ClientHelloReader()
    with trio.move_on_after(HELLO_TIMEOUT):
        while data := await stream.receive_some(_READ_SIZE):
            if not tls and not reader.received and not looks_like_tls(data):
                return None, bytes(data)
            hello = reader.feed(data)
            if hello is not None:
                return hello, reader.received
        return None, b""
    if tls or reader.received:
        raise trio.TooSlowError
    raise nothing_came(HELLO_TIMEOUT)


async def _send_alert(stream: trio.abc.Stream, alert: Alert) -> None:
    """Send a TLS alert, and close. Takes at most `ALERT_TIMEOUT` seconds."""
    with trio.move_on_after(ALERT_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(alert.record)
        await close_after_answer(stream)
