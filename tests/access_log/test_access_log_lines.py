"""The lines of an access log: what they say, and that no visitor can write others."""

from __future__ import annotations

import json
import re
from typing import Final

import attrs
import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel._http.head import HeadReader, RequestHead
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.access_log.entry import LONGEST_PATH, AccessLogFormat, Entry, request_entry, shown_address

COMMON: Final = re.compile(
    r'(?P<address>\S+) - - \[30/Nov/2026:17:00:00 \+0000\] "(?P<request>[^"]*)" (?P<status>\d+|-) (?P<bytes>\d+)'
    r" (?P<host>\S+) (?P<service>\S+) (?P<seconds>\d+\.\d{3}) (?P<id>\S+)"
)
WHEN: Final = 1796058000.0


def head_of(target: bytes, *headers: bytes, method: bytes = b"GET") -> RequestHead:
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: office.test", *headers, b"", b""]
    head = HeadReader().feed(b"\r\n".join(lines))
    assert head is not None
    return head


def entry_of(target: bytes, *headers: bytes, method: bytes = b"GET") -> Entry:
    entry = request_entry(head_of(target, *headers, method=method))
    return attrs.evolve(entry, time_unix=WHEN, seconds=0.25, address="192.0.2.7", status=200, sent_bytes=512)


def test_a_request_in_the_common_format() -> None:
    line = attrs.evolve(entry_of(b"/a/b", b"X-Request-ID: 4711"), service="web").line(AccessLogFormat.COMMON)
    expected = '192.0.2.7 - - [30/Nov/2026:17:00:00 +0000] "GET /a/b HTTP/1.1" 200 512 office.test web 0.250 4711'
    assert line == expected


def test_a_request_in_json() -> None:
    line = attrs.evolve(entry_of(b"/a/b"), tunnel="office", service="web").line(AccessLogFormat.JSON)
    assert json.loads(line) == {
        "time_unix": WHEN,
        "seconds": 0.25,
        "address": "192.0.2.7",
        "tunnel": "office",
        "service": "web",
        "host": "office.test",
        "method": "GET",
        "path": "/a/b",
        "http": "1.1",
        "status": 200,
        "sent_bytes": 512,
        "complete": True,
    }


def test_a_stream() -> None:
    entry = Entry(time_unix=WHEN, seconds=1.5, address="2001:db8::1", service="ssh", sent_bytes=7, received_bytes=9)
    line = entry.line(AccessLogFormat.COMMON)
    assert line == '2001:db8::1 - - [30/Nov/2026:17:00:00 +0000] "STREAM" - 7 - ssh 1.500 -'
    assert json.loads(entry.line(AccessLogFormat.JSON))["received_bytes"] == 9


@pytest.mark.parametrize("form", AccessLogFormat)
def test_secrets_are_not_in_it(form: AccessLogFormat) -> None:
    secrets = (b"Cookie: s3cret", b"Authorization: Bearer s3cret", b"Referer: http://s3cret/", b"X-Api-Key: s3cret")
    for target in (b"/a?token=s3cret", b"http://office.test/a?s3cret", b"/?s3cret", b"http://office.test?s3cret"):
        line = entry_of(target, *secrets).line(form)
        assert "s3cret" not in line
        assert "?" not in line


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b'/a"b', r"/a\x22b"),
        (b"/a\\b", r"/a\x5cb"),
        (b"/\xff\xfe", r"/\xff\xfe"),
        (b"http://office.test/x", "/x"),
        (b"http://office.test", "/"),
        (b"/http://other/x", "/http://other/x"),
    ],
)
def test_the_path_in_the_common_format(target: bytes, path: str) -> None:
    found = COMMON.fullmatch(entry_of(target).line(AccessLogFormat.COMMON))
    assert found is not None
    assert found["request"] == f"GET {path} HTTP/1.1"


def test_a_long_path_is_cut() -> None:
    assert len(entry_of(b"/" + b"x" * 16_000).line(AccessLogFormat.COMMON)) < LONGEST_PATH + 200
    assert len(entry_of(b"/" + b"\xff" * 16_000).line(AccessLogFormat.JSON)) < 8 * LONGEST_PATH
    assert len(entry_of(b"/", b"X-Request-ID: " + b"i" * 10_000).line(AccessLogFormat.COMMON)) < 400
    assert len(entry_of(b"/", method=b"M" * 10_000).line(AccessLogFormat.COMMON)) < 300


@given(
    method=st.binary(max_size=40),
    path=st.binary(max_size=60),
    request_id=st.binary(max_size=20),
    host=st.text(max_size=20),
    service=st.text(max_size=20),
)
def test_nobody_can_write_another_line(method: bytes, path: bytes, request_id: bytes, host: str, service: str) -> None:
    """Whatever comes: even what no reader of heads lets pass."""
    host, service = (text.encode("utf-8", "replace").decode() for text in (host, service))
    entry = Entry(
        time_unix=WHEN,
        seconds=0.0,
        address="192.0.2.7",
        method=method,
        path=path,
        version=b"1.1",
        request_id=request_id,
        host=host,
        service=service,
    )
    for form in AccessLogFormat:
        line = entry.line(form)
        assert line.isascii()
        assert line.isprintable()
    assert COMMON.fullmatch(entry.line(AccessLogFormat.COMMON)) is not None
    assert json.loads(entry.line(AccessLogFormat.JSON))["address"] == "192.0.2.7"


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("192.0.2.77", "192.0.2.0"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::"),
        ("fe80::1%eth0", "fe80::"),
    ],
)
def test_addresses_can_be_shortened(host: str, shown: str) -> None:
    assert shown_address(Address(host, 1), shortened=True) == shown
    assert shown_address(Address(host, 1), shortened=False) == host.partition("%")[0]
    assert shown_address(None, shortened=True) is None
