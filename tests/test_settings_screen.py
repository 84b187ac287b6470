"""The settings screen of examples/gateway_with_settings, attacked over real connections, near and through a tunnel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import attrs
import browsers
import h11
import pytest
import trio
import trio.testing
from rig import (
    HOST,
    KEY,
    eventually,
    no_hang,
    read_all,
    until_it_raises,
)
from screen_rig import BEARER, TOKEN, call, site, sites
from settings_gateway import SCREEN, load_pages
from trio_websocket import ConnectionClosed

from pioneer_tunnel import ErrorKind, State, explain

# What is served


async def test_every_answer_forbids_what_the_screen_does_not_need(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        for path in (*load_pages(), "/nothing", "/session"):
            answer = await at.ask("GET", path)
            assert answer.status == {"/nothing": 404, "/session": 401}.get(path, 200)
            policy = answer["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= {*policy}
            assert {"frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"} <= {*policy}
            assert "unsafe" not in answer["content-security-policy"]
            assert answer["x-frame-options"] == "DENY"
            assert answer["cache-control"] == "no-store"
            assert answer["x-content-type-options"] == "nosniff"
            assert answer["cross-origin-resource-policy"] == "same-origin"
            assert not [name for name, _ in answer.headers if name.lower().startswith("access-control-")]


def test_the_page_takes_nothing_from_elsewhere() -> None:
    for path in SCREEN.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    page = (SCREEN / "index.html").read_text()
    assert " style=" not in page
    assert " onclick=" not in page
    script = (SCREEN / "screen.js").read_text()
    assert not any(
        word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )


async def test_the_explanations_are_those_of_the_library(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        told = json.loads((await at.ask("GET", "/explanations.json")).body)
    assert told == {kind: json.loads(json.dumps(attrs.asdict(explain(kind)))) for kind in ErrorKind}


# Sessions


async def test_a_browser_with_the_token_gets_a_session_and_changes_settings(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        answer = await at.ask("POST", "/session", BEARER | {"Origin": at.origin})
        assert answer["set-cookie"].split("; ")[1:] == ["Path=/", "Max-Age=43200", "HttpOnly", "SameSite=Strict"]
        cookie, secret = await at.sign_in()
        origin = {"Origin": at.origin}
        protocols = ("remote-access", f"page-secret.{secret}")
        async with at.websocket(cookie | origin, *protocols) as websocket:
            assert websocket.subprotocol == "remote-access"
            shown = await call(websocket, "settings/update", update={"remote_access": {"key": KEY.reveal()}})
            assert shown["result"]["settings"]["remote_access"]["has_key"]
            assert KEY.reveal() not in json.dumps(shown)
            page_secret = {"Page-Secret": secret}
            assert (await at.ask("GET", "/session", cookie | page_secret)).status == 204
            gone = await at.ask("DELETE", "/session", cookie | origin | page_secret)
            assert gone.status == 204
            assert "Max-Age=0" in gone["set-cookie"]
            with pytest.raises(ConnectionClosed):  # what was open in the session ends with it
                await until_it_raises(websocket.get_message)
        assert (await at.ask("GET", "/session", cookie | page_secret)).status == 401
        assert await at.status_of_websocket(cookie | origin, *protocols) == 401


async def test_the_cookie_alone_opens_nothing(tmp_path: Path) -> None:
    """A program at another port of this host is sent the cookie, too."""
    async with site(tmp_path) as at:
        cookie, secret = await at.sign_in()
        _, other_secret = await at.sign_in()
        origin = {"Origin": at.origin}
        for wrong in ("", "x", "\u00e9", other_secret, secret[:-1], secret.swapcase()):
            assert (await at.ask("GET", "/session", cookie | {"Page-Secret": wrong})).status == 401
            assert (await at.ask("DELETE", "/session", cookie | origin | {"Page-Secret": wrong})).status == 401
        for protocols in ((), ("remote-access",), (f"page-secret.{other_secret}",), ("page-secret.",)):
            assert await at.status_of_websocket(cookie | origin, *protocols) == 401
        twice = f"{cookie['Cookie']}; {cookie['Cookie']}"  # another port has set one: which one is ours is not clear
        for value in ("settings=", f"{cookie['Cookie']}x", twice, "settings", "\u00e9"):
            cookies = {"Cookie": value}
            assert await at.status_of_websocket(cookies | origin, f"page-secret.{secret}") == 401
            assert (await at.ask("GET", "/session", cookies | {"Page-Secret": secret})).status == 401


async def test_a_session_ends_after_its_time_and_when_there_are_too_many(
    autojump_clock: trio.testing.MockClock,
) -> None:
    door = browsers.Door("http", frozenset({"localhost"}), "this host")
    sessions = browsers.Sessions()

    def request(cookie: str) -> Any:
        fields = [("Host", "localhost"), ("Cookie", f"other=1; settings={cookie}")]
        return h11.Request(method="GET", target="/", headers=fields)

    cookie, session = sessions.begin()
    assert sessions.find(request(cookie), door, session.page_secret) is session
    with session.held():
        await trio.Event().wait()
    assert trio.current_time() >= browsers.SESSION_SECONDS
    assert sessions.find(request(cookie), door, session.page_secret) is None

    oldest, session = sessions.begin()
    with session.held():
        for _ in range(browsers.SESSION_LIMIT):
            sessions.begin()
        await trio.Event().wait()
    assert sessions.find(request(oldest), door, session.page_secret) is None


# Other sites


FOREIGN_ORIGINS: Final = [
    "http://evil.test",
    "null",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "https://{host}",
    "http://localhost:{port}",
    "http://{host}.evil.test",
    "http://{host}, http://evil.test",
    "{host}",
    "",
]


@pytest.mark.parametrize("foreign", FOREIGN_ORIGINS)
async def test_another_origin_gets_nowhere(tmp_path: Path, foreign: str) -> None:
    """Even with the token, or with cookie and secret."""
    async with site(tmp_path) as at:
        cookie, secret = await at.sign_in()
        origin = {"Origin": foreign.format(host=at.host, port=at.port)}
        page_secret = {"Page-Secret": secret}
        for method, path in (("GET", "/"), ("GET", "/session"), ("POST", "/session"), ("DELETE", "/session")):
            answer = await at.ask(method, path, BEARER | cookie | page_secret | origin)
            assert answer.status == 403, (method, path)
            assert not [name for name, _ in answer.headers if name.lower() == "set-cookie"]
        assert await at.status_of_websocket(cookie | origin, f"page-secret.{secret}") == 403
        assert await at.status_of_websocket(BEARER | origin) == 403
        assert (await at.ask("GET", "/session", cookie | page_secret)).status == 204  # nothing has ended it


async def test_a_browser_without_origin_gets_no_further_than_the_page(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        cookie, secret = await at.sign_in()
        assert (await at.ask("POST", "/session", BEARER)).status == 403
        assert (await at.ask("DELETE", "/session", cookie | {"Page-Secret": secret})).status == 403
        assert await at.status_of_websocket(cookie, f"page-secret.{secret}") == 403
        assert await at.status_of_websocket(BEARER) == 101  # a program with the token


FOREIGN_HOSTS: Final = [
    "evil.test:{port}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.2:{port}",
    f"{HOST}",
    "[::]:{port}",
    "",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_a_name_that_was_bound_to_loopback_is_refused(tmp_path: Path, host: str) -> None:
    """DNS rebinding: the browser takes the attacker's page and this gateway for one site, and Origin is no help."""
    async with site(tmp_path) as at:
        rebound = host.format(port=at.port)
        fields = BEARER | {"Host": rebound, "Origin": f"http://{rebound}"}
        for method, path in (("GET", "/"), ("POST", "/session")):
            answer = await at.ask(method, path, fields)
            assert answer.status == 421
            assert TOKEN.encode() not in answer.body
        assert (await at.ask("GET", "/", {"Host": f"LocalHost:{at.port}"})).status == 200
        assert (await at.ask("GET", "/", {"Host": f"[::1]:{at.port}"})).status == 200


# Guesses


async def test_whoever_guesses_the_token_has_to_wait(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        origin = {"Origin": at.origin}
        for attempt in range(browsers.GUESSES):
            guess = {"Authorization": f"Bearer guess-{attempt}"}
            if attempt % 2:
                assert (await at.ask("POST", "/session", origin | guess)).status == 401
            else:
                assert await at.status_of_websocket(guess) == 401
        refused = await at.ask("POST", "/session", origin | BEARER)
        assert refused.status == 429
        assert 0 < int(refused["retry-after"]) <= browsers.SECONDS_PER_GUESS + 1
        assert await at.status_of_websocket(BEARER) == 429


async def test_other_sites_cannot_use_up_the_guesses(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        for _ in range(browsers.GUESSES + 1):
            foreign = {"Origin": "http://evil.test", "Authorization": "Bearer guess"}
            assert (await at.ask("POST", "/session", foreign)).status == 403
        await at.sign_in()


async def test_guesses_are_counted_for_each_address(autojump_clock: trio.testing.MockClock) -> None:
    guesses = browsers.Guesses()
    for number in range(browsers.GUESSES):
        guesses.count_wrong(f"2001:db8::{number}")  # one network
    with pytest.raises(browsers.Refused):
        guesses.check("2001:db8::ffff")
    guesses.check("2001:db8:0:1::1")
    guesses.check("192.0.2.1")
    await trio.sleep(browsers.SECONDS_PER_GUESS)
    guesses.check("2001:db8::1")
    guesses.count_wrong("2001:db8::1")
    with pytest.raises(browsers.Refused):
        guesses.check("2001:db8::1")
    for number in range(browsers.REMEMBERED_ADDRESSES):
        guesses.count_wrong(f"192.0.{number // 256}.{number % 256}")
    guesses.check("2001:db8::1")  # it is forgotten: the memory has a bound


# No HTTP


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\0\1\2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 421),
        (b"GET http://evil.test/ HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        (b"GET /../gateway.toml HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        (b"HEAD / HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n", 404),
        (b"OPTIONS / HTTP/1.1\r\nHost: {host}\r\nOrigin: http://evil.test\r\n\r\n", 403),
        (b"GET /nothing HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: {host}\r\nOrigin: null\r\nOrigin: http://{host}\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: {host}\r\nX: " + b"x" * 17_000, 431),
    ],
)
async def test_what_is_no_request_gets_an_error(tmp_path: Path, sent: bytes, status: int) -> None:
    async with site(tmp_path) as at:
        with no_hang():
            async with await at.connect() as stream:
                filled = sent.replace(b"{host}", at.host.encode()).replace(b"{token}", TOKEN.encode())
                await stream.send_all(filled)
                assert (await read_all(stream)).split()[1] == str(status).encode()
        await at.sign_in()


# Through the tunnel


async def test_the_screen_is_at_the_public_url_alone(tmp_path: Path) -> None:
    async with sites(tmp_path) as (near, far):
        for at, other in ((near, far), (far, near)):
            assert (await at.ask("GET", "/")).status == 200
            cookie, secret = await at.sign_in()
            origin, foreign = {"Origin": at.origin}, {"Origin": other.origin}
            assert await at.status_of_websocket(cookie | origin, f"page-secret.{secret}") == 101
            assert await at.status_of_websocket(cookie | foreign, f"page-secret.{secret}") == 403
        assert (await near.ask("GET", "/", {"Host": HOST})).status == 421
        assert (await far.ask("GET", "/", {"Host": f"{HOST}:8080"})).status == 421


async def test_over_tls_the_cookie_is_bound_to_it(tmp_path: Path) -> None:
    async with sites(tmp_path, "https") as (near, far):
        answer = await far.ask("POST", "/session", BEARER | {"Origin": far.origin})
        assert answer["set-cookie"].startswith("__Host-settings=")
        assert answer["set-cookie"].endswith("; HttpOnly; SameSite=Strict; Secure")
        assert f"wss://{HOST}" in answer["content-security-policy"]
        assert (await far.ask("POST", "/session", BEARER | {"Origin": f"http://{HOST}"})).status == 403
        cookie, secret = await far.sign_in()
        assert await far.status_of_websocket(cookie | {"Origin": far.origin}, f"page-secret.{secret}") == 101
        renamed = {"Cookie": cookie["Cookie"].removeprefix("__Host-"), "Page-Secret": secret}
        assert (await far.ask("GET", "/session", renamed)).status == 401
        assert (await near.ask("GET", "/session", renamed)).status == 204  # one session of the gateway, in two places


async def test_it_can_be_switched_off_through_the_tunnel(tmp_path: Path) -> None:
    async with sites(tmp_path) as (near, far):
        cookie, secret = await far.sign_in()
        async with far.websocket(cookie | {"Origin": far.origin}, f"page-secret.{secret}") as websocket:
            answer = await call(websocket, "settings/update", update={"remote_access": {"enabled": False}})
            assert answer["result"]["settings"]["remote_access"]["status"]["state"] == "disabled"
        await eventually(lambda: near.gateway.remote_access.status.state is State.DISABLED)


async def test_a_visitor_who_guesses_does_not_lock_the_owner_out(tmp_path: Path) -> None:
    async with sites(tmp_path) as (near, far):
        for status in (*([401] * browsers.GUESSES), 429):
            guess = {"Origin": far.origin, "Authorization": "Bearer guess"}
            assert (await far.ask("POST", "/session", guess)).status == status
        await near.sign_in()
