"""A visitor's TLS, ended in this process: for tunnels whose relay passes it through and cannot read it.

The handshake is made for each visitor in the task that takes care of it, under a deadline, so that whoever does not get
through it, or drags it out, is one visitor's trouble. What the handler is given is a stream like any other, in clear.

Neighbours: `generation` and the command line put it before their handlers, as may any user of `open_tunnel`;
`tls_stream` has the TLS, `certificate` what is presented.
"""

from __future__ import annotations

import logging
import ssl
from typing import Final, final

import attrs
import trio

from .._net.closing import close_after_answer
from .._net.log_limiter import Complaints
from .._net.streams import GuardedStream
from .._net.tls.certificate import Certificate
from .._net.tls.stream import TlsStream
from ..transports.tunnel_stream import Handler, TunnelStream

__all__ = ["terminate_tls"]

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds that a visitor has to agree on TLS."""

_complaints: Final = Complaints(logging.getLogger("pioneer_tunnel.visitor_tls"))


def terminate_tls(handler: Handler, certificate: Certificate) -> Handler:
    """A handler that ends visitors' TLS with `certificate` and gives what they say, in clear, to `handler`.

    The stream that `handler` gets has the visitor's address and says that it came over TLS, also where the relay does
    not tell. A visitor that closes without the goodbye of TLS has ended, as for every web server.

    A visitor that does not agree on TLS within 10 seconds never gets to `handler`; the log tells (INFO).
    """

    async def decrypt(stream: TunnelStream) -> None:
        try:
            visitor = await _decrypted(stream, certificate)
        except trio.BrokenResourceError as error:
            _complaints.tell("turned away", f"{error}; it was turned away", level=logging.INFO)
        else:
            await handler(visitor)

    return decrypt


async def _decrypted(stream: TunnelStream, certificate: Certificate) -> TunnelStream:
    """Make the handshake; `stream` belongs to what is returned, and was closed when this raises.

    Raises:
        trio.BrokenResourceError: it came to nothing.
    """
    try:
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            tls = TlsStream(stream, await certificate.context(), server_side=True, https=True)
            await tls.do_handshake()
            return TunnelStream(_DecryptedStream(tls, stream), attrs.evolve(stream.proxy_header, tls=True))
    except trio.BrokenResourceError as error:
        await close_after_answer(stream)  # the alert that tells the visitor why
        raise trio.BrokenResourceError(f"a visitor from {stream.visitor} and TLS: {_why(error)}") from error
    except BaseException:
        stream.reset()
        raise
    stream.reset()
    raise trio.BrokenResourceError(
        f"a visitor from {stream.visitor} did not agree on TLS within {HANDSHAKE_TIMEOUT:g} seconds"
    )


def _why(error: trio.BrokenResourceError) -> str:
    if isinstance(error.__cause__, ssl.SSLError) and error.__cause__.reason == "HTTP_REQUEST":
        return "what came is HTTP in clear; has the tunnel tls = 'passthrough' at the relay?"
    return str(error)


@final
class _DecryptedStream(GuardedStream):
    """What a visitor says inside its TLS. It keeps the contract of `tunnel_stream.CarriedStream`."""

    def __init__(self, tls: TlsStream, stream: TunnelStream) -> None:
        super().__init__(tls)
        self._stream: Final = stream

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
            self._stream.reset()  # somebody is in the middle of sending, which ends there
            await trio.lowlevel.checkpoint()
