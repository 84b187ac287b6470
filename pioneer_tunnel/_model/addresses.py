"""Addresses: strict parsing of what people write in a configuration. No name is resolved here.

`Address` is a host and a port. `RelayAddress` is where a relay listens: `host:port` or a `ws://` / `wss://` URL. Its
`audience` is the normal form of the name, which proofs are bound to. `PublicUrl` is where visitors reach a tunnel.
`LocalAddress` is where a local server listens: an `Address`, or a `UnixAddress`, or an `HttpsAddress`.

An error quotes the whole value once, without user information and query (`quotable`). It never quotes a part of the
value: a part of a mistyped `user:password@host` may be the password.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar, final

import attrs
import idna

__all__ = [
    "Address",
    "HttpsAddress",
    "LocalAddress",
    "PublicUrl",
    "RelayAddress",
    "UnixAddress",
    "local_address",
]

_WILDCARD: Final = "*."
_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
# What inet_aton, and so a resolver, accepts as a number of an IPv4 address: 0x7f.1 would be 127.0.0.1.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PATH: Final = re.compile(r"/(?:[!$&'()*+,;=:@/A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})*")
_AUTHORITY_END: Final = re.compile(r"[/?#]")
_USERINFO: Final = re.compile(r"\A((?:wss?|https?|socks5?h?)://)?.*@", re.IGNORECASE | re.DOTALL)
_QUERY: Final = re.compile(r"([?#]).+", re.DOTALL)
_V4_MAPPED: Final = "::ffff:"
_HOST: Final = re.compile(r"[^\s\[\]/@?#]+")
_MAX_HOST: Final = 253
_RELAY_PORTS: Final[Mapping[Literal["ws", "wss"], int]] = {"ws": 80, "wss": 443}
_PUBLIC_PORTS: Final[Mapping[Literal["http", "https"], int]] = {"http": 80, "https": 443}
_UNIX: Final = "unix:"
_LONGEST_PATH: Final = 107
"""Bytes of a Unix socket's path, as Linux allows. Other systems allow 103, and refuse longer ones themselves."""

_set: Final = object.__setattr__
"""Sets an attribute of a frozen class."""

_Scheme = TypeVar("_Scheme", bound=str)


def _check_host(_instance: object, _field: object, value: Any) -> None:
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise ValueError(f"{value!r} is no host; write a name, or an IP address without brackets")


def _check_port(_instance: object, _field: object, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 65535:
        raise ValueError(f"{value!r} is no port; allowed is a whole number from 0 to 65535")


@final
@attrs.frozen
class Address:
    """A host, as a name or an IP address without brackets, and a port from 0 to 65535.

    Raises:
        ValueError: the host has characters that no host has, or the port is out of range.
    """

    host: str = attrs.field(validator=_check_host)
    port: int = attrs.field(validator=_check_port)

    @classmethod
    def parse(cls, text: str, *, listening: bool = False) -> Address:
        """Read `host:port` or `[v6]:port`.

        Args:
            listening: allow port 0, which means any free port.

        Raises:
            ValueError: with the value and what is wrong with it.
        """
        shown = quotable(text)
        if "@" in text:
            _refuse(shown, "holds user information ('…@'); write host:port")
        host, port = _split_host_port(text, shown, lowest_port=0 if listening else 1)
        if port is None:
            _refuse(shown, "has no port; write host:port")
        return cls(normal_host(host, shown), port)

    @classmethod
    def of_socket(cls, name: tuple[Any, ...]) -> Address:
        """The address that `getpeername` or `getsockname` of a TCP socket returned.

        A socket that listens for both families names an IPv4 peer `::ffff:a.b.c.d`. That becomes plain IPv4, so that a
        peer's address does not depend on the socket that it came to.
        """
        host, port, *_ = name
        # Without the validators: the kernel writes no wrong address, and each connection has two.
        address = cls.__new__(cls)
        _set(address, "host", host.removeprefix(_V4_MAPPED) if ":" in host and "." in host else host)
        _set(address, "port", port)
        return address

    @property
    def is_ip(self) -> bool:
        """True when the host is an IP address, which needs no name resolution."""
        return is_ip_address(self.host)

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


def _check_path(_instance: object, _field: object, value: Any) -> None:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{value!r} is no absolute path of a Unix socket; write unix:/path/to/socket")
    if len(value.encode(errors="surrogateescape")) > _LONGEST_PATH:
        raise ValueError(f"{value!r} is too long; the path of a Unix socket has at most {_LONGEST_PATH} bytes")


@final
@attrs.frozen
class UnixAddress:
    """The Unix socket of a local server, written `unix:/path/to/socket`.

    Attributes:
        path: absolute, at most 107 bytes.

    Raises:
        ValueError: the path is not absolute, is too long, or has a NUL.
    """

    path: str = attrs.field(validator=_check_path)

    @classmethod
    def parse(cls, text: str) -> UnixAddress:
        """Read `unix:/path/to/socket`.

        Raises:
            ValueError: with the value and what is wrong with it.
        """
        if not text.startswith(_UNIX):
            _refuse(quotable(text), "is no Unix socket; write unix:/path/to/socket")
        return cls(text.removeprefix(_UNIX))

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}"


@final
@attrs.frozen
class HttpsAddress:
    """A local server that speaks TLS, written `https://host[:port]`.

    Attributes:
        host: the name as lower-case A-label, or an IP address. The server's certificate must be for it.
        port: the port, by default 443.
        ca_file: PEM certificates to trust in addition to the system's; the server's own certificate will do.
        verify: False accepts any certificate. Then anything that listens on that port gets visitors' requests.
    """

    host: str = attrs.field(validator=_check_host)
    port: int = attrs.field(default=443, validator=_check_port)
    ca_file: Path | None = attrs.field(default=None, kw_only=True)
    verify: bool = attrs.field(default=True, kw_only=True)

    @classmethod
    def parse(cls, text: str) -> HttpsAddress:
        """Read `https://host[:port]`, with or without a last `/`.

        Raises:
            ValueError: with the value and what is wrong with it.
        """
        url = PublicUrl.parse(text)
        if url.scheme != "https":
            _refuse(quotable(text), "is no https:// URL; write host:port for a server without TLS")
        return cls(url.host, url.port)

    @property
    def tcp(self) -> Address:
        """The host and the port."""
        return Address(self.host, self.port)

    def __str__(self) -> str:
        return f"https://{bracketed(self.host)}{'' if self.port == 443 else f':{self.port}'}"


LocalAddress: TypeAlias = Address | UnixAddress | HttpsAddress
"""Where a local server listens."""


@functools.lru_cache(maxsize=256)
def _parse_local(text: str) -> LocalAddress:
    if text.startswith(_UNIX):
        return UnixAddress.parse(text)
    return HttpsAddress.parse(text) if "://" in text else Address.parse(text)


def local_address(value: str | LocalAddress) -> LocalAddress:
    """The address of a local server; a text is `host:port`, `[v6]:port`, `unix:/path` or `https://host[:port]`.

    Raises:
        ValueError: with the value and what is wrong with it.
    """
    return _parse_local(value) if isinstance(value, str) else value


@final
@attrs.frozen
class RelayAddress:
    """Where a relay listens.

    Attributes:
        scheme: `ws` or `wss` when a URL was given; None for a bare `host:port`.
        host: the name as lower-case A-label without a trailing dot, or a compressed IP address without brackets.
        port: the port; by default 80 for `ws` and 443 for `wss`.
        path: the URL's path, by default `/`.
    """

    scheme: Literal["ws", "wss"] | None
    host: str = attrs.field(validator=_check_host)
    port: int = attrs.field(validator=_check_port)
    path: str = "/"

    @classmethod
    def parse(cls, text: str) -> RelayAddress:
        """Read `host:port`, `[v6]:port`, `ws://host[:port][/path]` or `wss://…`.

        Raises:
            ValueError: with the value and what is wrong with it: another scheme, a path on `host:port`, user
                information, a query, a fragment, white space, a port of 0 or over 65535, a bare IPv6 address.
        """
        shown = quotable(text)
        if not text:
            _refuse(shown, "is empty; write host:port or a ws:// or wss:// URL")
        _refuse_white_space(text, shown)
        if "://" not in text:
            if "@" not in text and _AUTHORITY_END.search(text):
                _refuse(
                    shown,
                    "is host:port with a path, query or fragment; write a ws:// or wss:// URL, or host:port alone",
                )
            address = Address.parse(text)
            return cls(None, address.host, address.port)
        return cls(*split_url(text, shown, _RELAY_PORTS))

    def with_scheme(self, scheme: Literal["ws", "wss"]) -> RelayAddress:
        """The same host and port with `scheme`: for a bare `host:port` that is dialled as a WebSocket."""
        return attrs.evolve(self, scheme=scheme)

    @property
    def secure(self) -> bool:
        """True for `wss`."""
        return self.scheme == "wss"

    @property
    def audience(self) -> str:
        """The name that a proof is bound to: the host, and `:port` unless it is the scheme's default."""
        host = bracketed(self.host)
        if self.scheme is not None and self.port == _RELAY_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.scheme is None:
            return f"{bracketed(self.host)}:{self.port}"
        return f"{self.scheme}://{self.audience}{self.path if self.path != '/' else ''}"


@final
@attrs.frozen
class PublicUrl:
    """Where visitors reach a tunnel: the root of a site, without a path.

    Attributes:
        scheme: `http` or `https`.
        host: as in `RelayAddress`; or `*.` and such a name, for every name that has one label more.
        port: the port; by default 80 for `http` and 443 for `https`.
    """

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def wildcard(self) -> bool:
        """Whether it stands for many names."""
        return self.host.startswith(_WILDCARD)

    @property
    def domain(self) -> str:
        """The host, without the `*.` of a wildcard."""
        return self.host.removeprefix(_WILDCARD)

    @classmethod
    def parse(cls, text: str) -> PublicUrl:
        """Read `http://host[:port]` or `https://host[:port]`, with or without a last `/`. The host may be a wildcard.

        Raises:
            ValueError: with the value and what is wrong with it: another scheme, a path, user information, a query, a
                fragment, white space, a port of 0 or over 65535, a bare IPv6 address.
        """
        shown = quotable(text)
        _refuse_white_space(text, shown)
        if "://" not in text:
            _refuse(shown, "is not a URL; write http://host or https://host")
        before, wildcard, after = text.partition(f"://{_WILDCARD}")
        scheme, host, port, path = split_url(f"{before}://{after}" if wildcard else text, shown, _PUBLIC_PORTS)
        if wildcard and (is_ip_address(host) or "." not in host):
            _refuse(shown, "has a wildcard for the names of no domain; write *.box.example.com")
        if path != "/":
            _refuse(shown, "has a path; a tunnel is a whole site, write http://host or https://host")
        return cls(scheme, _WILDCARD + host if wildcard else host, port)

    def __str__(self) -> str:
        port = "" if self.port == _PUBLIC_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{bracketed(self.host)}{port}"


def normal_audience(text: str) -> str:
    """The normal form of a public name, `host` or `host:port`, as it appears in a proof.

    Raises:
        ValueError: with the value and what is wrong with it.
    """
    shown = quotable(text)
    if "@" in text:
        _refuse(shown, "holds user information ('…@'); write host or host:port")
    host, port = _split_host_port(text, shown)
    normal = bracketed(normal_host(host, shown))
    return normal if port is None else f"{normal}:{port}"


def normal_host(host: str, shown: str) -> str:
    """The host as lower-case A-label without trailing dot, or as compressed IP address. An error quotes `shown`.

    Raises:
        ValueError: the host is neither a host name nor an IP address.
    """
    if host.startswith("["):
        if "%" in host:
            _refuse(shown, "has an IPv6 zone ('%…'), which means something on one machine only")
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            _refuse(shown, "has brackets around what is not an IPv6 address")
    name = host.lower()
    if not name.isascii() and len(name) <= _MAX_HOST:
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except UnicodeError:
            _refuse(shown, "has a host that is not a valid internationalised name")
    name = name.removesuffix(".")
    if not name:
        _refuse(shown, "has no host")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            _refuse(shown, "has a host that ends in a number and is not an IPv4 address")
    if len(name) > _MAX_HOST or not _NAME.fullmatch(name):
        _refuse(shown, "has a host that is neither a host name nor an IP address")
    return name


@functools.lru_cache(maxsize=256)
def is_ip_address(host: str) -> bool:
    """True for an IPv4 or IPv6 address without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True for what this host alone can reach: a loopback address, or `localhost` and names below it (RFC 6761)."""
    if is_ip_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def bracketed(host: str) -> str:
    """`host` as it is written before `:port`: an IPv6 address in brackets, anything else unchanged."""
    return f"[{host}]" if ":" in host else host


def quotable(text: str) -> str:
    """`text` as an error may quote it: without user information and query, which may hold secrets."""
    return _QUERY.sub(r"\1…", _USERINFO.sub(r"\1…@", text))


def split_url(text: str, shown: str, ports: Mapping[_Scheme, int]) -> tuple[_Scheme, str, int, str]:
    """Scheme, host, port and path of a URL. Its scheme must be in `ports`, which has the default ports."""
    written, _, rest = text.partition("://")
    scheme = next((known for known in ports if known == written.lower()), None)
    if scheme is None:
        _refuse(shown, f"has another scheme than {' and '.join(ports)}")
    authority = _AUTHORITY_END.split(rest, maxsplit=1)[0]
    path = rest.removeprefix(authority) or "/"
    if "@" in authority:
        _refuse(shown, "holds user information ('…@'), which an address has not; a key goes to the keystore")
    for mark, what in (("?", "a query"), ("#", "a fragment")):
        if mark in path:
            _refuse(shown, f"has {what}, which an address has not")
    if not _PATH.fullmatch(path):
        _refuse(shown, "has a path with characters that a URL path does not have; percent-encode them")
    host, port = _split_host_port(authority, shown)
    return scheme, normal_host(host, shown), ports[scheme] if port is None else port, path


def _split_host_port(text: str, shown: str, *, lowest_port: int = 1) -> tuple[str, int | None]:
    """Split at the port; the host keeps its brackets."""
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        if not bracket:
            _refuse(shown, "has '[' without ']'")
        host += bracket
        if rest and not rest.startswith(":"):
            _refuse(shown, "has more than ':port' after the IPv6 address; write [address]:port")
        separator, port = rest[:1], rest[1:]
    else:
        if text.count(":") > 1:
            _refuse(shown, "has more than one ':'; write an IPv6 address in brackets, [address]:port")
        host, separator, port = text.partition(":")
    if not separator:
        return host, None
    if not _PORT.fullmatch(port) or not lowest_port <= int(port) <= 65535:
        _refuse(shown, f"has a port that is not a number from {lowest_port} to 65535")
    return host, int(port)


def _refuse_white_space(text: str, shown: str) -> None:
    if any(char.isspace() or ord(char) < 32 or 127 <= ord(char) < 160 for char in text):
        _refuse(shown, "holds white space or a control character")


def _refuse(shown: str, why: str) -> NoReturn:
    # `from None`: the context may quote a part of the value.
    raise ValueError(f"the address {shown!r} {why}") from None
