"""Plain requests and responses, which are recognised by one pattern each. No I/O.

Most messages are plain. Of a plain one, only its end matters to who follows a connection, so nothing else is parsed:

    a request     is for a path, HTTP/1.1, and neither a HEAD nor a CONNECT. It has one Host, then at most one
                  Content-Length, and neither Transfer-Encoding nor Upgrade
    a response    is final, HTTP/1.1, and neither a 204 nor a 304. It has either one Content-Length, or one
                  Transfer-Encoding that is `chunked`

A pattern matches only what `head`, `requests` and `responses` understand in the same way. Whatever it does not match
takes the general way, also when it is right. `tests/http/test_plain.py` compares both ways.
"""

from __future__ import annotations

import re
from typing import Final

from .head import FIELD, MAX_HEADERS, TARGET, TOKEN, VALUE

__all__ = ["PLAIN_REQUEST", "PLAIN_RESPONSE"]

_LENGTH: Final = rb"content-length:[ \t]*+([0-9]{1,18}+)"
_CHUNKED: Final = rb"transfer-encoding:[ \t]*+chunked"
# Of each of the three parts of a head, so that all together are no more than may be.
_MOST_FIELDS: Final = rb"{0,%d}+" % (MAX_HEADERS // 3 - 1)
_OF_REQUEST: Final = rb"(?:(?!(?i:host|content-length|transfer-encoding|upgrade):)%s\r\n)" % FIELD + _MOST_FIELDS
_OF_RESPONSE: Final = rb"(?:(?!(?i:content-length|transfer-encoding):)%s\r\n)*+" % FIELD

PLAIN_REQUEST: Final = re.compile(
    rb"(?!(?:HEAD|CONNECT) )%s /%s*+ HTTP/1\.1\r\n" % (TOKEN, TARGET)
    + rb"%s(?i:host):[ \t]*+([0-9A-Za-z_.:\[\]-]++)[ \t]*+\r\n" % _OF_REQUEST
    + rb"%s(?:(?i:%s)[ \t]*+\r\n%s)?\r\n" % (_OF_REQUEST, _LENGTH, _OF_REQUEST)
)
"""Matches the head of a plain request: its Host as written, and its Content-Length or None. The Host may be wrong."""

PLAIN_RESPONSE: Final = re.compile(
    rb"HTTP/1\.1 (?!204|304)([2-9][0-9][0-9])(?: %s)?+\r\n" % VALUE
    + rb"%s(?i:%s|%s)[ \t]*+\r\n%s\r\n" % (_OF_RESPONSE, _LENGTH, _CHUNKED, _OF_RESPONSE)
)
"""Matches the head of a plain response: its status, and its Content-Length; None if it is chunked."""
