"""A proxy on the way to the relay, as a value: its URL, and the credentials for it.

    http://host[:port]      an HTTP proxy, asked by CONNECT; also written host:port
    https://host[:port]     the same, inside TLS
    socks5://host[:port]    a SOCKS5 proxy; `socks5h` and `socks` mean the same. The proxy resolves the relay's name

Credentials are no part of the text of a proxy, nor of its repr. An error quotes a URL without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NoReturn, TypeAlias, final
from urllib.parse import quote, unquote_to_bytes

import attrs

from .addresses import Address, bracketed, quotable, split_url

__all__ = ["DIRECT", "Direct", "Proxy", "ProxyCredentials", "ProxyScheme", "configured_proxy"]

ProxyScheme: TypeAlias = Literal["http", "https", "socks5"]
Direct: TypeAlias = Literal["none"]
DIRECT: Final[Direct] = "none"
"""What a configuration says for no proxy, whatever the environment says."""

_PORTS: Final[Mapping[Literal["http", "https", "socks5", "socks5h", "socks"], int]] = {
    "http": 80,
    "https": 443,
    "socks5": 1080,
    "socks5h": 1080,
    "socks": 1080,  # as GNOME writes it to ALL_PROXY
}
_LONGEST: Final = 255
"""Bytes of a user name, and of a password, that SOCKS5 can carry (RFC 1929)."""

_TO_BE_ENCODED: Final = re.compile(r"[/?#\s]")


@final
class ProxyCredentials:
    """A user name and a password for a proxy. They have no printable form: `repr` shows `ProxyCredentials(***)`.

    Raises:
        ValueError: the user name is empty or has a colon, one of them is longer than 255 bytes or has a control
            character. The message does not quote them.
    """

    __slots__ = ("_reveal",)

    _reveal: Callable[[], tuple[str, str]]

    def __init__(self, user: str, password: str) -> None:
        problem = _problem_with(user, password)
        if problem is not None:
            del user, password  # a traceback that shows local variables must not show them
            raise ValueError(problem)
        self._reveal = lambda: (user, password)

    @classmethod
    def parse(cls, text: str) -> ProxyCredentials:
        """Read `user:password`. The password may have colons.

        Raises:
            ValueError: see the class.
        """
        user, colon, password = text.partition(":")
        if not colon:
            del text, user, password
            raise ValueError("are not written as user:password")
        return cls(user, password)

    def reveal(self) -> tuple[str, str]:
        """The user name and the password, for the proxy. Do not store them elsewhere."""
        return self._reveal()

    @property
    def userinfo(self) -> str:
        """Both as a URL has them, percent-encoded."""
        return ":".join(quote(part, safe="") for part in self._reveal())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProxyCredentials) and self._reveal() == other._reveal()

    def __hash__(self) -> int:
        return hash((ProxyCredentials, self._reveal()))

    def __repr__(self) -> str:
        return "ProxyCredentials(***)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("ProxyCredentials are not pickled or copied into bytes")

    def __copy__(self) -> ProxyCredentials:
        return self

    def __deepcopy__(self, memo: object) -> ProxyCredentials:
        return self


def _problem_with(user: str, password: str) -> str | None:
    if not user or ":" in user:
        return "have a user name that is empty or has a colon"
    for part in (user, password):
        if any(ord(char) < 32 or 127 <= ord(char) < 160 or "\ud800" <= char <= "\udfff" for char in part):
            return "have a control character"
        if len(part.encode()) > _LONGEST:
            return f"have a user name or a password of more than {_LONGEST} bytes"
    return None


@final
@attrs.frozen
class Proxy:
    """A proxy on the way to the relay.

    Attributes:
        scheme: `http`, `https` or `socks5`: how the proxy is spoken to.
        host: a name or an IP address without brackets.
        port: the port.
        credentials: for the proxy; None (default) when it wants none. Not a part of `str` and `repr`.
    """

    scheme: ProxyScheme
    host: str
    port: int
    credentials: ProxyCredentials | None = attrs.field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """Read `http://[user:password@]host[:port]`, and the same with `https`, `socks5`, `socks5h` and `socks`.

        Default ports are 80, 443 and 1080. Without a scheme it is `http`, and has a port. Special characters of the
        user name and the password are percent-encoded.

        Raises:
            ValueError: with the value, without credentials, and what is wrong with it.
        """
        written, separator, rest = text.partition("://") if "://" in text else ("", "", text)
        userinfo, at, place = rest.rpartition("@")
        shown = quotable(text)
        credentials = _credentials(userinfo, shown) if at else None
        if not separator:
            address = Address.parse(place)
            return cls("http", address.host, address.port, credentials)
        scheme, host, port, path = split_url(f"{written}://{place}", shown, _PORTS)
        if path != "/":
            raise ValueError(f"the proxy {shown!r} has a path; a proxy is a host and a port")
        return cls(scheme if scheme in ("http", "https") else "socks5", host, port, credentials)

    def with_credentials(self, credentials: ProxyCredentials) -> Proxy:
        """The same proxy with `credentials`."""
        return attrs.evolve(self, credentials=credentials)

    @property
    def url_with_credentials(self) -> str:
        """The URL with the credentials in it. A secret, unless there are none."""
        userinfo = "" if self.credentials is None else f"{self.credentials.userinfo}@"
        return f"{self.scheme}://{userinfo}{self._place}"

    @property
    def _place(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self._place}"


def _credentials(userinfo: str, shown: str) -> ProxyCredentials:
    if _TO_BE_ENCODED.search(userinfo):
        why = "have a character that has to be percent-encoded, such as '/' or '#'"
    else:
        user, _, password = userinfo.partition(":")
        try:
            return ProxyCredentials(unquote_to_bytes(user).decode(), unquote_to_bytes(password).decode())
        except UnicodeDecodeError:
            why = "are not UTF-8"
        except ValueError as error:
            why = str(error)
    raise ValueError(f"the proxy {shown!r} cannot be used: its credentials {why}") from None


def configured_proxy(value: str | Proxy) -> Proxy | Direct:
    """The proxy of a configuration: a value, a URL without credentials, or `none`.

    Raises:
        ValueError: the text is neither, or holds credentials.
    """
    if not isinstance(value, str):
        return value
    if value == DIRECT:
        return DIRECT
    proxy = Proxy.parse(value)
    if proxy.credentials is not None:
        raise ValueError(
            f"the proxy {quotable(value)!r} holds credentials, and a configuration or an argument is no place for a"
            " secret; write the line user:password to a file, and name it in proxy_credentials_file"
        )
    return proxy
