"""Addresses: what people write in a configuration, read strictly, and what a stream says of its visitor.

`Address` is a host and a port. `RelayAddress` is where a relay listens, from `host:port` or a `ws://` / `wss://` URL,
with the normal form of its name that proofs are bound to (`audience`). Reading is pure: no name is resolved here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal, NoReturn, final

import attrs
import idna

__all__ = ["Address", "RelayAddress"]

_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_PATH: Final = re.compile(r"/[!$&'()*+,;=:@%/A-Za-z0-9._~-]*")
_DEFAULT_PORTS: Final = {"ws": 80, "wss": 443}


@final
@attrs.frozen
class Address:
    """A host, as a name or an IP address without brackets, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `host:port` or `[v6]:port`.

        Raises:
            ValueError: saying what is wrong with which value.
        """
        host, port = _split_host_port(text, text)
        if port is None:
            _refuse(text, "has no port; write host:port")
        return cls(normal_host(host, text), port)

    @property
    def is_ip(self) -> bool:
        """True when the host is an IP address, so that nothing has to be resolved."""
        return is_ip_address(self.host)

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


@final
@attrs.frozen
class RelayAddress:
    """Where a relay listens.

    Attributes:
        scheme: `ws` or `wss` when a URL was given; None for a bare `host:port`.
        host: the name as lower-case A-label without a trailing dot, or a compressed IP address without brackets.
        port: the port, 80 for `ws` and 443 for `wss` when the URL names none.
        path: the URL's path, `/` when it names none.
    """

    scheme: Literal["ws", "wss"] | None
    host: str
    port: int
    path: str = "/"

    @classmethod
    def parse(cls, text: str) -> RelayAddress:
        """Read `host:port`, `[v6]:port`, `ws://host[:port][/path]` or `wss://…`.

        Raises:
            ValueError: saying what is wrong with which value: another scheme, a path on `host:port`, user
                information, a query, a fragment, white space, a port of 0 or over 65535, a bare IPv6 address.
        """
        shown = _without_userinfo(text)
        if not text:
            _refuse(shown, "is empty; write host:port or a ws:// or wss:// URL")
        if any(char.isspace() or ord(char) < 32 or ord(char) == 127 for char in text):
            _refuse(shown, "holds white space or a control character")
        scheme, separator, rest = text.partition("://")
        if not separator:
            if "@" in text:
                _refuse(shown, "holds user information ('…@'), which a relay address has not")
            if "/" in text or "?" in text or "#" in text:
                _refuse(
                    shown,
                    "is host:port with a path, query or fragment; write a ws:// or wss:// URL, or host:port alone",
                )
            address = Address.parse(text)
            return cls(None, address.host, address.port)
        match scheme.lower():
            case "ws" | "wss" as lowered:
                pass
            case _:
                _refuse(shown, f"has the scheme {scheme!r}; allowed are ws and wss")
        for mark, what in (("?", "a query"), ("#", "a fragment")):
            if mark in rest:
                _refuse(shown, f"has {what}, which a relay address has not")
        authority, slash, path = rest.partition("/")
        if "@" in authority:
            _refuse(
                shown,
                "holds user information ('…@'), which a relay address has not; the key goes to the keystore",
            )
        host, port = _split_host_port(authority, shown)
        path = slash + path or "/"
        if not _PATH.fullmatch(path):
            _refuse(shown, "has a path with characters that a URL path does not have; percent-encode them")
        return cls(lowered, normal_host(host, shown), _DEFAULT_PORTS[lowered] if port is None else port, path)

    def with_scheme(self, scheme: Literal["ws", "wss"]) -> RelayAddress:
        """The same place under `scheme`, for a bare `host:port` that a WebSocket is dialled to."""
        return attrs.evolve(self, scheme=scheme)

    @property
    def secure(self) -> bool:
        """True for `wss`."""
        return self.scheme == "wss"

    @property
    def audience(self) -> str:
        """The name that a proof is bound to: host, and `:port` unless it is the scheme's default."""
        host = bracketed(self.host)
        if self.scheme is not None and self.port == _DEFAULT_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.scheme is None:
            return f"{bracketed(self.host)}:{self.port}"
        return f"{self.scheme}://{self.audience}{self.path if self.path != '/' else ''}"


def normal_audience(text: str) -> str:
    """The normal form of a public name, `host` or `host:port`, as it appears in a proof.

    Raises:
        ValueError: saying what is wrong with which value.
    """
    host, port = _split_host_port(text, text)
    normal = bracketed(normal_host(host, text))
    return normal if port is None else f"{normal}:{port}"


def normal_host(host: str, shown: str) -> str:
    """Lower-case A-label without trailing dot, or the compressed IP address; `shown` is what an error quotes.

    Raises:
        ValueError: the host is neither a host name nor an IP address.
    """
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            _refuse(shown, f"has {host!r}, which is not an IPv6 address")
    name = host.lower().removesuffix(".")
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError:
            _refuse(shown, f"has {host!r}, which is not a valid internationalised name")
    if not name:
        _refuse(shown, "has no host")
    if name.replace(".", "").isdigit():
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            _refuse(shown, f"has {host!r}, which is not an IPv4 address")
    if len(name) > 253 or not _NAME.fullmatch(name):
        _refuse(shown, f"has {host!r}, which is not a host name")
    return name


def is_ip_address(host: str) -> bool:
    """True for an IPv4 or IPv6 address without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def bracketed(host: str) -> str:
    """`host` as it stands before a port: an IPv6 address in brackets, anything else as it is."""
    return f"[{host}]" if ":" in host else host


def _split_host_port(text: str, shown: str) -> tuple[str, int | None]:
    """Split at the port; the host keeps its brackets."""
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        if not bracket:
            _refuse(shown, "has '[' without ']'")
        host += bracket
        if rest and not rest.startswith(":"):
            _refuse(shown, f"has {rest!r} after the IPv6 address; write [address]:port")
        separator, port = rest[:1], rest[1:]
    else:
        if text.count(":") > 1:
            _refuse(shown, "has more than one ':'; write an IPv6 address in brackets, [address]:port")
        host, separator, port = text.partition(":")
    if not separator:
        return host, None
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        _refuse(shown, f"has the port {port!r}; allowed are 1 to 65535")
    return host, int(port)


def _without_userinfo(text: str) -> str:
    """What an error may quote: `user:password@` is somebody's secret."""
    return re.sub(r"[^/@]*@", "…@", text)


def _refuse(shown: str, why: str) -> NoReturn:
    raise ValueError(f"the address {shown!r} {why}")
