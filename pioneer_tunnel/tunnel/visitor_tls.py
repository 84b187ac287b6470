"""Terminates a visitor's TLS in this process, for tunnels whose relay passes TLS through and cannot read it.

The visitor's own task makes the handshake, under a deadline, so a slow or failing handshake affects no other visitor.
The handler gets a decrypted stream.
"""

from __future__ import annotations

import logging
import ssl
from contextlib import suppress
from typing import Final, final

import attrs
import trio

from .._model.log_fields import about
from .._net.closing import close_after_answer
from .._net.leg import Leg
from .._net.log_limiter import LogLimiter
from .._net.prefixed_stream import PrefixedStream
from .._net.streams import GuardedStream
from .._net.tls.by_name import Certificates, answer_challenge, context_for, is_challenge, read_hello
from .._net.tls.certificate import Certificate
from .._net.tls.client_hello import Alert, BadClientHello
from .._net.tls.stream import TlsStream
from ..transports.tunnel_stream import Handler, TunnelStream

__all__ = ["terminate_tls", "with_certificate"]

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds that a handshake may take."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.visitor_tls"))


def terminate_tls(handler: Handler, certificate: Certificate | Certificates) -> Handler:
    """A handler that terminates visitors' TLS with `certificate` and passes the decrypted stream to `handler`.

    In place of a `Certificate` it may be the `Tunnel.certificates` of a tunnel with `acme`.

    That stream has the visitor's address and `tls=True`, also if the relay does not report TLS. EOF without
    `close_notify` counts as EOF, as for every web server.

    A visitor whose handshake fails or takes longer than 10 seconds never reaches `handler`; the log says so (INFO).
    """

    async def decrypt(stream: TunnelStream) -> None:
        try:
            visitor = await _decrypted(stream, certificate)
        except trio.BrokenResourceError as error:
            fields = about("visitor_tls_failed", peer=stream.visitor, reason=error)
            _log_limiter.log("turned away", f"{error}; it was turned away", level=logging.INFO, about=fields)
        else:
            if visitor is not None:
                await handler(visitor)

    return decrypt


def with_certificate(handler: Handler, certificate: Certificate | Certificates | None) -> Handler:
    """`terminate_tls`, where there is a certificate; else `handler` itself."""
    return handler if certificate is None else terminate_tls(handler, certificate)


async def _decrypted(stream: TunnelStream, certificate: Certificate | Certificates) -> TunnelStream | None:
    """Make the handshake. The result owns `stream`; if this raises, `stream` is closed.

    Returns:
        The decrypted stream; None if an ACME authority came, and has seen what it came for.

    Raises:
        trio.BrokenResourceError: the handshake failed or timed out.
    """
    try:
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            if isinstance(certificate, Certificate):
                tls = TlsStream(stream, await certificate.context(), server_side=True, https=True)
            else:
                hello, received = await read_hello(stream)
                begun = PrefixedStream(stream, received)
                if is_challenge(hello):
                    await answer_challenge(begun, hello, certificate)
                    return None
                tls = TlsStream(begun, await context_for(hello, certificate), server_side=True, https=True)
            await tls.do_handshake()
            return TunnelStream(_DecryptedStream(tls, stream), attrs.evolve(stream.proxy_header, tls=True))
    except BadClientHello as error:
        with trio.move_on_after(HANDSHAKE_TIMEOUT), suppress(trio.BrokenResourceError):
            await stream.send_all(error.alert.record)
        await close_after_answer(stream)
        raise trio.BrokenResourceError(f"a visitor from {stream.visitor} and TLS: {_why(error)}") from error
    except trio.BrokenResourceError as error:
        await close_after_answer(stream)  # so that the alert arrives
        raise trio.BrokenResourceError(f"a visitor from {stream.visitor} and TLS: {_why(error)}") from error
    except BaseException:
        stream.reset()
        raise
    stream.reset()
    raise trio.BrokenResourceError(
        f"a visitor from {stream.visitor} did not agree on TLS within {HANDSHAKE_TIMEOUT:g} seconds"
    )


def _why(error: trio.BrokenResourceError | BadClientHello) -> str:
    in_clear = isinstance(error.__cause__, ssl.SSLError) and error.__cause__.reason == "HTTP_REQUEST"
    if in_clear or (isinstance(error, BadClientHello) and error.alert is Alert.UNEXPECTED_MESSAGE):
        return "what came is HTTP in clear; has the tunnel tls = 'passthrough' at the relay?"
    return str(error)


@final
class _DecryptedStream(GuardedStream):
    """The decrypted stream of a visitor. It implements `tunnel_stream.CarriedStream`."""

    def __init__(self, tls: TlsStream, stream: TunnelStream) -> None:
        super().__init__(tls)
        self._stream: Final = stream

    def leg(self) -> Leg | None:
        return None if self._closed or self._end_sent else self.transport_stream.leg()

    @property
    def usable(self) -> bool:
        return not self._closed and self._stream.usable

    def acknowledge(self) -> None:
        self._stream.acknowledge()

    def reset(self) -> None:
        self._closed = True
        self._stream.reset()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            with self._sending:
                await self.transport_stream.aclose()
        except trio.BusyResourceError:
            self._stream.reset()  # another task is sending; the reset ends that
            await trio.lowlevel.checkpoint()
