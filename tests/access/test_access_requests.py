"""What a request shows: no trick makes a request open that is not, and no header has two readings."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, strategies as st
from rig import HOST

from pioneer_tunnel import Access
from pioneer_tunnel._http.head import HeadReader, RequestHead
from pioneer_tunnel.access.requests import Password, bearer_token, is_exempt, password

ACCESS = Access(basic_auth="x", open_paths=["/healthz", "/a/b"], preflights="pass")
PREFLIGHT = ("Origin: https://a.test", "Access-Control-Request-Method: PUT")


def head(first: str, *lines: str) -> RequestHead:
    found = HeadReader().feed("\r\n".join([f"{first} HTTP/1.1", f"Host: {HOST}", *lines, "", ""]).encode("latin-1"))
    assert found is not None
    return found


@pytest.mark.parametrize("first", ["GET /healthz", "HEAD /healthz", "GET /healthz?x=/../admin", "GET /a/b?"])
def test_open_paths_are_open(first: str) -> None:
    assert is_exempt(ACCESS, head(first))


@pytest.mark.parametrize(
    "target",
    [
        "//healthz", "/healthz/", "/healthz/..", "/healthz/../admin", "/./healthz", "/admin/../healthz", "/%68ealthz",
        "/healthz%2f..%2fadmin", "/healthz%3f", "/healthz;x", "/healthz#", "/HEALTHZ", "/healthz\\..\\admin",
        "/healthz.", f"http://{HOST}/healthz", "/a//b", "/a/b/", "/a", "/",
    ],
)  # fmt: skip
def test_a_path_is_compared_byte_for_byte(target: str) -> None:
    assert not is_exempt(ACCESS, head(f"GET {target}"))


@pytest.mark.parametrize(
    "line",
    [
        "Content-Length: 1", "Transfer-Encoding: chunked", "Upgrade: h2c", "Upgrade: websocket", "HTTP2-Settings: x",
        "X-Original-URL: /admin", "X-Rewrite-Url: /admin", "X_Original_URL: /admin", "X-Original-Uri: /admin",
        "X-Forwarded-Prefix: /admin", "X-Forwarded-Path: /admin", "X-Forwarded-Uri: /admin", "PATH_INFO: /admin",
        "Script-Name: /admin", "X-HTTP-Method-Override: DELETE", "X-Method-Override: DELETE", "X-HTTP-Method: DELETE",
    ],
)  # fmt: skip
def test_a_request_that_a_server_could_take_for_another_is_not_open(line: str) -> None:
    assert not is_exempt(ACCESS, head("GET /healthz", line))
    assert not is_exempt(ACCESS, head("OPTIONS /admin", *PREFLIGHT, line))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "TRACE"])
def test_other_methods_are_not_open(method: str) -> None:
    assert not is_exempt(ACCESS, head(f"{method} /healthz"))


def test_preflights_pass_only_when_configured() -> None:
    preflight = head("OPTIONS /admin", *PREFLIGHT)
    assert is_exempt(ACCESS, preflight)
    assert not is_exempt(Access(basic_auth="x"), preflight)
    for lines in ((PREFLIGHT[0],), (PREFLIGHT[1],), (*PREFLIGHT, PREFLIGHT[0]), ()):
        assert not is_exempt(ACCESS, head("OPTIONS /admin", *lines))
    assert not is_exempt(ACCESS, head("POST /admin", *PREFLIGHT))


@given(target=st.text("/healtz.%2fFAb;?#\\~", min_size=1).map("/".__add__))
def test_whatever_is_open_is_an_open_path(target: str) -> None:
    if is_exempt(ACCESS, head(f"GET {target}")):
        assert target.partition("?")[0] in ACCESS.open_paths


@given(user=st.binary(), secret=st.binary())
def test_a_password_is_read_as_it_was_written(user: bytes, secret: bytes) -> None:
    given = password(b"Basic " + base64.b64encode(user + b":" + secret))
    if given is not None:
        assert given.user + b":" + given.password == user + b":" + secret
        assert b":" not in given.user
    else:
        assert any(byte < 32 or byte == 127 for byte in user + secret)


@given(value=st.binary())
def test_any_header_is_read_without_an_error(value: bytes) -> None:
    password(value)
    password(b"Basic " + value)
    bearer_token(b"Bearer " + value)


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Basic", b"Basic ", b"Basic\tYTpi", b"Basic YTpi YTpi", b"Basic YTpi,", b"BasicYTpi", b" Basic YTpi",
        b"Basic YTp", b"Basic YT_i", b"Basic YQ==", b"Bearer YTpi", b"Basic YToAYg==", b"Basic \xff",
    ],
)  # fmt: skip
def test_what_is_no_password(value: bytes) -> None:
    assert password(value) is None


def test_schemes_have_no_case() -> None:
    assert password(b"bAsIc  YTpi") == Password(b"a", b"b")
    assert bearer_token(b"BEARER abc.def") == b"abc.def"
    assert bearer_token(b"Bearer a b") is None


def test_a_password_has_no_printable_form() -> None:
    assert "secret" not in repr(Password(b"user", b"secret"))
