"""The headers that tell a local server who visits it: set as the relay attests, in place of the visitor's. No I/O.

A server behind a proxy reads the visitor's address, scheme and host from `Forwarded` (RFC 7239) or `X-Forwarded-*`. A
visitor can send these headers too. So every header that a server could take for one of them is removed:

    X_Forwarded_For, x.forwarded.for   CGI, WSGI and PHP name all of them HTTP_X_FORWARDED_FOR. So a name is compared
                                       with each character that is neither letter nor digit read as `-`
    X-Forwarded-Port, Forwarded-For …  whatever begins with X-Forwarded or Forwarded
    X-Real-IP, Client-IP, X-Scheme …   other names of the same facts, see `_NAMES`
    SCRIPT_NAME, PATH_INFO             gunicorn takes them from a proxy, and 127.0.0.1 is one
    a trailer with such a name         refused
    Connection: X-Forwarded-For        a proxy at the server would remove the header that is set here. So these names
                                       are removed from `Connection`

`Upgrade` is kept for a WebSocket alone. After another upgrade, such as h2c, the visitor could send requests that are
not followed here. A server may always ignore an Upgrade (RFC 9110, 7.8), so a request without the header is served.

`X-Request-ID` names a request in the logs of all who handle it. A visitor may send any; so may one who wants to confuse
the logs. Only a proxy in front of the relay that sets it itself makes it worth keeping.

An absolute URL as the target becomes a path, as RFC 9112, 3.2.1 has it for a server: its host and scheme are the
visitor's.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Final, Literal, final

import attrs

from .head import TOKEN, BadRequest, RequestHead, wants_upgrade

__all__ = ["HeaderRules", "plain_name"]

_NAMES: Final = frozenset(
    {
        b"client-ip",
        b"cluster-client-ip",
        b"front-end-https",
        b"path-info",
        b"proxy-client-ip",
        b"script-name",
        b"true-client-ip",
        b"wl-proxy-client-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-host",
        b"x-original-forwarded-for",
        b"x-original-host",
        b"x-original-proto",
        b"x-originating-ip",
        b"x-real-ip",
        b"x-remote-addr",
        b"x-remote-ip",
        b"x-scheme",
        b"x-script-name",
        b"x-url-scheme",
    }
)
_PREFIXES: Final = (b"forwarded", b"x-forwarded")
_REQUEST_ID: Final = b"x-request-id"
_GOOD_ID: Final = re.compile(rb"[A-Za-z0-9._:+=/-]{1,128}")
_UPGRADE: Final = frozenset({b"upgrade", b"http2-settings"})
_MOST_OPTIONS: Final = 64

_PLAIN: Final = bytes(ord(chr(byte).lower()) if chr(byte).isalnum() and byte < 0x80 else 0x2D for byte in range(256))

_TOKEN: Final = re.compile(TOKEN)
_SCHEME_AND_HOST: Final = re.compile(rb"(?i:https?)://[^/?]++")


def plain_name(name: bytes) -> bytes:
    """A header's name, so that names which a server could take for one another are equal.

    CGI and WSGI make one variable of `X-Forwarded-For` and `X_Forwarded_For`.
    """
    return name.translate(_PLAIN)


def new_request_id() -> bytes:
    """An id that no other call makes."""
    return uuid.uuid4().hex.encode("ascii")


@final
@attrs.frozen(kw_only=True)
class HeaderRules:
    """What to change in the heads of one visitor's requests.

    Attributes:
        set_forwarded: whether to replace the headers that name the visitor. If False, only the Host is set.
        visitor: the visitor's IP address; None where it is not known, and then no header has it.
        tls: whether the visitor came over TLS; None where it is not known, and then no header says so.
        host_header: the Host that the server gets; None keeps the visitor's.
        request_id: `set` gives each request an `X-Request-ID` of its own; `keep` keeps the visitor's if there is one
            of at most 128 letters, digits and `._:+=/-`; None leaves it alone.
        make_id: makes ids.
        removed: further headers that the server must not get; lower-case letters alone.
    """

    set_forwarded: bool
    visitor: str | None = None
    tls: bool | None = None
    host_header: bytes | None = None
    request_id: Literal["set", "keep"] | None = None
    make_id: Callable[[], bytes] = new_request_id
    removed: frozenset[bytes] = frozenset()

    def replaces(self, name: bytes) -> bool:
        """Whether a header or trailer of this name is removed: the visitor's word about itself, or one of `removed`."""
        plain = plain_name(name)
        if plain == _REQUEST_ID and self.request_id is not None:
            return True
        return plain in self.removed or (self.set_forwarded and (plain in _NAMES or plain.startswith(_PREFIXES)))

    def apply(self, head: RequestHead, received: bytes) -> tuple[RequestHead, bytes]:
        """Change a head.

        Args:
            head: the parsed head.
            received: its bytes. Headers that are not changed stay as they are written there, in their order.

        Returns:
            The head, without an Upgrade that is not kept and with the request's id, and the changed bytes.

        Raises:
            BadRequest: it has more than 64 options in a Connection header.
        """
        request_id = self._request_id(head)
        upgrade = wants_upgrade(head)
        keeps_upgrade = upgrade is not None and upgrade.websocket and upgrade.protocols == ("websocket",)
        removed = frozenset() if keeps_upgrade else _UPGRADE
        first, *written = received[: head.length].removeprefix(b"\r\n").split(b"\r\n")
        lines = [first if head.target[:1] in b"/*" else b"%s %s HTTP/%s" % (head.method, _path(head), head.version)]
        for (name, value), line in zip(head.headers, written, strict=False):  # `written` has the empty line, too
            if self.replaces(name) or plain_name(name) in removed:
                continue
            changed = value
            if name == b"host":
                changed = self.host_header or value
            elif name == b"connection":
                options = self._options(value, removed)
                if options is None:
                    continue
                changed = options
            lines.append(line if changed is value else line[: len(name)] + b": " + changed)
        lines += [b"%s: %s" % line for line in self._forwarded(head)]
        if request_id is not None:
            lines.append(b"X-Request-ID: " + request_id)
            others = tuple(field for field in head.headers if plain_name(field[0]) != _REQUEST_ID)
            head = attrs.evolve(head, headers=(*others, (_REQUEST_ID, request_id)))
        if upgrade is not None and not keeps_upgrade:
            kept = tuple(field for field in head.headers if plain_name(field[0]) not in removed)
            head = attrs.evolve(head, headers=kept)
        return head, b"\r\n".join([*lines, b"", b""])

    def _request_id(self, head: RequestHead) -> bytes | None:
        if self.request_id is None:
            return None
        given = [value for name, value in head.headers if plain_name(name) == _REQUEST_ID]
        if self.request_id == "keep" and len(given) == 1 and _GOOD_ID.fullmatch(given[0]):
            return given[0]
        return self.make_id()

    def _options(self, value: bytes, removed: frozenset[bytes]) -> bytes | None:
        """A Connection header without the names of headers that are set or removed here; None if nothing is left."""
        options = [option.strip(b" \t") for option in value.split(b",", _MOST_OPTIONS)]
        if len(options) > _MOST_OPTIONS:
            raise BadRequest(400, f"A Connection header has more than {_MOST_OPTIONS} options.")
        kept = [
            option
            for option in options
            if not (self.replaces(option) or plain_name(option) in removed or option.lower() == b"host")
        ]
        return value if len(kept) == len(options) else b", ".join(kept) or None

    def _forwarded(self, head: RequestHead) -> Iterator[tuple[bytes, bytes]]:
        if not self.set_forwarded:
            return
        pairs = [(b"host", head.host_header)]
        if self.visitor is not None:
            address = self.visitor.encode("ascii")
            pairs.insert(0, (b"for", b"[%s]" % address if b":" in address else address))
            yield b"X-Forwarded-For", address
            yield b"X-Real-IP", address
        if self.tls is not None:
            scheme = b"https" if self.tls else b"http"
            pairs.append((b"proto", scheme))
            yield b"X-Forwarded-Proto", scheme
        yield b"X-Forwarded-Host", head.host_header
        yield b"Forwarded", b";".join(name + b"=" + _quoted(value) for name, value in pairs)


def _path(head: RequestHead) -> bytes:
    """The path and the query of an absolute URL."""
    rest = _SCHEME_AND_HOST.sub(b"", head.target, 1)
    if rest.startswith(b"/"):
        return rest
    return b"*" if head.method == b"OPTIONS" and not rest else b"/" + rest


def _quoted(value: bytes) -> bytes:
    """A value of `Forwarded`. Hosts and addresses have no character that needs a backslash."""
    return value if _TOKEN.fullmatch(value) else b'"%s"' % value
