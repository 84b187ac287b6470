"""The head of a visitor's request: read strictly, within bounds, once, and never written again.

`HeadReader` takes the bytes as they come and says whom they are for. The relay then forwards the very bytes that it
read, so the gateway behind it reads them a second time; a request that two readers could understand in two ways is
how one tenant's visitor reaches another tenant's gateway. Hence a rule for all that follows: where RFC 9110 and 9112
let a recipient choose between repairing and refusing, this one refuses, since repairing would mean to write. There is
one parse, and one host: whatever is decided about a request, later too, is decided by its `RequestHead`.

What is read, in the order of the bytes, so that the verdict is the same in however many pieces they come:

    1. at most one empty line (below)
    2. method SP target SP HTTP/1.0 or HTTP/1.1; the target is a path, an absolute http or https URL, or `*` of
       OPTIONS. Bytes from 0x80 on may stand in it, as browsers and curl send them: nothing here depends on them
    3. `name: value` lines, each on one line; every line ends in CR LF
    4. the empty line; then, of all headers together: exactly one Host, which is well-formed, and framing that leaves
       no doubt (a single Content-Length, or a single Transfer-Encoding that ends in `chunked`, or neither)

An absolute URL as the target has to name the host and the port of the Host header. RFC 9112, 3.2.2 has a server go by
the target and ignore the Host, but some servers go by the Host. Where both are the same, it does not matter.

The empty line before a request: RFC 9112, 2.2 asks every server to ignore at least one, so one is forwarded with the
rest, unchanged, and means nothing at either end, or gets a 400 from the gateway itself. No more is promised of a second
one, so two are refused here.

Neighbours: the ingress feeds a reader, routes by `RequestHead.host`, and answers with `error_response` where it cannot;
`framing` reads the later heads of a connection with readers of their own; `bodies` reads trailers with `read_field`.
Nothing here waits or reads. A reader looks at each byte a fixed number of times, whether they come at once or singly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from http import HTTPStatus
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
    "VALUE",
    "BadRequest",
    "HeadReader",
    "RequestHead",
    "Upgrade",
    "error_response",
    "read_field",
    "read_framing",
    "wants_upgrade",
]

MAX_HEAD: Final = 64 * 1024
"""Bytes of a head, all of it counted."""
MAX_LINE: Final = 16 * 1024
"""Bytes of one line, its end counted: twice what servers commonly take."""
MAX_HEADERS: Final = 128
"""Header lines of a head."""

_TOKEN_CHARS: Final = rb"!#$%&'*+.^_`|~0-9A-Za-z-"
# Possessive throughout (`++`, `*+`): what was matched is not tried again, so no input takes more than linear time.
_TOKEN: Final = re.compile(rb"[%s]++" % _TOKEN_CHARS)
_REQUEST_LINE: Final = re.compile(rb"([%s]++) ([!-~\x80-\xff]++) HTTP/([0-9]\.[0-9])" % _TOKEN_CHARS)
_ABSOLUTE: Final = re.compile(rb"(?i:http(s)?)://([^/?]++)(?:[/?].*+|)")
# The white space around a value is cut off later: to match it here would invite to try it in many ways.
VALUE: Final = rb"[^\x00-\x08\x0a-\x1f\x7f]*+"
"""Matches what stands after the colon of a header, and any other text of a head."""
FIELD: Final = rb"[%s]++:%s" % (_TOKEN_CHARS, VALUE)
"""Matches the line of a header without its end."""
_FIELD: Final = re.compile(rb"([%s]++):(%s)" % (_TOKEN_CHARS, VALUE))
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]++\]|[0-9A-Za-z_.-]++)(?::([0-9]{0,5}))?")
# 18 digits: every such length fits a signed 64-bit integer, so that no reader behind us wraps around.
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_CODING: Final = re.compile(rb"[%s]++(?:[ \t]*+,[ \t]*+[%s]++)*+" % (_TOKEN_CHARS, _TOKEN_CHARS))

_HEAD: Final = b"HEAD"
# An `Upgrade` or `Connection` header may have 16 KiB of members. To take each of them into a list costs much time.
_NAMES_UPGRADE: Final = re.compile(rb"(?:\A|,)[ \t]*+upgrade[ \t]*+(?:,|\Z)", re.IGNORECASE)
_NOT_EMPTY: Final = re.compile(rb"[^ \t,]")
_MEMBER: Final = re.compile(rb"[^,]++")
_MOST_MEMBERS: Final = 64

_CR: Final = 0x0D
_TLS_HANDSHAKE: Final = 0x16
_STATUSES: Final = frozenset({400, 404, 408, 421, 431, 502, 503, 504})


@final
class BadRequest(RemoteProtocolError):
    """The visitor's request is refused.

    Attributes:
        status: what to answer: 400, or 431 when it is too large; of a later request on a connection (`framing`) also
            408 when it comes too slowly.
        reason: a sentence for a person, which quotes nothing of the request.
        omit_body: True when the request is a HEAD, as far as it was read: the response has no body.
    """

    def __init__(self, status: int, reason: str, *, omit_body: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.omit_body = omit_body


@final
@attrs.frozen(kw_only=True)
class RequestHead:
    """One request's head, as it was read; the bytes themselves are with the reader.

    Target and headers may hold what lets a visitor in (a token, a cookie), so `repr` leaves them out.

    Attributes:
        method: the method, in the case that it was written in, which counts.
        target: the path with its query, an absolute URL, or `*`.
        version: `b"1.0"` or `b"1.1"`.
        host: whom the request is for: the Host without its port, as `address.normal_host` writes it (lower-case,
            without a trailing dot; an IPv6 address compressed and without brackets).
        host_header: the Host as it was written.
        headers: the headers in their order, names in lower case, values without the white space around them.
        length: how many bytes the head takes, the empty lines at both ends included.
        content_length: how many bytes follow it, when it says; None otherwise.
        chunked: True when a chunked body follows it.
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

    @property
    def omit_body(self) -> bool:
        """True for a HEAD, whose response has headers only, whatever they say of a body."""
        return self.method == _HEAD

    def values(self, name: bytes) -> list[bytes]:
        """The values of the headers called `name` (given in lower case), in their order."""
        return [value for header, value in self.headers if header == name]

    def members(self, name: bytes) -> Iterator[bytes]:
        """The members of the comma-separated lists in the headers called `name`, of each list the first 64."""
        for value in self.values(name):
            for match in islice(_MEMBER.finditer(value), _MOST_MEMBERS):
                if member := match[0].strip(b" \t"):
                    yield member


@final
class HeadReader:
    """Reads one request head, from bytes in any pieces.

    Give it whatever comes until it returns a head or raises; what it was given beyond the head is kept too, and
    `received` is all of it, to be forwarded. It holds no more than the bounds and one piece. For the next head on the
    same connection, make a new one.

    A head that comes too slowly, or ends in the middle, is for the caller to see: nothing here knows the time.
    """

    def __init__(self, *, max_head: int = MAX_HEAD, max_line: int = MAX_LINE, max_headers: int = MAX_HEADERS) -> None:
        self._max_head = max_head
        self._max_line = max_line
        self._max_headers = max_headers
        self._buffer = bytearray()
        # Where the line begins that is not complete yet, and up to where no end of it was found: not looked at again.
        self._line_start = 0
        self._scanned = 0
        self._request_line: tuple[bytes, bytes, bytes] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._finished = False

    @property
    def received(self) -> bytes:
        """Everything that was fed: what there is of the head, and what came with it."""
        return bytes(self._buffer)

    @property
    def omit_body(self) -> bool:
        """True when what there is of the head begins with the method HEAD."""
        return bytes(self._buffer[:8]).removeprefix(b"\r\n").startswith(_HEAD + b" ")

    def feed(self, data: bytes | bytearray | memoryview) -> RequestHead | None:
        """Take the next bytes; return the head once it is complete, None while it is not.

        The error, or the head, comes with the line that settles it, and depends on the bytes alone, not on the pieces
        that they come in.

        Raises:
            BadRequest: this is no request that can be routed; answer and close.
            LocalProtocolError: the reader has returned a head, or raised, before.
        """
        if self._finished:
            raise LocalProtocolError("a HeadReader reads one head; make another for the next")
        self._buffer += data
        self._finished = True  # also when this raises
        try:
            head = self._read_lines()
        except BadRequest as refused:
            refused.omit_body = self.omit_body
            raise
        self._finished = head is not None
        return head

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
        """Refuse at once what will never be a request: such a visitor may well wait for us to speak."""
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
        method, target, version = match.groups()
        if version == b"2.0":
            raise BadRequest(400, "This is HTTP/2, which is not spoken here; use HTTP/1.1.")
        if version not in {b"1.0", b"1.1"}:
            raise BadRequest(400, "This HTTP version is not spoken here; use HTTP/1.1.")
        if method == b"CONNECT":
            raise BadRequest(400, "CONNECT is for proxies, and this is none.")
        if not (target.startswith(b"/") or (method, target) == (b"OPTIONS", b"*") or _ABSOLUTE.fullmatch(target)):
            raise BadRequest(400, "The target of the request is neither a path nor an absolute http or https URL.")
        return method, target, version

    def _read_header(self, start: int, end: int) -> tuple[bytes, bytes]:
        if len(self._headers) >= self._max_headers:
            raise BadRequest(431, f"The request has more than {self._max_headers} headers.")
        return read_field(self._buffer, start, end)

    def _head(self, method: bytes, target: bytes, version: bytes) -> RequestHead:
        """What the lines say together.

        Raises:
            BadRequest: they do not say for whom the request is, or not where it ends.
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
        host, port = _read_authority(hosts[0], "The Host header")
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


def read_field(buffer: bytes | bytearray, start: int, end: int) -> tuple[bytes, bytes]:
    """The name, in lower case, and the value of the header or trailer whose line, without its end, is in `buffer`.

    Raises:
        BadRequest: it is not one name, a colon and a value, all on one line.
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


def _read_authority(value: bytes, what: str) -> tuple[str, int | None]:
    """The host that `value` names, in its normal form, and the port, None when it names none. An empty port is none.

    Args:
        what: where the value stands, for errors.

    Raises:
        BadRequest: it names no host, or more than a host and a port.
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
    """The length of a body, None when its head gives none, and whether it is chunked.

    Args:
        lengths: the values of all Content-Length headers.
        codings: those of all Transfer-Encoding headers.
        version: `b"1.0"` or `b"1.1"`.

    Raises:
        BadRequest: the body has no certain end.
    """
    if not codings:
        return _content_length(lengths) if lengths else None, False
    if lengths:
        raise BadRequest(400, "The request has both Content-Length and Transfer-Encoding.")
    _check_codings(codings, version)
    return None, True


def _content_length(lengths: list[bytes]) -> int:
    """The one Content-Length. Twice the same one would have to be repaired into one, so it is refused as well.

    Raises:
        BadRequest: there are several, or it is not a number of at most 18 digits.
    """
    if len(lengths) > 1 or b"," in lengths[0]:
        raise BadRequest(400, "The request has more than one Content-Length.")
    if not _LENGTH.fullmatch(lengths[0]):
        raise BadRequest(400, "The Content-Length is not a number of at most 18 digits.")
    return int(lengths[0])


def _check_codings(codings: list[bytes], version: bytes) -> None:
    """Let pass one Transfer-Encoding that is plainly chunked last and only there: RFC 9112, 6.1.

    Raises:
        BadRequest: what comes after the head would have no certain end.
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
    """What a request asks to go over to on its connection.

    Attributes:
        protocols: what its Upgrade headers name, lower-case, the one liked best first; of each header the first 64.
        subprotocols: what its Sec-WebSocket-Protocol headers offer, as written (their case counts), liked best first;
            of each header the first 64.
        websocket: True when it is a WebSocket opening: a GET that names `websocket`. Whether its key and version are
            right is for the WebSocket engine, which has an answer to either.
    """

    protocols: tuple[str, ...]
    subprotocols: tuple[str, ...]
    websocket: bool


def wants_upgrade(head: RequestHead) -> Upgrade | None:
    """What `head` asks to go over to, or None: it has no Upgrade header, no `Connection: upgrade`, or is HTTP/1.0.

    None means that no server may answer 101. It does not mean that none ever would.
    """
    if head.version == b"1.0" or not any(map(_NAMES_UPGRADE.search, head.values(b"connection"))):
        return None
    if not any(map(_NOT_EMPTY.search, head.values(b"upgrade"))):
        return None
    # A protocol may have a version, as in `TLS/1.2`: no token, and no matter here but for its name.
    protocols = tuple(member.decode("latin-1").lower() for member in head.members(b"upgrade"))
    return Upgrade(
        protocols=protocols,
        subprotocols=tuple(
            member.decode("ascii") for member in head.members(b"sec-websocket-protocol") if _TOKEN.fullmatch(member)
        ),
        websocket=head.method == b"GET" and "websocket" in protocols,
    )


def error_response(status: int, text: str, *, omit_body: bool = False) -> bytes:
    """The whole answer to a visitor whose request goes nowhere, after which the connection is closed.

    `text` is a sentence for a person. It goes into the body only, cleaned by `clean_message`, as plain text that no
    browser takes for anything else. Nothing keeps the answer: the next moment's may differ. `omit_body` is for HEAD,
    whose answer has the same headers and nothing after them.

    Raises:
        LocalProtocolError: `status` is none of those that a relay answers with.
    """
    if status not in _STATUSES:
        raise LocalProtocolError(f"a relay does not answer {status}; it answers {sorted(_STATUSES)}")
    body = clean_message(text).encode("utf-8", "replace") + b"\n"
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n"
        "\r\n"
    )
    return head.encode("ascii") + (b"" if omit_body else body)
