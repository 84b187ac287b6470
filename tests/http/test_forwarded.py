"""`forwarded` and `rewriting`: no header by which a visitor names itself passes, and nothing else changes."""

from __future__ import annotations

import string
from typing import Any, Final

import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel._http.forwarded import HeaderRules
from pioneer_tunnel._http.head import HeadReader, RequestHead
from pioneer_tunnel._http.requests import Phase
from pioneer_tunnel._http.responses import ResponseFollower
from pioneer_tunnel._http.rewriting import RequestRewriter

VISITOR: Final = "203.0.113.9"
RULES: Final = HeaderRules(set_forwarded=True, visitor=VISITOR, tls=True)
SET: Final = [
    b"X-Forwarded-For: 203.0.113.9",
    b"X-Real-IP: 203.0.113.9",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: a.test",
    b"Forwarded: for=203.0.113.9;host=a.test;proto=https",
]
NAMES: Final = ["X-Forwarded-For", "X-Real-IP", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded"]
WEBSOCKET: Final = b"GET /ws HTTP/1.1\r\nHost: a.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
GET: Final = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
FORGED: Final = b"X-Forwarded-For: 127.0.0.1"


def head_of(data: bytes) -> RequestHead:
    head = HeadReader().feed(data)
    assert head is not None
    return head


def request(*lines: str, target: str = "/", method: str = "GET", host: str = "a.test") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def changed(data: bytes, rules: HeaderRules = RULES) -> list[bytes]:
    """The lines of a changed head, which is a valid head."""
    _, received = rules.apply(head_of(data), data)
    assert head_of(received).length == len(received)
    return received.removesuffix(b"\r\n\r\n").split(b"\r\n")


def rewriting(rules: HeaderRules = RULES) -> tuple[RequestRewriter, ResponseFollower]:
    responses = ResponseFollower()
    return RequestRewriter(rules, responses), responses


def feed(rewriter: RequestRewriter, data: bytes) -> bytes:
    passed = b"".join(map(bytes, rewriter.feed(data)))
    while rewriter.has_more:
        passed += b"".join(map(bytes, rewriter.feed(b"")))
    return passed


def test_the_headers_of_a_visitor_are_set() -> None:
    assert changed(GET) == [b"GET / HTTP/1.1", b"Host: a.test", *SET]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"visitor": "2001:db8::9"},
            ["X-Forwarded-For: 2001:db8::9", "X-Real-IP: 2001:db8::9", 'Forwarded: for="[2001:db8::9]";host=a.test'],
        ),
        ({"visitor": None}, ["Forwarded: host=a.test"]),
        ({"visitor": None, "tls": False}, ["X-Forwarded-Proto: http", "Forwarded: host=a.test;proto=http"]),
    ],
)
def test_only_what_is_known_is_set(changes: dict[str, Any], expected: list[str]) -> None:
    data = request(*(f"{name}: forged" for name in NAMES))
    rules = HeaderRules(**({"set_forwarded": True, "tls": None} | changes))
    assert {*changed(data, rules)[2:]} == {b"X-Forwarded-Host: a.test", *(line.encode() for line in expected)}


def test_a_host_with_a_port_is_quoted() -> None:
    assert changed(request(host="[2001:db8::1]:8443"))[-2:] == [
        b"X-Forwarded-Host: [2001:db8::1]:8443",
        b'Forwarded: for=203.0.113.9;host="[2001:db8::1]:8443";proto=https',
    ]


FORGERIES: Final = [
    "X-Forwarded-For",
    "x-forwarded-for",
    "X_Forwarded_For",
    "x-Forwarded_For",
    "X.Forwarded.For",
    "X~Forwarded|For",
    "X-Forwarded-Port",
    "X_FORWARDED_PORT",
    "X-Forwarded-Prefix",
    "X-Forwarded-Ssl",
    "X-Forwarded-Scheme",
    "X-Forwarded-Anything-New",
    "X-Real-IP",
    "X_Real_IP",
    "FORWARDED",
    "Forwarded-For",
    "X-Forwarded",
    "SCRIPT_NAME",
    "PATH_INFO",
    "WL-Proxy-Client-IP",
    "Client-IP",
    "True-Client-IP",
    "X-Scheme",
    "Front-End-Https",
]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_removed_however_it_is_spelled(name: str) -> None:
    data = request("Accept: a", f"{name}: 127.0.0.1", "X-Forward: kept", f"{name}:evil", "Accept: b")
    assert changed(data) == [
        b"GET / HTTP/1.1", b"Host: a.test", b"Accept: a", b"X-Forward: kept", b"Accept: b", *SET,
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_it_cannot_be_made_a_header_of_one_connection(name: str) -> None:
    """A proxy at the server would remove it, and the server would see none."""
    data = request(f"Connection: close, {name} ,keep-alive", f"Connection: {name}", "Connection: host")
    assert changed(data) == [b"GET / HTTP/1.1", b"Host: a.test", b"Connection: close, keep-alive", *SET]


def test_a_connection_header_of_a_thousand_options_is_refused() -> None:
    rewriter, _ = rewriting()
    assert feed(rewriter, request("Connection: " + ",".join(["a"] * 1000))) == b""
    assert rewriter.refusal is not None


@pytest.mark.parametrize("name", FORGERIES)
def test_it_cannot_come_as_a_trailer(name: str) -> None:
    rewriter, _ = rewriting()
    body = b"5\r\nhello\r\n0\r\n"
    passed = feed(rewriter, request("Transfer-Encoding: chunked", method="POST") + body + f"{name}: x\r\n\r\n".encode())
    assert passed.endswith(b"\r\n\r\n" + body)
    assert rewriter.refusal is not None


def test_other_trailers_pass() -> None:
    rewriter, _ = rewriting()
    body = b"5\r\nhello\r\n0\r\nDigest: x\r\n\r\n"
    assert feed(rewriter, request("Transfer-Encoding: chunked", method="POST") + body).endswith(body)


@pytest.mark.parametrize(
    ("method", "target", "path"),
    [
        ("GET", "http://a.test", b"/"),
        ("GET", "HTTPS://a.test:443/a?b=http://c/", b"/a?b=http://c/"),
        ("GET", "http://a.test?q", b"/?q"),
        ("OPTIONS", "http://a.test", b"*"),
        ("OPTIONS", "http://a.test/", b"/"),
        ("OPTIONS", "*", b"*"),
        ("GET", "/x:y//z", b"/x:y//z"),
    ],
)
def test_an_absolute_target_becomes_a_path(method: str, target: str, path: bytes) -> None:
    host = "a.test:443" if ":443" in target else "a.test"
    assert changed(request(method=method, target=target, host=host))[0] == b"%s %s HTTP/1.1" % (method.encode(), path)


@pytest.mark.parametrize("target", ["/path", "http://a.test/path"])
def test_the_host_is_set_alone(target: str) -> None:
    rules = HeaderRules(set_forwarded=False, visitor=VISITOR, host_header=b"localhost:3000")
    data = b"GET " + target.encode() + b" HTTP/1.1\r\nhost:  a.test\r\nx-forwarded-for: 1.2.3.4\r\n\r\n"
    assert changed(data, rules) == [b"GET /path HTTP/1.1", b"host: localhost:3000", b"x-forwarded-for: 1.2.3.4"]


def test_with_both_the_headers_name_the_host_that_the_visitor_named() -> None:
    rules = HeaderRules(set_forwarded=True, visitor=VISITOR, tls=True, host_header=b"localhost:3000")
    assert changed(GET, rules)[1:] == [b"Host: localhost:3000", *SET]


def test_the_opening_of_a_websocket_keeps_its_upgrade() -> None:
    assert changed(WEBSOCKET)[2:4] == [b"Upgrade: websocket", b"Connection: Upgrade"]


@pytest.mark.parametrize(
    "lines",
    [
        ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__"],
        ["Upgrade: h2c"],
        ["Upgrade: websocket, h2c", "Connection: Upgrade"],
        ["Upgrade: websocket", "Upgrade: h2c", "Connection: Upgrade"],
        ["Upgrade: TLS/1.2", "Connection: upgrade"],
        ["Upgrade: websocket"],
        ["Upgrade: " + "websocket," * 70 + "h2c", "Connection: upgrade"],
    ],
)
def test_any_other_upgrade_is_not_offered_to_the_server(lines: list[str]) -> None:
    assert changed(request("A: b", *lines, "C: d")) == [b"GET / HTTP/1.1", b"Host: a.test", b"A: b", b"C: d", *SET]
    rewriter, responses = rewriting()
    feed(rewriter, request(*lines))
    responses.feed(SWITCHING)
    assert FORGED not in feed(rewriter, request("X-Forwarded-For: 127.0.0.1"))
    assert rewriter.phase is not Phase.OPAQUE


def test_after_a_101_the_bytes_pass_unchanged() -> None:
    rewriter, responses = rewriting()
    forged = request("X-Forwarded-For: 127.0.0.1")
    assert feed(rewriter, WEBSOCKET + forged) == b"\r\n".join([*changed(WEBSOCKET), b"", b""])
    assert rewriter.holds
    assert responses.awaits_upgrade
    responses.feed(SWITCHING)
    assert feed(rewriter, b"") == forged
    assert feed(rewriter, forged) == forged


def test_after_another_response_to_an_upgrade_requests_are_followed() -> None:
    rewriter, responses = rewriting()
    feed(rewriter, WEBSOCKET + request("X-Forwarded-For: 127.0.0.1"))
    responses.feed(OK)
    assert FORGED not in feed(rewriter, b"")
    assert rewriter.phase is Phase.HEAD


@pytest.mark.parametrize("response", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_after_a_response_without_a_known_end_nothing_passes(response: bytes) -> None:
    """What follows in the response could look like a 101."""
    rewriter, responses = rewriting()
    feed(rewriter, GET)
    responses.feed(response)
    assert feed(rewriter, WEBSOCKET) == b""
    assert rewriter.is_over
    assert rewriter.refusal is None


MALFORMED: Final = {
    "two hosts": b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\nA: b\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a.test\r\nA: b\r\n X-Forwarded-For: 127.0.0.1\r\n\r\n",
    "white space before the colon": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For : 127.0.0.1\r\n\r\n",
    "a bare LF": b"GET / HTTP/1.1\r\nHost: a.test\r\nA: b\nX-Forwarded-For: 127.0.0.1\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: a.test\r\nA: b\rX-Forwarded-For: 127.0.0.1\r\n\r\n",
    "a NUL": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For\0: 127.0.0.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "both framings": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another host as the target": b"GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "CONNECT": b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
    "HTTP/0.9": b"GET /\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("before", [b"", GET], ids=["first", "later"])
def test_what_cannot_be_followed_is_refused(before: bytes, data: bytes) -> None:
    rewriter, _ = rewriting()
    passed = feed(rewriter, before)
    assert feed(rewriter, data) == b""
    assert passed == (b"\r\n".join([*changed(GET), b"", b""]) if before else b"")
    assert rewriter.refusal is not None
    assert rewriter.refusal.status == 400


def test_any_host_may_follow() -> None:
    rewriter, _ = rewriting()
    passed = feed(rewriter, GET + request(host="b.test"))
    assert b"X-Forwarded-Host: a.test\r\n" in passed
    assert b"X-Forwarded-Host: b.test\r\n" in passed


_TOKENS: Final = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=12)
_FRAMING: Final = {"host", "content-length", "transfer-encoding", "connection", "upgrade", "http2-settings"}
_HEADERS: Final = st.lists(
    st.tuples(
        st.one_of(_TOKENS.filter(lambda name: name.lower() not in _FRAMING), st.sampled_from(FORGERIES)),
        st.text("abc ,;=\t\xe9", max_size=8),
    ),
    max_size=6,
)
_BODIES: Final = st.one_of(
    st.just((b"", b"")),
    st.binary(min_size=1, max_size=40).map(lambda body: (b"Content-Length: %d\r\n" % len(body), body)),
    st.lists(st.binary(min_size=1, max_size=20), max_size=4).map(
        lambda chunks: (
            b"Transfer-Encoding: chunked\r\n",
            b"".join(b"%x;a=b\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nDigest: x\r\n\r\n",
        )
    ),
)


@given(
    requests=st.lists(st.tuples(_HEADERS, _BODIES), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 400), max_size=30),
)
def test_bodies_and_other_headers_pass_whatever_the_pieces(
    requests: list[tuple[list[tuple[str, str]], tuple[bytes, bytes]]], cuts: list[int]
) -> None:
    stream = expected = b""
    for headers, (framing, body) in requests:
        lines = [f"{name}:{value}".encode("latin-1") for name, value in headers]
        kept = [line for (name, _), line in zip(headers, lines, strict=True) if not RULES.replaces(name.encode())]
        start = b"POST /x HTTP/1.1\r\nHost: a.test\r\n"
        stream += start + b"".join(line + b"\r\n" for line in lines) + framing + b"\r\n" + body
        expected += start + b"".join(line + b"\r\n" for line in kept) + framing
        expected += b"".join(line + b"\r\n" for line in SET) + b"\r\n" + body
    rewriter, _ = rewriting()
    passed = b""
    for cut in cuts:
        passed += feed(rewriter, stream[:cut])
        stream = stream[cut:]
    passed += feed(rewriter, stream)
    assert rewriter.refusal is None
    assert passed == expected


# Request ids

IDS: Final = HeaderRules(set_forwarded=False, request_id="set", make_id=lambda: b"made-here")
KEPT: Final = HeaderRules(set_forwarded=False, request_id="keep", make_id=lambda: b"made-here")


@pytest.mark.parametrize(
    ("rules", "sent", "id_"),
    [
        (IDS, [], "made-here"),
        (IDS, ["X-Request-ID: theirs"], "made-here"),
        (KEPT, [], "made-here"),
        (KEPT, ["x-request-id: 0b5a-Z_.:+=/"], "0b5a-Z_.:+=/"),
        (KEPT, ["X-Request-ID: " + "x" * 128], "x" * 128),
        (KEPT, ["X-Request-ID: " + "x" * 129], "made-here"),
        (KEPT, ["X-Request-ID: "], "made-here"),
        (KEPT, ['X-Request-ID: a" b'], "made-here"),
        (KEPT, ["X-Request-ID: one", "X-Request-ID: two"], "made-here"),
        (KEPT, ["X-Request-ID: one", "X_Request_ID: two"], "made-here"),
    ],
)
def test_each_request_has_one_id(rules: HeaderRules, sent: list[str], id_: str) -> None:
    data = request(*sent, "X-Other: kept", "Connection: X-Request-ID, keep-alive")
    lines = changed(data, rules)
    assert lines == [
        b"GET / HTTP/1.1",
        b"Host: a.test",
        b"X-Other: kept",
        b"Connection: keep-alive",
        f"X-Request-ID: {id_}".encode(),
    ]
    head, _ = rules.apply(head_of(data), data)
    assert [*head.values(b"x-request-id")] == [id_.encode()]  # what the access log tells


def test_without_the_rule_ids_pass() -> None:
    assert b"X-Request-ID: theirs" in changed(request("X-Request-ID: theirs"))


def test_ids_are_made_anew() -> None:
    rules = HeaderRules(set_forwarded=False, request_id="set")
    made = {changed(GET, rules)[-1] for _ in range(100)}
    assert len(made) == 100
    assert all(len(line) == len("X-Request-ID: ") + 32 for line in made)


def test_a_trailer_cannot_be_an_id() -> None:
    chunked = request("Transfer-Encoding: chunked", method="POST") + b"0\r\nX-Request-ID: theirs\r\n\r\n"
    rewriter, _ = rewriting(IDS)
    assert b"theirs" not in feed(rewriter, chunked)
    assert rewriter.refusal is not None
