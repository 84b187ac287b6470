"""The handshake with a SOCKS5 proxy (RFC 1928), with user name and password (RFC 1929). No I/O.

The proxy gets the relay's name and resolves it: this host asks no name server.

    expects                  when it has come, we send
    METHOD                   the user name and the password, or the request
    CREDENTIALS_TAKEN        the request
    REPLY                    nothing: the tunnel is there
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from typing import Final, final

from ..._model.addresses import bracketed, is_ip_address
from ..._model.proxies import ProxyCredentials
from .handshake import CredentialsRefused, ProxyRefusal

__all__ = ["Socks5"]

_VERSION: Final = 5
_ANONYMOUS, _PASSWORD, _NONE_ACCEPTABLE = 0, 2, 0xFF
_CONNECT: Final = b"\x05\x01\x00"
_V4, _NAME, _V6 = 1, 3, 4
_REFUSALS: Final[Mapping[int, str]] = {
    1: "it has failed (reply 1), and does not say why; it may not be able to resolve the relay's name",
    2: "its rules forbid that relay or port (reply 2); its operator can allow it",
    3: "the relay's network cannot be reached from there (reply 3)",
    4: "the relay cannot be reached from there (reply 4); its name may not resolve there",
    5: "the relay refuses the connection (reply 5)",
    6: "the relay does not answer it (reply 6)",
    7: "it does not know CONNECT (reply 7)",
    8: "it does not take names or addresses like the relay's (reply 8)",
}


class _Expected(enum.Enum):
    METHOD = "which of the offered methods it takes"
    CREDENTIALS_TAKEN = "whether it takes the credentials"
    REPLY = "whether it has connected"


@final
class Socks5:
    """See `Handshake`.

    Args:
        host, port: of the relay. The proxy resolves the name.
        credentials: for the proxy.
    """

    def __init__(self, host: str, port: int, credentials: ProxyCredentials | None) -> None:
        self._place: Final = f"{bracketed(host)}:{port}"
        self._request: Final = _CONNECT + _address(host) + port.to_bytes(2, "big")
        self._credentials: Final = credentials
        self._methods: Final = [_ANONYMOUS] if credentials is None else [_ANONYMOUS, _PASSWORD]
        self._expected = _Expected.METHOD
        self.hello = bytes([_VERSION, len(self._methods), *self._methods])
        self.done = False
        self.surplus = b""

    def receive(self, data: bytes) -> bytes:
        """See `Handshake.receive`."""
        self.surplus += data
        sends = b""
        while not self.done and (message := self._next_message()):
            match self._expected:
                case _Expected.METHOD:
                    sends += self._take_method(message[1])
                case _Expected.CREDENTIALS_TAKEN:
                    if message[1]:
                        raise CredentialsRefused("does not accept the credentials that it was given")
                    sends += self._ask()
                case _Expected.REPLY:
                    if message[1]:
                        why = _REFUSALS.get(message[1], f"it gives the unknown reply {message[1]}")
                        raise ProxyRefusal(f"does not connect to {self._place}: {why}")
                    self.done = True
        return sends

    def _next_message(self) -> bytes:
        """Take the expected message from what has come; b"" while it is incomplete."""
        received = self.surplus
        versions = (_VERSION,) if self._expected is not _Expected.CREDENTIALS_TAKEN else (1, _VERSION)
        if received and received[0] not in versions:
            if received[:1] == b"H":
                raise ProxyRefusal("answers in HTTP; is its URL http://…?")
            raise ProxyRefusal("does not answer as a SOCKS5 proxy")
        length = 2
        if self._expected is _Expected.REPLY and len(received) >= 2 and not received[1]:
            if len(received) < 5:
                return b""
            sizes = {_V4: 4, _NAME: 1 + received[4], _V6: 16}
            if received[3] not in sizes:
                raise ProxyRefusal("does not answer as a SOCKS5 proxy")
            length = 4 + sizes[received[3]] + 2
        if len(received) < length:
            return b""
        self.surplus = received[length:]
        return received[:length]

    def _take_method(self, method: int) -> bytes:
        if method == _ANONYMOUS:
            return self._ask()
        if method == _PASSWORD and self._credentials is not None:
            self._expected = _Expected.CREDENTIALS_TAKEN
            user, password = (part.encode() for part in self._credentials.reveal())
            return bytes([1, len(user)]) + user + bytes([len(password)]) + password
        if method in (_PASSWORD, _NONE_ACCEPTABLE):
            if self._credentials is None:
                raise CredentialsRefused("wants credentials")
            raise CredentialsRefused("takes neither a user name with a password nor no credentials", can_be_given=False)
        raise ProxyRefusal("asks for a way to authenticate that was not offered")

    def _ask(self) -> bytes:
        self._expected = _Expected.REPLY
        return self._request


def _address(host: str) -> bytes:
    if not is_ip_address(host):
        name = host.encode("ascii")
        return bytes([_NAME, len(name)]) + name
    address = ipaddress.ip_address(host)
    return bytes([_V4 if address.version == 4 else _V6]) + address.packed
