"""The head of a visitor's request: read strictly, within bounds, once, and never written again. No I/O.

`HeadReader` takes bytes in any pieces and finds out which host the request is for. The relay then forwards the very
bytes that it has read, and the gateway behind it reads them a second time. If two readers could understand a request in
two ways, one tenant's visitor could reach another tenant's gateway. So where RFC 9110 and 9112 let a recipient choose
between repairing and refusing, this reader refuses: a repair would have to be written. There is one parse and one host:
every later decision about a request uses its `RequestHead`.

h11 is not used: it repairs what must be refused here (bare LF, folded headers, equal Content-Lengths), and it does not
keep the bytes to forward.

It reads in the order of the bytes, so that the verdict does not depend on the pieces in which they come:

    1. at most one empty line (see below)
    2. method SP target SP HTTP/1.0 or HTTP/1.1. The target is a path, an absolute http or https URL, or `*` of
       OPTIONS. It may contain bytes from 0x80 on, as browsers and curl send them: nothing here depends on them
    3. `name: value` lines, each on one line; every line ends in CR LF
    4. the empty line. Then it checks all headers together: exactly one well-formed Host, and unambiguous framing (a
       single Content-Length, or a single Transfer-Encoding that ends in `chunked`, or neither)

An absolute URL as the target must name the host and port of the Host header. RFC 9112, 3.2.2 says that a server uses
the target and ignores the Host, but some servers use the Host. When both are the same, it does not matter.

The empty line before a request: RFC 9112, 2.2 says that a server should ignore at least one. So one is forwarded
unchanged: a gateway ignores it as well, or answers 400 itself. The RFC promises nothing of a second one, so two are
refused.

A reader looks at each byte a fixed number of times, whether they come at once or singly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final, NoReturn, final

import attrs

from .._model.addresses import normal_host
from .._model.errors import LocalProtocolError, RemoteProtocolError
from .._model.text import clean_message

__all__ = [
    "FIELD",
    "MAX_HEAD",
    "MAX_HEADERS",
    "MAX_LINE",
    "TARGET",
    "TOKEN",
    "VALUE",
    "BadRequest",
    "HeadReader",
    "RequestHead",
    "Upgrade",
    "error_response",
    "likely_host",
    "read_field",
    "read_framing",
    "wants_upgrade",
]

MAX_HEAD: Final = 64 * 1024
"""Bytes of a whole head."""
MAX_LINE: Final = 16 * 1024
"""Bytes of one line, including its end: twice what servers commonly accept."""
MAX_HEADERS: Final = 128
"""Header lines of a head."""

# All quantifiers are possessive (`++`, `*+`): there is no backtracking, so matching takes linear time.
TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
"""Matches a method, or another token."""
TARGET: Final = rb"[!-~\x80-\xff]"
"""Matches a byte of a target."""
_TOKEN: Final = re.compile(TOKEN)
_REQUEST_LINE: Final = re.compile(rb"(%s) (%s++) HTTP/([0-9]\.[0-9])" % (TOKEN, TARGET))
_ABSOLUTE: Final = re.compile(rb"(?i:http(s)?)://([^/?]++)(?:[/?].*+|)")
# White space around a value is stripped later: a pattern for it could match in many ways.
VALUE: Final = rb"[^\x00-\x08\x0a-\x1f\x7f]*+"
"""Matches a header's text after the colon, and any other text of a head."""
FIELD: Final = rb"%s:%s" % (TOKEN, VALUE)
"""Matches the line of a header without its end."""
_FIELD: Final = re.compile(rb"(%s):(%s)" % (TOKEN, VALUE))
_FIELDS: Final = re.compile(rb"(%s):(%s)\r\n" % (TOKEN, VALUE))
_WHOLE: Final = re.compile(rb"(?:\r\n)?%s\r\n((?:%s\r\n)*+)\r\n" % (_REQUEST_LINE.pattern, FIELD))
# In one of the first lines, where clients have it.
_LIKELY_HOST: Final = re.compile(
    rb"(?:(?!host:)[^\r\n]++\r\n){1,8}host:[ \t]*+([0-9a-z_.-]++(?::[0-9]*+)?)[ \t]*+\r\n", re.IGNORECASE
)
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]++\]|[0-9A-Za-z_.-]++)(?::([0-9]{0,5}))?")
# 18 digits fit a signed 64-bit integer, so no reader behind us overflows.
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_CODING: Final = re.compile(rb"%s(?:[ \t]*+,[ \t]*+%s)*+" % (TOKEN, TOKEN))

_HEAD: Final = b"HEAD"
_HOST_HEADER: Final = "The Host header"
# An `Upgrade` or `Connection` header may have 16 KiB of members; a list of all of them would cost much time.
_NAMES_UPGRADE: Final = re.compile(rb"(?:\A|,)[ \t]*+upgrade[ \t]*+(?:,|\Z)", re.IGNORECASE)
_NOT_EMPTY: Final = re.compile(rb"[^ \t,]")
_MEMBER: Final = re.compile(rb"[^,]++")
_MOST_MEMBERS: Final = 64

_CR: Final = 0x0D
_TLS_HANDSHAKE: Final = 0x16
_STATUSES: Final = frozenset({308, 400, 401, 403, 404, 408, 421, 429, 431, 502, 503, 504})


@final
class BadRequest(RemoteProtocolError):
    """The visitor's request is refused.

    Attributes:
        status: of the answer: 400, 431 when the request is too large, or 408 when a later request of a connection
            comes too slowly.
        reason: a sentence for people, which quotes nothing of the request.
        omit_body: True when the request is a HEAD, as far as it was read: the answer has no body.
    """

    def __init__(self, status: int, reason: str, *, omit_body: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.omit_body = omit_body


def _is_head(head: RequestHead) -> bool:
    return head.method == _HEAD


def _asks_upgrade(head: RequestHead) -> bool:
    return (
        head.version != b"1.0"
        and any(map(_NOT_EMPTY.search, head.values(b"upgrade")))
        and any(map(_NAMES_UPGRADE.search, head.values(b"connection")))
    )


@final
@attrs.frozen(kw_only=True)
class RequestHead:
    """The parsed head of a request. Its bytes are in `HeadReader.received`.

    Target and headers may contain secrets (a token, a cookie), so `repr` leaves them out.

    Attributes:
        method: as written; methods are case-sensitive.
        target: the path with its query, an absolute URL, or `*`.
        version: `b"1.0"` or `b"1.1"`.
        host: the Host without port, normalised by `addresses.normal_host`: lower-case, without a trailing dot; an IPv6
            address is compressed and has no brackets.
        host_header: the Host as written.
        headers: in their order; names are lower-case, values have no white space around them.
        length: bytes of the head, including the empty lines at both ends.
        content_length: bytes of the body, if the head says so; None otherwise.
        chunked: True when the body is chunked.
        omit_body: True for a HEAD: its response has headers only, even if they describe a body.
        asks_upgrade: whether it asks for an upgrade, see `wants_upgrade`.
    """

    method: bytes
    target: bytes = attrs.field(repr=False)
    version: bytes
    host: str
    host_header: bytes
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(repr=False)
    length: int
    content_length: int | None
    chunked: bool
    omit_body: bool = attrs.field(init=False, repr=False, default=attrs.Factory(_is_head, takes_self=True))
    asks_upgrade: bool = attrs.field(init=False, repr=False, default=attrs.Factory(_asks_upgrade, takes_self=True))

    def values(self, name: bytes) -> list[bytes]:
        """The values of all headers `name` (lower-case), in their order."""
        return [value for header, value in self.headers if header == name]

    def members(self, name: bytes) -> Iterator[bytes]:
        """The members of the comma-separated lists in all headers `name`; of each header the first 64."""
        for value in self.values(name):
            for match in islice(_MEMBER.finditer(value), _MOST_MEMBERS):
                if member := match[0].strip(b" \t"):
                    yield member


@final
class HeadReader:
    """Reads one request head from bytes in any pieces. For the next head of a connection, make a new reader.

    Feed it until it returns a head or raises. It keeps all bytes, also those after the head; `received` has them. It
    holds at most the bounds and one piece.

    Timeouts and the end of the connection are for the caller.
    """

    def __init__(self, *, max_head: int = MAX_HEAD, max_line: int = MAX_LINE, max_headers: int = MAX_HEADERS) -> None:
        self._max_head = max_head
        self._max_line = max_line
        self._max_headers = max_headers
        self._buffer = bytearray()
        # Start of the incomplete line, and the position up to which it was searched for its end.
        self._line_start = 0
        self._scanned = 0
        self._request_line: tuple[bytes, bytes, bytes] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._finished = False

    @property
    def received(self) -> bytes:
        """All bytes that were fed: the head, as far as it came, and what came after it."""
        return bytes(self._buffer)

    @property
    def omit_body(self) -> bool:
        """True when the head, as far as it came, begins with the method HEAD."""
        return bytes(self._buffer[:8]).removeprefix(b"\r\n").startswith(_HEAD + b" ")

    def feed(self, data: bytes | bytearray | memoryview) -> RequestHead | None:
        """Take the next bytes. Returns the head once it is complete, until then None.

        An error is raised as soon as the bytes show it. The result does not depend on the pieces.

        Raises:
            BadRequest: the request cannot be routed; answer it and close.
            LocalProtocolError: the reader has already returned a head or raised.
        """
        if self._finished:
            raise LocalProtocolError("a HeadReader reads one head; make another for the next")
        self._buffer += data
        self._finished = True  # also when this raises
        try:
            head = (None if self._scanned else self._read_whole()) or self._read_lines()
        except BadRequest as refused:
            refused.omit_body = self.omit_body
            raise
        self._finished = head is not None
        return head

    def _read_whole(self) -> RequestHead | None:
        """Read a head that comes at once and is right in each line; None for any other.

        A fast path; reading line by line has the same result.
        """
        # So short that no line can be too long.
        match = _WHOLE.match(self._buffer, 0, min(self._max_line, self._max_head))
        if match is None:
            return None
        fields = _FIELDS.findall(self._buffer, match.start(4), match.end(4))
        if len(fields) > self._max_headers:
            return None
        self._headers = [(name.lower(), value.strip(b" \t")) for name, value in fields]
        self._line_start = match.end()
        method, target, version, _ = match.groups()
        return self._head(*_checked_request_line(method, target, version))

    def _read_lines(self) -> RequestHead | None:
        buffer = self._buffer
        while True:
            start = self._line_start
            if self._request_line is None and start < len(buffer):
                self._check_first_byte(start)
            limit = min(start + self._max_line, self._max_head)
            end = buffer.find(b"\n", self._scanned, limit)
            if end < 0:
                if len(buffer) >= limit:
                    self._refuse_size(limit)
                self._scanned = len(buffer)
                return None
            self._scanned = self._line_start = end + 1
            if end == start or buffer[end - 1] != _CR:
                raise BadRequest(400, "A line of the request ends in LF without CR.")
            end -= 1
            if end > start:
                if self._request_line is None:
                    self._request_line = self._read_request_line(start, end)
                else:
                    self._headers.append(self._read_header(start, end))
            elif self._request_line is not None:
                return self._head(*self._request_line)

    def _check_first_byte(self, start: int) -> None:
        """Refuse at once what cannot become a request: such a visitor may wait for us to send first."""
        first = self._buffer[start : start + 1]
        if _TOKEN.match(first) or (first == b"\r" and start == 0):
            return
        if first[0] == _TLS_HANDSHAKE:
            raise BadRequest(400, "This looks like TLS, but this port speaks plain HTTP; use http:// here.")
        if first == b"\r":
            raise BadRequest(400, "More than one empty line comes before the request.")
        raise BadRequest(400, "The request does not begin with a method.")

    def _refuse_size(self, limit: int) -> NoReturn:
        if limit == self._max_head:
            raise BadRequest(431, f"The head of the request has more than {self._max_head} bytes.")
        what = "The request line" if self._request_line is None else "A header"
        raise BadRequest(431, f"{what} has more than {self._max_line} bytes.")

    def _read_request_line(self, start: int, end: int) -> tuple[bytes, bytes, bytes]:
        match = _REQUEST_LINE.fullmatch(self._buffer, start, end)
        if match is None:
            if _CONTROL.search(self._buffer, start, end):
                raise BadRequest(400, "The request line holds a control character.")
            raise BadRequest(
                400, "The request line is not a method, a target and HTTP/1.1 with one space between each."
            )
        return _checked_request_line(*match.groups())

    def _read_header(self, start: int, end: int) -> tuple[bytes, bytes]:
        if len(self._headers) >= self._max_headers:
            raise BadRequest(431, f"The request has more than {self._max_headers} headers.")
        return read_field(self._buffer, start, end)

    def _head(self, method: bytes, target: bytes, version: bytes) -> RequestHead:
        """Make the head from all lines.

        Raises:
            BadRequest: the host or the end of the body is not certain.
        """
        hosts: list[bytes] = []
        lengths: list[bytes] = []
        codings: list[bytes] = []
        for name, value in self._headers:
            match name:
                case b"host":
                    hosts.append(value)
                case b"content-length":
                    lengths.append(value)
                case b"transfer-encoding":
                    codings.append(value)
        if not hosts:
            raise BadRequest(400, "The request has no Host header.")
        if len(hosts) > 1:
            raise BadRequest(400, "The request has more than one Host header.")
        content_length, chunked = read_framing(lengths, codings, version)
        host, port = _read_authority(hosts[0], _HOST_HEADER)
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            default = 80 if absolute[1] is None else 443
            named, named_port = _read_authority(absolute[2], "The target of the request")
            if (named, named_port or default) != (host, port or default):
                raise BadRequest(400, "The target of the request names another host than the Host header.")
        return RequestHead(
            method=method,
            target=target,
            version=version,
            host=host,
            host_header=hosts[0],
            headers=tuple(self._headers),
            length=self._line_start,
            content_length=content_length,
            chunked=chunked,
        )


def likely_host(received: bytes) -> str | None:
    """The host that a request is for, if its whole head has come; None if it takes a `HeadReader` to find that out.

    If the request makes sense, it is the `host` of its head. Decide by it only who reads the request.
    """
    match = _LIKELY_HOST.match(received) if b"\r\n\r\n" in received else None
    try:
        return None if match is None else _read_authority(match[1], _HOST_HEADER)[0]
    except BadRequest:
        return None


def _checked_request_line(method: bytes, target: bytes, version: bytes) -> tuple[bytes, bytes, bytes]:
    """The arguments.

    Raises:
        BadRequest: such a request is not served.
    """
    if version == b"2.0":
        raise BadRequest(400, "This is HTTP/2, which is not spoken here; use HTTP/1.1.")
    if version not in {b"1.0", b"1.1"}:
        raise BadRequest(400, "This HTTP version is not spoken here; use HTTP/1.1.")
    if method == b"CONNECT":
        raise BadRequest(400, "CONNECT is for proxies, and this is none.")
    if not (target.startswith(b"/") or (method, target) == (b"OPTIONS", b"*") or _ABSOLUTE.fullmatch(target)):
        raise BadRequest(400, "The target of the request is neither a path nor an absolute http or https URL.")
    return method, target, version


def read_field(buffer: bytes | bytearray, start: int, end: int) -> tuple[bytes, bytes]:
    """Parse the line of a header or trailer, `buffer[start:end]` without its end, into lower-case name and value.

    Raises:
        BadRequest: the line is not a name, a colon and a value.
    """
    match = _FIELD.fullmatch(buffer, start, end)
    if match is not None:
        name, value = match.groups()
        return name.lower(), value.strip(b" \t")
    line = buffer[start:end]
    if line[0] in b" \t":
        raise BadRequest(400, "A header is folded onto a second line.")
    if _CONTROL.search(line):
        raise BadRequest(400, "A header holds a control character.")
    before, colon, _ = line.partition(b":")
    if not colon:
        raise BadRequest(400, "A header has no colon.")
    if before.endswith((b" ", b"\t")):
        raise BadRequest(400, "A header has white space before its colon.")
    raise BadRequest(400, "A header has a name that is empty or holds characters which a name has not.")


@lru_cache(maxsize=1024)
def _read_authority(value: bytes, what: str) -> tuple[str, int | None]:
    """Parse a host with an optional port. Returns the normalised host, and the port or None. An empty port is None.

    Cached: many requests are for the same few hosts. What is refused is not kept.

    Args:
        what: names the value in errors.

    Raises:
        BadRequest: `value` is not a host, or a host and a port.
    """
    if not value:
        raise BadRequest(400, f"{what} is empty.")
    match = _HOST.fullmatch(value)
    if match is None or (match[2] and not 1 <= int(match[2]) <= 65535):
        raise BadRequest(400, f"{what} does not name a host, or a host and a port.")
    host = match[1].decode("ascii")
    try:
        return normal_host(host, host), int(match[2]) if match[2] else None
    except ValueError:
        raise BadRequest(400, f"{what} names neither a valid host name nor an IP address.") from None


def read_framing(lengths: list[bytes], codings: list[bytes], version: bytes) -> tuple[int | None, bool]:
    """The Content-Length of a message, or None, and whether its body is chunked.

    Args:
        lengths: the values of all Content-Length headers.
        codings: the values of all Transfer-Encoding headers.
        version: `b"1.0"` or `b"1.1"`.

    Raises:
        BadRequest: the end of the body is not certain.
    """
    if not codings:
        return _content_length(lengths) if lengths else None, False
    if lengths:
        raise BadRequest(400, "The request has both Content-Length and Transfer-Encoding.")
    _check_codings(codings, version)
    return None, True


def _content_length(lengths: list[bytes]) -> int:
    """The only Content-Length. Two equal ones are refused too, since one of them would have to be removed.

    Raises:
        BadRequest: there are several, or it is not a number of at most 18 digits.
    """
    if len(lengths) > 1 or b"," in lengths[0]:
        raise BadRequest(400, "The request has more than one Content-Length.")
    if not _LENGTH.fullmatch(lengths[0]):
        raise BadRequest(400, "The Content-Length is not a number of at most 18 digits.")
    return int(lengths[0])


def _check_codings(codings: list[bytes], version: bytes) -> None:
    """Accept one Transfer-Encoding that has `chunked` once, as its last coding (RFC 9112, 6.1).

    Raises:
        BadRequest: the end of the body is not certain.
    """
    if version == b"1.0":
        raise BadRequest(400, "The request is HTTP/1.0 with a Transfer-Encoding, which came with HTTP/1.1.")
    if len(codings) > 1:
        raise BadRequest(400, "The request has more than one Transfer-Encoding header.")
    if not _CODING.fullmatch(codings[0]):
        raise BadRequest(400, "The Transfer-Encoding is not a list of names.")
    names = [name.strip(b" \t").lower() for name in codings[0].split(b",")]
    if names[-1] != b"chunked" or names.count(b"chunked") > 1:
        raise BadRequest(400, "The Transfer-Encoding does not end in 'chunked', or names it twice.")


@final
@attrs.frozen(kw_only=True)
class Upgrade:
    """The upgrade that a request asks for.

    Attributes:
        protocols: of its Upgrade headers, lower-case, in order of preference; of each header the first 64.
        subprotocols: of its Sec-WebSocket-Protocol headers, as written (they are case-sensitive), in order of
            preference; of each header the first 64.
        websocket: True for a GET that names `websocket`. The WebSocket engine checks key and version, and answers.
    """

    protocols: tuple[str, ...]
    subprotocols: tuple[str, ...]
    websocket: bool


def wants_upgrade(head: RequestHead) -> Upgrade | None:
    """The upgrade that `head` asks for. None without an Upgrade header or `Connection: upgrade`, and for HTTP/1.0.

    None means that a server must not answer 101. A server that breaks the rules may still do so.
    """
    if not head.asks_upgrade:
        return None
    # A protocol may have a version, as in `TLS/1.2`, so it need not be a token.
    protocols = tuple(member.decode("latin-1").lower() for member in head.members(b"upgrade"))
    return Upgrade(
        protocols=protocols,
        subprotocols=tuple(
            member.decode("ascii") for member in head.members(b"sec-websocket-protocol") if _TOKEN.fullmatch(member)
        ),
        websocket=head.method == b"GET" and "websocket" in protocols,
    )


def error_response(
    status: int, text: str, *, omit_body: bool = False, headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """The bytes of an error response, after which the connection is closed.

    Args:
        status: one of those in docs/operating.md.
        text: a sentence for people. It becomes the body, cleaned by `clean_message`, as plain text that browsers do not
            sniff. Caches must not store it.
        omit_body: for HEAD: the same headers without the body.
        headers: further headers; their values are ASCII.

    Raises:
        LocalProtocolError: a relay does not answer `status`.
    """
    from http import HTTPStatus  # noqa: PLC0415  # only errors need it

    if status not in _STATUSES:
        raise LocalProtocolError(f"a relay does not answer {status}; it answers {sorted(_STATUSES)}")
    body = clean_message(text).encode("utf-8", "replace") + b"\n"
    further = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"{further}"
        "Connection: close\r\n"
        "\r\n"
    )
    return head.encode("ascii") + (b"" if omit_body else body)
