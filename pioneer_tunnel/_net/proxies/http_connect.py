"""The handshake with an HTTP proxy: CONNECT (RFC 9110, 9.3.6), with Basic authentication (RFC 7617). No I/O.

h11 reads the answer, as it stands at any border between pieces, and bounds it.
"""

from __future__ import annotations

import base64
from typing import Final, final

import h11

from ..._model.addresses import bracketed
from ..._model.proxies import ProxyCredentials
from ..._model.retry_after import retry_after_seconds
from ..._model.text import clean_message, cut
from ..._version import __version__
from .handshake import CredentialsRefused, ProxyRefusal

__all__ = ["HttpConnect"]

_LONGEST_HEAD: Final = 16 * 1024
_SHOWN_REASON: Final = 60


@final
class HttpConnect:
    """See `Handshake`.

    Args:
        host, port: of the relay. The proxy resolves the name.
        credentials: for the proxy.
    """

    def __init__(self, host: str, port: int, credentials: ProxyCredentials | None) -> None:
        self._place: Final = f"{bracketed(host)}:{port}"
        self._had_credentials: Final = credentials is not None
        self._exchange: Final = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        headers = [("Host", self._place), ("User-Agent", f"pioneer-tunnel/{__version__}")]
        if credentials is not None:
            token = base64.b64encode(":".join(credentials.reveal()).encode()).decode()
            headers.append(("Proxy-Authorization", f"Basic {token}"))
        request = h11.Request(method="CONNECT", target=self._place, headers=headers)
        self.hello = (self._exchange.send(request) or b"") + (self._exchange.send(h11.EndOfMessage()) or b"")
        self.done = False
        self.surplus = b""
        self._begun = False

    def receive(self, data: bytes) -> bytes:
        """See `Handshake.receive`."""
        if not self._begun:
            self._begun = True
            if data[0] == 5:
                raise ProxyRefusal("answers as a SOCKS5 proxy; is its URL socks5://…?")
            if data[0] in (0x15, 0x16):
                raise ProxyRefusal("speaks TLS; is its URL https://…?")
        try:
            self._exchange.receive_data(data)
            while isinstance(event := self._exchange.next_event(), h11.InformationalResponse):
                pass
        except h11.RemoteProtocolError as error:
            raise ProxyRefusal(f"does not answer as an HTTP proxy: {clean_message(str(error))}") from error
        if isinstance(event, h11.Response):
            if not 200 <= event.status_code < 300:
                raise self._refusal(event)
            self.done = True
            self.surplus = self._exchange.trailing_data[0]
        return b""

    def _refusal(self, answer: h11.Response) -> ProxyRefusal:
        headers: dict[bytes, bytes] = {}
        for name, value in answer.headers:
            headers[name] = headers[name] + b", " + value if name in headers else value
        status = answer.status_code
        said = f"HTTP status {status}"
        if reason := cut(clean_message(answer.reason.decode("latin-1")), _SHOWN_REASON):
            said += f" {reason!r}"
        if status in (407, 401):  # 401 is what tinyproxy says of a wrong password
            return self._wants_credentials(said, headers.get(b"proxy-authenticate", b"").decode("latin-1"))
        retry_after = retry_after_seconds(headers.get(b"retry-after", b"").decode("latin-1"))
        return ProxyRefusal(f"refuses {self._place} with {said}: {_advice(status)}", retry_after=retry_after)

    def _wants_credentials(self, said: str, schemes: str) -> CredentialsRefused:
        if schemes and "basic" not in schemes.lower():
            return CredentialsRefused(
                f"wants credentials ({said}) in a form that is not known here, {cut(clean_message(schemes), 60)!r};"
                " only Basic is: let its operator allow Basic, or run a local proxy that knows that form",
                can_be_given=False,
            )
        if self._had_credentials:
            return CredentialsRefused(f"does not accept the credentials that it was given ({said})")
        return CredentialsRefused(f"wants credentials ({said})")


def _advice(status: int) -> str:
    match status:
        case 403:
            return "its rules forbid that relay or port (many proxies allow port 443 alone); its operator can allow it"
        case 400 | 404 | 405 | 501:
            return "it does not know CONNECT, or not to that port; is it a proxy at all?"
        case 429 | 503:
            return "it is busy, or cannot reach the relay now"
        case 500 | 502 | 504:
            return "it cannot reach the relay: the name does not resolve there, or the relay does not answer it"
        case _ if 300 <= status < 400:
            return "it answers with a redirect; is this network behind a sign-in page (a captive portal)?"
        case _:
            return "its operator knows why"
