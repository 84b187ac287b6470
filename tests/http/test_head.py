"""`_http.head`: one result for one head, whatever its pieces, and one host."""

from __future__ import annotations

from typing import Any

import pytest
from heads import read, request, singly, verdict

from pioneer_tunnel._http.head import (
    MAX_HEAD,
    MAX_HEADERS,
    MAX_LINE,
    BadRequest,
    HeadReader,
    RequestHead,
)
from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError


def test_a_head_is_read_and_its_bytes_are_kept() -> None:
    head = (
        b"POST /a?b=c#d HTTP/1.1\r\nAccept:*/*\r\nhOST: \tGateway.Example.:8443 \t\r\nX-Empty:\r\nX-Empty: \t\r\n"
        b"X-Text: \xc3\xa9 \t two  spaces\t \r\nContent-Length: 5\r\n\r\n"
    )
    reader = HeadReader()
    found = reader.feed(head + b"hello")
    assert found == RequestHead(
        method=b"POST",
        target=b"/a?b=c#d",
        version=b"1.1",
        host="gateway.example",
        host_header=b"Gateway.Example.:8443",
        headers=(
            (b"accept", b"*/*"),
            (b"host", b"Gateway.Example.:8443"),
            (b"x-empty", b""),
            (b"x-empty", b""),
            (b"x-text", b"\xc3\xa9 \t two  spaces"),
            (b"content-length", b"5"),
        ),
        length=len(head),
        content_length=5,
        chunked=False,
    )
    assert reader.received == head + b"hello"
    assert found.values(b"x-empty") == [b"", b""]
    assert found.values(b"cookie") == []


def test_what_may_be_secret_is_not_in_the_repr() -> None:
    shown = repr(read(request(b"Authorization: Bearer s3cret", first=b"GET /?token=s3cret HTTP/1.1")))
    assert "s3cret" not in shown
    assert "a.example" in shown


@pytest.mark.parametrize(
    ("written", "host"),
    [
        (b"a.example", "a.example"),
        (b"A.EXAMPLE", "a.example"),
        (b"a.example.", "a.example"),
        (b"a.example:1", "a.example"),
        (b"a.example.:65535", "a.example"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"under_score.example", "under_score.example"),
        (b"localhost:8080", "localhost"),
        (b"a.example:", "a.example"),
        (b"[::1]:", "::1"),
        (b"203.0.113.9:80", "203.0.113.9"),
        (b"[2001:DB8:0:0::1]", "2001:db8::1"),
        (b"[2001:db8::1]:443", "2001:db8::1"),
        (b"[::1]:8080", "::1"),
        (b"a" * 63 + b".example", "a" * 63 + ".example"),
    ],
)
def test_host(written: bytes, host: str) -> None:
    found = read(request(host=written))
    assert (found.host, found.host_header) == (host, written)
    assert read(request(host=None, first=b"GET / HTTP/1.0\r\nHOST:" + written)).host == host


@pytest.mark.parametrize(
    "first",
    [
        b"OPTIONS * HTTP/1.1",
        b"get / HTTP/1.1",
        b"M-SEARCH /!$&'()*+,;=:@%20 HTTP/1.1",
        b"GET //b.example/path HTTP/1.1",
        b"GET /?next=http://b.example/ HTTP/1.1",
        b"HEAD / HTTP/1.0",
        b"GET /caf\xc3\xa9?q=\x80\xff HTTP/1.1",
        b"GET http://a.example/b?c HTTP/1.1",
        b"GET http://a.example HTTP/1.1",
        b"GET https://a.example?b HTTP/1.0",
        b"OPTIONS HTTP://A.Example.:80/ HTTP/1.1",
        b"GET http://a.example:/\xe9 HTTP/1.1",
    ],
)
def test_request_lines_that_are_right(first: bytes) -> None:
    found = read(request(first=first))
    assert b" ".join([found.method, found.target, b"HTTP/" + found.version]) == first


@pytest.mark.parametrize(
    ("target", "host"),
    [
        (b"http://a.example/", b"A.EXAMPLE:80"),
        (b"http://a.example:80/", b"a.example"),
        (b"https://a.example/", b"a.example:443"),
        (b"https://a.example:/", b"a.example:"),
        (b"http://a.example:8080/", b"a.example:8080"),
        (b"http://[2001:DB8:0::1]/", b"[2001:db8::1]"),
    ],
)
def test_an_absolute_target_names_the_host_of_the_header(target: bytes, host: bytes) -> None:
    found = read(request(first=b"GET %s HTTP/1.1" % target, host=host))
    assert (found.target, found.host_header) == (target, host)


@pytest.mark.parametrize(
    ("lines", "content_length", "chunked"),
    [
        ([], None, False),
        ([b"Content-Length: 0"], 0, False),
        ([b"Content-Length: 007"], 7, False),
        ([b"Content-Length: 999999999999999999"], 999_999_999_999_999_999, False),
        ([b"Transfer-Encoding: chunked"], None, True),
        ([b"Transfer-Encoding: Chunked"], None, True),
        ([b"Transfer-Encoding: gzip , \tCHUNKED"], None, True),
    ],
)
def test_framing(lines: list[bytes], content_length: int | None, chunked: bool) -> None:
    found = read(request(*lines))
    assert (found.content_length, found.chunked) == (content_length, chunked)


def test_one_empty_line_comes_first_and_is_part_of_the_head() -> None:
    plain = read(request())
    found = read(b"\r\n" + request())
    assert found.length == plain.length + 2
    assert found.host == plain.host


def test_a_request_that_follows_is_not_looked_at() -> None:
    first = request(host=b"a.example")
    assert read(first + request(host=b"b.example") + b"\n\0").length == len(first)
    assert read(first + b"x" * 1_000_000).length == len(first)


ATTACKS: dict[str, tuple[bytes, int, str]] = {
    # whom it is for
    "no Host": (request(host=None), 400, "no Host"),
    "no Host, HTTP/1.0": (request(first=b"GET / HTTP/1.0", host=None), 400, "no Host"),
    "two Hosts": (request(b"Host: b.example"), 400, "more than one Host"),
    "two Hosts, equal": (request(b"Host: a.example"), 400, "more than one Host"),
    "two Hosts, other case": (request(b"X: y", b"hOsT: b.example"), 400, "more than one Host"),
    "two Hosts, one of them empty": (request(b"Host:"), 400, "more than one Host"),
    "empty Host": (request(host=b""), 400, "empty"),
    "blank Host": (request(host=b" \t "), 400, "empty"),
    "Host is a list": (request(host=b"a.example, b.example"), 400, "Host"),
    "Host is a list without a space": (request(host=b"a.example,b.example"), 400, "Host"),
    "Host with a space": (request(host=b"a.example b.example"), 400, "Host"),
    "Host with a tab": (request(host=b"a.example\tb.example"), 400, "Host"),
    "Host with a path": (request(host=b"a.example/b"), 400, "Host"),
    "Host with a query": (request(host=b"a.example?b"), 400, "Host"),
    "Host with a fragment": (request(host=b"a.example#b"), 400, "Host"),
    "Host with a backslash": (request(host=b"a.example\\b"), 400, "Host"),
    "Host with userinfo": (request(host=b"b.example@a.example"), 400, "Host"),
    "Host is a URL": (request(host=b"http://a.example"), 400, "Host"),
    "Host percent-encoded": (request(host=b"a%2eexample"), 400, "Host"),
    "Host with a wildcard": (request(host=b"*.example"), 400, "Host"),
    "Host not ASCII": (request(host=b"b\xc3\xbccher.example"), 400, "Host"),
    "Host with a fullwidth dot": (request(host="a\uff0eexample".encode()), 400, "Host"),
    "Host with the Kelvin sign": (request(host="\u212aa.example".encode()), 400, "Host"),
    "Host with two dots": (request(host=b"a..example"), 400, "Host"),
    "Host with two dots at its end": (request(host=b"a.example.."), 400, "Host"),
    "Host with a dot at its start": (request(host=b".a.example"), 400, "Host"),
    "Host is a dot": (request(host=b"."), 400, "Host"),
    "Host with a hyphen at its start": (request(host=b"-a.example"), 400, "Host"),
    "Host with a long label": (request(host=b"a" * 64 + b".example"), 400, "Host"),
    "Host too long": (request(host=b"a." * 127 + b"example"), 400, "Host"),
    "Host much too long": (request(host=b"a." * 7000 + b"example"), 400, "Host"),
    "Host with two empty ports": (request(host=b"a.example::"), 400, "Host"),
    "Host is only an empty port": (request(host=b":"), 400, "Host"),
    "Host with port 0": (request(host=b"a.example:0"), 400, "Host"),
    "Host with port 65536": (request(host=b"a.example:65536"), 400, "Host"),
    "Host with a long port": (request(host=b"a.example:000080"), 400, "Host"),
    "Host with a port in letters": (request(host=b"a.example:http"), 400, "Host"),
    "Host with a signed port": (request(host=b"a.example:+80"), 400, "Host"),
    "Host with two ports": (request(host=b"a.example:80:80"), 400, "Host"),
    "Host is only a port": (request(host=b":80"), 400, "Host"),
    "Host with half a bracket": (request(host=b"[::1"), 400, "Host"),
    "Host with the other half": (request(host=b"::1]"), 400, "Host"),
    "Host with something after the bracket": (request(host=b"[::1]a.example"), 400, "Host"),
    "Host with empty brackets": (request(host=b"[]"), 400, "Host"),
    "Host with a name in brackets": (request(host=b"[a.example]"), 400, "Host"),
    "Host, hexadecimal but no address": (request(host=b"[bad]"), 400, "Host"),
    "Host, IPv6 without brackets": (request(host=b"2001:db8::1"), 400, "Host"),
    "Host, IPv6 with a zone": (request(host=b"[fe80::1%25eth0]"), 400, "Host"),
    "Host, IPv4 of three parts": (request(host=b"127.0.1"), 400, "Host"),
    "Host, IPv4 out of range": (request(host=b"203.0.113.256"), 400, "Host"),
    "Host, IPv4 with an octal part": (request(host=b"0203.0.113.9"), 400, "Host"),
    "Host, a number": (request(host=b"2130706433"), 400, "Host"),
    # the request line
    "absolute-form, another host": (request(first=b"GET http://b.example/ HTTP/1.1"), 400, "another host"),
    "absolute-form, another port": (request(first=b"GET http://a.example:8080/ HTTP/1.1"), 400, "another host"),
    "absolute-form, the other default": (
        request(first=b"GET https://a.example/ HTTP/1.1", host=b"a.example:80"),
        400,
        "another host",
    ),
    "absolute-form, a Host without its port": (
        request(first=b"GET http://a.example/ HTTP/1.1", host=b"a.example:8080"),
        400,
        "another host",
    ),
    "absolute-form, userinfo": (request(first=b"GET http://a.example@b.example/ HTTP/1.1"), 400, "target"),
    "absolute-form, our userinfo": (request(first=b"GET http://b@a.example/ HTTP/1.1"), 400, "target"),
    "absolute-form, a backslash": (request(first=b"GET http://a.example\\@b.example/ HTTP/1.1"), 400, "target"),
    "absolute-form, a fragment": (request(first=b"GET http://a.example#/ HTTP/1.1"), 400, "target"),
    "absolute-form, percent-encoded": (request(first=b"GET http://a%2eexample/ HTTP/1.1"), 400, "target"),
    "absolute-form, not ASCII": (request(first=b"GET http://a.example\xff/ HTTP/1.1"), 400, "target"),
    "absolute-form, no host": (request(first=b"GET http:///a.example HTTP/1.1"), 400, "target"),
    "absolute-form, only a port": (request(first=b"GET http://:80/ HTTP/1.1"), 400, "target"),
    "absolute-form, another scheme": (request(first=b"GET ftp://a.example/ HTTP/1.1"), 400, "target"),
    "absolute-form, one slash": (request(first=b"GET http:/a.example/ HTTP/1.1"), 400, "target"),
    "absolute-form, no Host": (request(first=b"GET http://a.example/ HTTP/1.1", host=None), 400, "no Host"),
    "absolute-form, two Hosts": (
        request(b"Host: a.example", first=b"GET http://a.example/ HTTP/1.1"),
        400,
        "more than one Host",
    ),
    "authority-form": (request(first=b"GET a.example:80 HTTP/1.1"), 400, "target"),
    "CONNECT": (request(first=b"CONNECT a.example:443 HTTP/1.1"), 400, "CONNECT"),
    "CONNECT to a path": (request(first=b"CONNECT / HTTP/1.1"), 400, "CONNECT"),
    "asterisk of GET": (request(first=b"GET * HTTP/1.1"), 400, "target"),
    "asterisk and more": (request(first=b"OPTIONS *a HTTP/1.1"), 400, "target"),
    "target is a query": (request(first=b"GET ?a HTTP/1.1"), 400, "target"),
    "two spaces after the method": (request(first=b"GET  / HTTP/1.1"), 400, "request line"),
    "two spaces before the version": (request(first=b"GET /  HTTP/1.1"), 400, "request line"),
    "a tab": (request(first=b"GET\t/ HTTP/1.1"), 400, "request line"),
    "a space at the end": (request(first=b"GET / HTTP/1.1 "), 400, "request line"),
    "a space in the target": (request(first=b"GET /a b HTTP/1.1"), 400, "request line"),
    "a space at the start": (request(first=b" GET / HTTP/1.1"), 400, "begin with a method"),
    "NUL in the target": (request(first=b"GET /\0 HTTP/1.1"), 400, "control"),
    "DEL in the target": (request(first=b"GET /\x7f HTTP/1.1"), 400, "control"),
    "CR in the target": (request(first=b"GET /\r HTTP/1.1"), 400, "control"),
    "CR at the end": (request(first=b"GET / HTTP/1.1\r"), 400, "control"),
    "target begins with no ASCII": (request(first=b"GET \xc3\xa9 HTTP/1.1"), 400, "target"),
    "method not ASCII": (request(first=b"G\xc3\x89T / HTTP/1.1"), 400, "request line"),
    "method with a colon": (request(first=b"GET: / HTTP/1.1"), 400, "request line"),
    "no target": (request(first=b"GET HTTP/1.1"), 400, "request line"),
    "no method": (request(first=b"/ HTTP/1.1"), 400, "begin with a method"),
    "only a method": (request(first=b"GET"), 400, "request line"),
    "a response": (request(first=b"HTTP/1.1 200 OK"), 400, "request line"),
    "a header first": (request(first=b"Host: a.example", host=None), 400, "request line"),
    # the version
    "HTTP/0.9": (b"GET /\r\n", 400, "request line"),
    "HTTP/0.9, named": (request(first=b"GET / HTTP/0.9"), 400, "version"),
    "HTTP/1.2": (request(first=b"GET / HTTP/1.2"), 400, "version"),
    "HTTP/3.0": (request(first=b"GET / HTTP/3.0"), 400, "version"),
    "HTTP/2.0": (request(first=b"GET / HTTP/2.0"), 400, "HTTP/2"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 400, "HTTP/2"),
    "version of two digits": (request(first=b"GET / HTTP/1.10"), 400, "request line"),
    "version of one number": (request(first=b"GET / HTTP/1"), 400, "request line"),
    "version with a leading zero": (request(first=b"GET / HTTP/01.1"), 400, "request line"),
    "version in lower case": (request(first=b"GET / http/1.1"), 400, "request line"),
    "another protocol": (request(first=b"GET / RTSP/1.0"), 400, "request line"),
    # lines and their ends
    "TLS": (b"\x16\3\1\2\0\1\0\1\xfc\3\3", 400, "TLS"),
    "SOCKS 5": (b"\5\1\0", 400, "begin with a method"),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", 400, "request line"),
    "PROXY header": (b"\r\n\r\n\0\r\nQUIT\n", 400, "empty line"),
    "two empty lines first": (b"\r\n\r\n" + request(), 400, "empty line"),
    "an LF first": (b"\n" + request(), 400, "begin with a method"),
    "a CR first": (b"\r" + request(), 400, "control"),
    "CR CR LF first": (b"\r\r\n" + request(), 400, "control"),
    "CR LF LF first": (b"\r\n\n" + request(), 400, "begin with a method"),
    "bare LF after the request line": (b"GET / HTTP/1.1\nHost: a.example\r\n\r\n", 400, "LF without CR"),
    "bare LF after a header": (b"GET / HTTP/1.1\r\nHost: a.example\n\r\n", 400, "LF without CR"),
    "bare LF as the empty line": (b"GET / HTTP/1.1\r\nHost: a.example\r\n\n", 400, "LF without CR"),
    "bare LF within a header": (request(b"X: a\nHost: b.example"), 400, "LF without CR"),
    "bare CR within a header": (request(b"X: a\rHost: b.example"), 400, "control"),
    "CR CR LF": (request(b"X: a\r"), 400, "control"),
    # headers
    "folded with a space": (request(b"X: a", b" b"), 400, "folded"),
    "folded with a tab": (request(b"X: a", b"\tHost: b.example"), 400, "folded"),
    "folded first header": (b"GET / HTTP/1.1\r\n X: a\r\nHost: a.example\r\n\r\n", 400, "folded"),
    "folded and blank": (request(b" "), 400, "folded"),
    "NUL in a value": (request(b"X: a\0b"), 400, "control"),
    "NUL in Host": (request(host=b"a.example\0.b.example"), 400, "control"),
    "escape in a value": (request(b"X: \x1b[31m"), 400, "control"),
    "vertical tab in a value": (request(b"Transfer-Encoding:\x0bchunked"), 400, "control"),
    "form feed in a value": (request(b"X: a\x0c"), 400, "control"),
    "DEL in a value": (request(b"X: a\x7f"), 400, "control"),
    "space before the colon": (request(b"Content-Length : 5"), 400, "before its colon"),
    "tab before the colon": (request(b"Content-Length\t: 5"), 400, "before its colon"),
    "space before the colon of Host": (b"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n", 400, "before its colon"),
    "space within a name": (request(b"X Y: 5"), 400, "name"),
    "empty name": (request(b": 5"), 400, "name"),
    "name not ASCII": (request(b"X\xc3\xa9: 5"), 400, "name"),
    "name with a parenthesis": (request(b"X(y): 5"), 400, "name"),
    "name in quotes": (request(b'"Host": b.example'), 400, "name"),
    "NUL in a name": (request(b"Ho\0st: b.example"), 400, "control"),
    "no colon": (request(b"X"), 400, "no colon"),
    "a request line among headers": (request(b"GET / HTTP/1.1"), 400, "no colon"),
    # framing
    "Content-Length with Transfer-Encoding": (
        request(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        400,
        "both Content-Length and Transfer-Encoding",
    ),
    "Transfer-Encoding with Content-Length": (
        request(b"transfer-encoding: chunked", b"content-length: 5"),
        400,
        "both Content-Length and Transfer-Encoding",
    ),
    "differing Content-Lengths": (request(b"Content-Length: 5", b"Content-Length: 6"), 400, "more than one Content"),
    "equal Content-Lengths": (request(b"Content-Length: 5", b"Content-Length: 5"), 400, "more than one Content"),
    "Content-Length, a list": (request(b"Content-Length: 5, 5"), 400, "more than one Content"),
    "Content-Length, empty": (request(b"Content-Length:"), 400, "Content-Length"),
    "Content-Length, signed": (request(b"Content-Length: +5"), 400, "Content-Length"),
    "Content-Length, negative": (request(b"Content-Length: -1"), 400, "Content-Length"),
    "Content-Length, hexadecimal": (request(b"Content-Length: 0x5"), 400, "Content-Length"),
    "Content-Length, underscored": (request(b"Content-Length: 1_0"), 400, "Content-Length"),
    "Content-Length, a fraction": (request(b"Content-Length: 5.0"), 400, "Content-Length"),
    "Content-Length, two numbers": (request(b"Content-Length: 5 6"), 400, "Content-Length"),
    "Content-Length, other digits": (request("Content-Length: \u0665".encode()), 400, "Content-Length"),
    "Content-Length, 19 digits": (request(b"Content-Length: " + b"9" * 19), 400, "Content-Length"),
    "Content-Length, 5000 digits": (request(b"Content-Length: " + b"9" * 5000), 400, "Content-Length"),
    "Transfer-Encoding, HTTP/1.0": (
        request(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0"),
        400,
        "HTTP/1.0 with a Transfer-Encoding",
    ),
    "Transfer-Encoding, not chunked": (request(b"Transfer-Encoding: gzip"), 400, "chunked"),
    "Transfer-Encoding, identity": (request(b"Transfer-Encoding: identity"), 400, "chunked"),
    "Transfer-Encoding, chunked not last": (request(b"Transfer-Encoding: chunked, gzip"), 400, "chunked"),
    "Transfer-Encoding, chunked twice": (request(b"Transfer-Encoding: chunked, chunked"), 400, "chunked"),
    "Transfer-Encoding, nearly chunked": (request(b"Transfer-Encoding: xchunked"), 400, "chunked"),
    "Transfer-Encoding, quoted": (request(b'Transfer-Encoding: "chunked"'), 400, "list of names"),
    "Transfer-Encoding, a parameter": (request(b"Transfer-Encoding: chunked;a=b"), 400, "list of names"),
    "Transfer-Encoding, an empty member": (request(b"Transfer-Encoding: ,chunked"), 400, "list of names"),
    "Transfer-Encoding, empty": (request(b"Transfer-Encoding:"), 400, "list of names"),
    "Transfer-Encoding, two words": (request(b"Transfer-Encoding: chunked x"), 400, "list of names"),
    "two Transfer-Encodings": (
        request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        400,
        "more than one Transfer-Encoding",
    ),
    # size
    "long target": (request(first=b"GET /" + b"a" * MAX_LINE + b" HTTP/1.1"), 431, "request line"),
    "long method": (b"a" * MAX_LINE, 431, "request line"),
    "long header": (request(b"X: " + b"a" * MAX_LINE), 431, "header"),
    "long name": (request(b"a" * MAX_LINE), 431, "header"),
    "long head": (request(*[b"X: " + b"a" * 16000] * 5), 431, "head"),
    "many headers": (request(*[b"X: y"] * MAX_HEADERS), 431, "headers"),
    "many headers, the last malformed": (request(*[b"X: y"] * (MAX_HEADERS - 1), b"Z"), 431, "headers"),
}


@pytest.mark.parametrize(("data", "status", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attack(data: bytes, status: int, reason: str) -> None:
    found = verdict([data])
    assert isinstance(found, tuple), found
    assert found[0] == status
    assert reason in found[1]
    assert verdict(singly(data)) == found
    assert verdict([data[:7], data[7:20], data[20:]]) == found
    assert verdict([data + request() * 2]) == found


@pytest.mark.parametrize("first", [b"\x16", b"\0", b" ", b"\n", b"\x80", b"(", b"\r\n\r"])
def test_what_is_no_request_is_refused_before_its_line_ends(first: bytes) -> None:
    assert isinstance(verdict([first]), tuple)


def test_an_error_comes_with_its_line() -> None:
    """The error comes at once when no further bytes can make the head valid."""
    assert isinstance(verdict([b"GET a.example/ HTTP/1.1\r\n"]), tuple)
    assert isinstance(verdict([b"GET / HTTP/1.1\r\nX : y\r\n"]), tuple)
    assert verdict([b"GET / HTTP/1.1\r\nX : y"]) is None


def test_a_line_has_a_bound() -> None:
    longest = b"X: ".ljust(28, b"y") + b"\r\n"
    start = b"GET / HTTP/1.1\r\nHost: a\r\n"
    assert verdict([start + longest], max_line=30) is None
    assert isinstance(verdict([start + longest + b"\r\n"], max_line=30), RequestHead)
    assert verdict([start + longest[:-1]], max_line=30) is None
    for refused in (b"y" + longest, b"y" * 30, b"y" * 31, b"y" * 29 + b"\r\n"):
        for pieces in ([start + refused], singly(start + refused)):
            assert verdict(pieces, max_line=30) == (431, "A header has more than 30 bytes.")
    assert verdict([start], max_line=15) == (431, "The request line has more than 15 bytes.")
    assert verdict([start], max_line=16) is None


def test_the_head_has_a_bound() -> None:
    head = request(b"X: y")
    assert isinstance(verdict([head + b"body"], max_head=len(head)), RequestHead)
    assert verdict([head[:-1]], max_head=len(head)) is None
    for pieces in ([head], [head + b"body"], singly(head)):
        assert verdict(pieces, max_head=len(head) - 1) == (
            431,
            f"The head of the request has more than {len(head) - 1} bytes.",
        )
    longest = request(*[b"X: ".ljust(MAX_LINE - 2, b"y")] * 3)
    longest = longest[:-2] + b"Y: ".ljust(MAX_HEAD - len(longest) - 2, b"y") + b"\r\n\r\n"
    assert read(longest).length == MAX_HEAD
    assert verdict([longest[:-4] + b"y\r\n\r\n"]) == (431, f"The head of the request has more than {MAX_HEAD} bytes.")


def test_headers_have_a_bound() -> None:
    lines = [b"X: y", b"X: y"]
    assert isinstance(verdict([request(*lines)], max_headers=3), RequestHead)
    assert verdict([request(*lines)], max_headers=2) == (431, "The request has more than 2 headers.")
    assert len(read(request(*[b"X: y"] * (MAX_HEADERS - 1))).headers) == MAX_HEADERS


@pytest.mark.parametrize("before", [b"", b"\r\n"])
@pytest.mark.parametrize("data", [b"HEAD \0", b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD /" + b"a" * MAX_LINE])
def test_a_refused_head_is_known_as_one(before: bytes, data: bytes) -> None:
    for refused, omit_body in ((before + data, True), (before + data.replace(b"HEAD", b"HEADS"), False)):
        reader = HeadReader()
        with pytest.raises(BadRequest) as caught:
            reader.feed(refused + b"\r\n")
        assert caught.value.omit_body is reader.omit_body is omit_body
    assert read(request(first=b"HEAD / HTTP/1.1")).omit_body
    assert not read(request(first=b"head / HTTP/1.1")).omit_body


def test_a_reader_reads_one_head() -> None:
    reader = HeadReader()
    assert reader.feed(request()) is not None
    with pytest.raises(LocalProtocolError, match="make another"):
        reader.feed(b"")
    reader = HeadReader()
    with pytest.raises(BadRequest):
        reader.feed(b"\0")
    with pytest.raises(LocalProtocolError, match="make another"):
        reader.feed(b"")


def test_a_bad_request_is_the_other_ends_fault() -> None:
    refused = BadRequest(400, "The request has no Host header.")
    assert isinstance(refused, RemoteProtocolError)
    assert (refused.status, refused.reason, str(refused)) == (400, refused.reason, refused.reason)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_bytes_will_do(wrap: Any) -> None:
    reader = HeadReader()
    assert reader.feed(wrap(request()[:9])) is None
    assert reader.feed(wrap(request()[9:])) == read(request())
