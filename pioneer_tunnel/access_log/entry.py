"""One line of an access log. No I/O.

Everything in it that a visitor can choose is escaped: a line never holds a control character, a byte beyond ASCII, or
a quote that ends a field. The query of a target, Referer, cookies and Authorization are never in it.
"""

from __future__ import annotations

import enum
import ipaddress
import json
import re
import time
from typing import Any, Final, final

import attrs

from .._http.head import RequestHead
from .._model.addresses import Address

__all__ = ["Entry", "AccessLogFormat", "a_log_format", "request_entry", "shown_address"]

LONGEST_PATH: Final = 2048
"""Bytes of a path; the rest is cut off. `...` at the end says so."""

LONGEST_ID: Final = 128
"""Bytes of a request id."""

_LONGEST_METHOD: Final = 32
_ORIGIN: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
# All but printable ASCII without the space, the quote and the backslash.
_NOT_PLAIN: Final = re.compile(rb"[^!#-\[\]-~]")
_MONTHS: Final = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class AccessLogFormat(enum.StrEnum):
    """The format of an access log."""

    COMMON = "common"
    JSON = "json"


def a_log_format(value: Any) -> AccessLogFormat:
    """The converter of a configuration's field.

    Raises:
        ValueError: there is no such format.
    """
    try:
        return AccessLogFormat(value)
    except ValueError:
        raise ValueError("allowed are 'common' and 'json'") from None


@final
@attrs.frozen(kw_only=True)
class Entry:
    """A request, or a stream whose requests are not followed.

    Attributes:
        time_unix: when it began, in seconds since 1970.
        seconds: until its end.
        address: the visitor's IP address; None if it is unknown.
        tunnel: the tunnel's id, at a relay; None if no tunnel is known.
        service: the service's name; "" for the first or only one.
        host: the host that the request names, or the one of the stream; None if there is none.
        method, path, version: of a request, as it came; None for a stream, and for a head that makes no sense.
        status: of the answer; None if there was none, and for a stream.
        sent_bytes: of the answer's body, or of the stream, to the visitor.
        received_bytes: of a stream, from the visitor; None for a request.
        request_id: `X-Request-ID` of the request; None if there is none.
        complete: False if it was cut off.
    """

    time_unix: float
    seconds: float
    address: str | None
    tunnel: str | None = None
    service: str = ""
    host: str | None = None
    method: bytes | None = None
    path: bytes | None = None
    version: bytes | None = None
    status: int | None = None
    sent_bytes: int = 0
    received_bytes: int | None = None
    request_id: bytes | None = None
    complete: bool = True

    def line(self, form: AccessLogFormat) -> str:
        """The line, without its end."""
        return self._json() if form is AccessLogFormat.JSON else self._common()

    def _common(self) -> str:
        """The Common Log Format, and after it host, service, seconds and request id."""
        if self.method is None:
            request = "-" if self.received_bytes is None else "STREAM"
        else:
            request = f"{_escaped(self.method)} {_escaped(self.path or b'-')} HTTP/{_escaped(self.version or b'-')}"
        return (
            f'{self.address or "-"} - - [{_common_time(self.time_unix)}] "{request}" {self.status or "-"}'
            f" {self.sent_bytes} {_word(self.host)} {_word(self.service)} {self.seconds:.3f}"
            f" {_escaped(self.request_id) if self.request_id else '-'}"
        )

    def _json(self) -> str:
        fields = {
            "time_unix": round(self.time_unix, 3),
            "seconds": round(self.seconds, 3),
            "address": self.address,
            "tunnel": self.tunnel,
            "service": self.service,
            "host": self.host,
            "method": _text(self.method),
            "path": _text(self.path),
            "http": _text(self.version),
            "status": self.status,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "request_id": _text(self.request_id),
            "complete": self.complete,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


def request_entry(head: RequestHead) -> Entry:
    """What an entry takes from the head of a request. Times and address are for the caller."""
    origin = _ORIGIN.match(head.target)
    path = head.target if origin is None else head.target[origin.end() :]
    path = path.partition(b"?")[0].partition(b"#")[0] or b"/"
    request_id = next(iter(head.values(b"x-request-id")), None)
    return Entry(
        time_unix=0.0,
        seconds=0.0,
        address=None,
        host=head.host,
        method=_cut(head.method, _LONGEST_METHOD),
        path=_cut(path, LONGEST_PATH),
        version=head.version,
        request_id=_cut(request_id, LONGEST_ID) if request_id else None,
    )


def shown_address(visitor: Address | None, *, shortened: bool) -> str | None:
    """The visitor's IP address; with `shortened`, its network: an IPv4 /24, or an IPv6 /48."""
    if visitor is None:
        return None
    host = visitor.host.partition("%")[0]
    if not shortened:
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False).network_address)


def _cut(text: bytes, length: int) -> bytes:
    return text if len(text) <= length else text[:length] + b"..."


def _common_time(time_unix: float) -> str:
    parts = time.gmtime(time_unix)
    month = _MONTHS[parts.tm_mon - 1]  # `strftime` writes it in the user's language
    return f"{parts.tm_mday:02}/{month}/{parts.tm_year:04}:{parts.tm_hour:02}:{parts.tm_min:02}:{parts.tm_sec:02} +0000"


def _escaped(text: bytes) -> str:
    return _NOT_PLAIN.sub(lambda found: b"\\x%02x" % found[0][0], text).decode("ascii")


def _word(text: str | None) -> str:
    return _escaped(text.encode()) if text else "-"


def _text(value: bytes | None) -> str | None:
    """For JSON, which escapes control characters, and here all that is not ASCII."""
    return None if value is None else value.decode("utf-8", "backslashreplace")
