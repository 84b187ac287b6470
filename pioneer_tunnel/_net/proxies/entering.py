"""A tunnel through a proxy: asks the proxy for it, on a connection to the proxy, which then is the tunnel.

After the handshake nothing of the proxy is left between the stream and its socket: a tunnel through an `http` or
`socks5` proxy is the `TcpStream` of the connection, and moves bytes as fast as one to the relay itself.
"""

from __future__ import annotations

import ssl
from typing import Final, final

import attrs
import trio

from ..._model.errors import RelayConnectError
from ..._model.proxies import Proxy
from ..adopted import Watched
from ..tls.handshake import begin_tls
from ..tls.stream import TlsStream
from .choice import ChosenProxy
from .handshake import LONGEST_ANSWER, CredentialsRefused, Handshake, ProxyRefusal
from .socks5 import Socks5

__all__ = ["Via"]

_RECEIVE_SIZE: Final = 4 * 1024


@final
@attrs.frozen
class Via:
    """A proxy that is ready to be used.

    Attributes:
        chosen: the proxy, with its credentials.
        tls: the TLS context for an `https` proxy; None for others.
    """

    chosen: ChosenProxy
    tls: ssl.SSLContext | None = attrs.field(default=None, repr=False)

    @property
    def proxy(self) -> Proxy:
        """The proxy itself."""
        return self.chosen.proxy

    def __str__(self) -> str:
        variable = self.chosen.variable
        return f"the proxy {self.proxy}" if variable is None else f"the proxy {self.proxy} (from {variable})"

    async def enter(self, connection: Watched, host: str, port: int, *, timeout: float) -> Watched | TlsStream:
        """Ask for a tunnel to `host` and `port`, on a connection to the proxy. If this raises, it is closed.

        Args:
            timeout: seconds for each of TLS with the proxy and its answer.

        Raises:
            RelayConnectError: there is no tunnel; the message names the proxy.
        """
        stream: Watched | TlsStream = connection
        try:
            if self.tls is not None:
                stream = await begin_tls(
                    connection,
                    self.tls,
                    host=self.proxy.host,
                    what=str(self),
                    without_tls="A proxy without TLS has a http:// URL",
                    timeout=timeout,
                    https=False,
                )
            await self._ask(stream, host, port, timeout)
        except BaseException:
            await trio.aclose_forcefully(connection)
            raise
        return stream

    def _handshake(self, host: str, port: int) -> Handshake:
        if self.proxy.scheme == "socks5":
            return Socks5(host, port, self.proxy.credentials)
        from .http_connect import HttpConnect  # noqa: PLC0415  # h11 is imported only when it is used

        return HttpConnect(host, port, self.proxy.credentials)

    async def _ask(self, stream: trio.abc.Stream, host: str, port: int, timeout: float) -> None:
        try:
            with trio.fail_after(timeout):
                await _shake_hands(self._handshake(host, port), stream)
        except trio.TooSlowError:
            raise RelayConnectError(
                f"{self} did not make a tunnel within {timeout:g} seconds; does it reach the relay, and is its URL"
                " right (http://, https:// or socks5://)?"
            ) from None
        except CredentialsRefused as refusal:
            advice = f": {self._advice}" if refusal.can_be_given else ""
            # Many a directory locks an account after a few attempts with a wrong password.
            raise RelayConnectError(f"{self} {refusal}{advice}", retry_slowly=True) from refusal
        except ProxyRefusal as refusal:
            raise RelayConnectError(f"{self} {refusal}", retry_after=refusal.retry_after) from refusal
        except trio.BrokenResourceError as error:
            raise RelayConnectError(f"{self} broke the connection before there was a tunnel: {error}") from error

    @property
    def _advice(self) -> str:
        if self.proxy.credentials is not None:
            return "correct the user name or the password"
        if self.chosen.variable is not None:
            return f"write {self.chosen.variable}={self.proxy.scheme}://user:password@…, or configure the proxy"
        return "write the line user:password to a file, and name it in proxy_credentials_file"


async def _shake_hands(handshake: Handshake, stream: trio.abc.Stream) -> None:
    await stream.send_all(handshake.hello)
    received = 0
    while not handshake.done:
        data = await stream.receive_some(_RECEIVE_SIZE)
        if not data:
            raise ProxyRefusal(
                "closed the connection before there was a tunnel; does it let this host in, and is its URL right"
                " (http://, https:// or socks5://)?"
            )
        received += len(data)
        if received > LONGEST_ANSWER:
            raise ProxyRefusal(f"answers with more than {LONGEST_ANSWER} bytes")
        if sends := handshake.receive(bytes(data)):
            await stream.send_all(sends)
    if handshake.surplus:
        raise ProxyRefusal("sent bytes of its own after it had made a tunnel, so it is none; is it a proxy at all?")
