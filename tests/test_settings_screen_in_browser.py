"""The settings screen of examples/gateway_with_settings in a browser: looked at, used with keys alone, attacked."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
from browser import Tab, needs_axe, needs_chromium, open_browser
from example_programs import ROOT, running
from rig import HOST, KEY, eventually, free_port, in_background, read_until
from screen_rig import TOKEN, Site, site, sites

from pioneer_tunnel import ErrorKind, State, Status, explain, new_relay_key

pytestmark = [pytest.mark.slow, needs_chromium]

EXAMPLE: Final = ROOT / "examples" / "gateway_with_settings" / "settings_gateway.py"
FOCUS: Final = "(document.activeElement.id || document.activeElement.textContent)"
FOCUS_IS_VISIBLE: Final = "getComputedStyle(document.activeElement).outlineStyle === 'solid'"
HOSTILE: Final = "<img src=x onerror='document.title=1'><script>document.title=2</script>`<b>`"


def text_of(name: str) -> str:
    return f"document.getElementById('{name}').innerText"


async def sign_in(tab: Tab, url: str, token: str = TOKEN) -> None:
    await tab.go(url)
    await tab.until(f"{FOCUS} === 'token'")
    await tab.type(token)
    await tab.press("Enter")
    await tab.until(f"{text_of('has-key')} !== '' && {FOCUS} === 'switch'")


def show(at: Site, status: Status) -> None:
    """Let remote access have this status. Each kind is provoked for real in tests/gateway/test_cures.py."""
    at.gateway.remote_access._feed.publish(status)


STATUSES: Final = [
    Status(state=State.DISABLED),
    Status(state=State.STARTING),
    Status(state=State.CONNECTED, public_url="https://office.example.com"),
    Status(state=State.STOPPED),
    Status(
        state=State.RECONNECTING,
        error_kind=ErrorKind.RELAY_CONNECT_FAILED,
        message="the link to wss://relay.example.com was lost: no answer to a ping for 15 seconds",
        public_url="https://office.example.com",
        retry_at_unix=1796059124,
    ),
    *(
        Status(
            state=State.CONNECTED if kind is ErrorKind.LOCAL_GATEWAY_UNAVAILABLE else State.FAILED,
            error_kind=kind,
            message=f"what was seen of {kind}: {'a' * 120}",
            retry_at_unix=1796059124 if kind is ErrorKind.RELAY_RESOLVE_FAILED else None,
        )
        for kind in ErrorKind
    ),
]


@needs_axe
async def test_every_status_can_be_read_by_everybody(tmp_path: Path) -> None:
    async with site(tmp_path) as at, open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        await tab.go(at.origin)
        for width in (1280, 360):
            for dark in (False, True):
                await tab.look(width=width, dark=dark)
                await tab.audit()
                await tab.screenshot(f"sign-in-{width}-{'dark' if dark else 'light'}")
        await tab.look()
        await sign_in(tab, at.origin)
        for status in STATUSES:
            show(at, status)
            await tab.until(f"{text_of('message')} === {json.dumps(status.message or '')}")
            await tab.until(f"document.getElementById('status').dataset.state === '{status.state}'")
            causes = () if status.error_kind is None else explain(status.error_kind).causes
            shown = await tab.run("[...document.querySelectorAll('dt, dd')].map((part) => part.textContent)")
            assert shown == [text.replace("`", "") for cause in causes for text in (cause.text, cause.cure)]
            assert await tab.run("document.getElementById('help').hidden") == (not causes)
            for width in (1280, 360):
                for dark in (False, True):
                    await tab.look(width=width, dark=dark)
                    await tab.audit()
                    name = "-".join(filter(None, [status.state, status.error_kind, str(width)]))
                    await tab.screenshot(f"{name}-{'dark' if dark else 'light'}")
            await tab.run("document.getElementById('help').open = true")
            await tab.audit()
            await tab.look()
            summary = "" if status.error_kind is None else explain(status.error_kind).summary.replace("`", "")
            assert await tab.run(text_of("summary")) == summary
        assert browser.console == []


async def test_the_next_attempt_is_told(tmp_path: Path) -> None:
    async with site(tmp_path) as at, open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        await sign_in(tab, at.origin)
        retried = Status(state=State.FAILED, error_kind=ErrorKind.RELAY_RESOLVE_FAILED, message="no such name")
        final = Status(state=State.FAILED, error_kind=ErrorKind.TUNNEL_AUTH_FAILED, message="another key")
        soon, late = int(time.time()) + 2, int(time.time()) + 10**7
        for status, told in (
            (final, "There is no further attempt until something changes."),
            (attrs.evolve(final, retry_at_unix=late), "The next attempt is at "),
            (retried, ""),
            (attrs.evolve(retried, retry_at_unix=soon), "The next attempt is at "),
        ):
            show(at, status)
            await tab.until(f"{text_of('message')} === '{status.message}'")
            await tab.until(f"{text_of('next')}.startsWith('{told}')")
            assert await tab.run("document.getElementById('next').hidden") == (not told)
        await tab.until(f"{text_of('next')} === 'Trying again now.'")


async def test_it_is_used_with_the_keyboard_alone(tmp_path: Path) -> None:
    async with sites(tmp_path) as (near, _), open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        await tab.go(near.origin)
        await tab.until(f"{FOCUS} === 'token'")
        await tab.type("a-wrong-token")
        await tab.press("Tab")
        assert await tab.run(FOCUS) == "Sign in"
        assert await tab.run(FOCUS_IS_VISIBLE)
        await tab.press(" ")
        await tab.until(f"{text_of('token-error')} === 'The token is wrong.' && {FOCUS} === 'token'")
        assert await tab.run("document.getElementById('token').getAttribute('aria-invalid')") == "true"
        await sign_in(tab, near.origin)
        await tab.until(f"{text_of('state')} === 'Connected'")

        await tab.go(near.origin)  # a reload keeps the session
        await tab.until(f"{text_of('state')} === 'Connected'")
        order = []
        for _ in range(5):
            await tab.press("Tab")
            order.append(await tab.run(FOCUS))
            assert await tab.run(FOCUS_IS_VISIBLE), order
        assert order == ["sign-out", f"http://{HOST}", "switch", "key", "Save"]

        await tab.run("document.getElementById('switch').focus()")
        checked = "document.getElementById('switch').getAttribute('aria-checked')"
        for key, state, text in (("Enter", "false", "Off"), (" ", "true", "Connected"), (" ", "false", "Off")):
            await tab.press(key)
            await tab.until(f"{checked} === '{state}' && {text_of('state')} === '{text}'")
            assert await tab.run(FOCUS) == "switch"

        await tab.press("Tab")
        for key in ("short", str(KEY.identity().public_key)):
            await tab.run("document.getElementById('key').select()")
            await tab.type(key)
            await tab.press("Enter")
            await tab.until(f"{text_of('key-error')} !== '' && {FOCUS} === 'key'")
            assert await tab.run("document.getElementById('key').value") == key  # to be corrected
        await tab.run("document.getElementById('key').select()")
        await tab.type(new_relay_key().reveal())
        await tab.press("Enter")
        await tab.until(f"{text_of('key-saved')} === 'The key is saved.'")
        assert await tab.run("document.getElementById('key').value") == ""
        assert await tab.run(text_of("key-error")) == ""
        await tab.run("document.getElementById('sign-out').focus()")
        await tab.press("Enter")
        await tab.until(f"{FOCUS} === 'token'")
        await tab.go(near.origin)
        await tab.until(f"{FOCUS} === 'token'")  # it asks again


async def test_through_the_tunnel_on_a_phone(tmp_path: Path) -> None:
    """Over TLS: the cookie has the prefix that only TLS allows. It is switched off through the tunnel itself."""
    async with (
        sites(tmp_path, "https") as (_, far),
        open_browser(tmp_path / "profile", {f"{HOST}:443": far.port}) as browser,
    ):
        tab = await browser.open()
        await tab.look(width=360, dark=True)
        await sign_in(tab, far.origin)
        await tab.until(f"{text_of('state')} === 'Connected'")
        assert await tab.run("document.getElementById('unencrypted').hidden")
        await tab.audit()
        await tab.screenshot("tunnel-360-dark")
        cookies = (await tab.call("Network.getCookies"))["cookies"]
        flags = [(cookie["name"], cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) for cookie in cookies]
        assert flags == [("__Host-settings", True, True, "Strict")]
        assert await tab.run("document.cookie") == ""
        await tab.press("Enter")
        await tab.until("document.getElementById('switch').getAttribute('aria-checked') === 'false'")
        await tab.until(f"{text_of('state')}.startsWith('No connection to this gateway')")


async def test_without_encryption_it_says_so(tmp_path: Path) -> None:
    async with (
        sites(tmp_path) as (_, far),
        open_browser(tmp_path / "profile", {f"{HOST}:80": far.port}) as browser,
    ):
        tab = await browser.open()
        await tab.go(far.origin)
        assert "not encrypted" in await tab.run(text_of("unencrypted"))


async def test_it_comes_back_with_the_gateway(tmp_path: Path) -> None:
    """A gateway that was restarted knows no sessions: the screen asks for the token again. The program itself runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    (tmp_path / "gateway.toml").write_text("[gateway.remote_access]\n")
    async with open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        async with running(EXAMPLE, tmp_path, str(port)) as gateway:
            assert await gateway.says("the settings screen is at ") == url
            token = await gateway.says("it asks for the token ")
            await sign_in(tab, url, token)
            await tab.until(f"{text_of('state')} === 'Off'")
        await tab.until(f"{text_of('state')}.startsWith('No connection to this gateway')")
        await tab.audit()
        await tab.screenshot("away-1280-light")
        async with running(EXAMPLE, tmp_path, str(port)) as gateway:
            await tab.until(f"{FOCUS} === 'token'")
            await sign_in(tab, url, await gateway.says("it asks for the token "))


# Attacks


async def test_what_others_say_is_text(tmp_path: Path) -> None:
    """Relays, services and files have their say in messages. None of it becomes HTML, or a link that runs a script."""
    async with site(tmp_path) as at, open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        await sign_in(tab, at.origin)
        for url in ("javascript:document.title=3", "data:text/html,<script>1</script>", f"https://x/{HOSTILE}"):
            show(at, Status(state=State.FAILED, error_kind=ErrorKind.UNKNOWN, message=HOSTILE, public_url=url))
            await tab.until(f"{text_of('message')} === {json.dumps(HOSTILE)}")
            await tab.until(f"{text_of('address')}.endsWith({json.dumps(url)})")
            assert await tab.run("document.querySelector('#address a').hasAttribute('href')") == url.startswith("http")
        await tab.run("document.getElementById('key').focus()")
        await tab.type(f"ed25519:{HOSTILE}")
        await tab.press("Enter")
        await tab.until(f"{text_of('key-error')} !== ''")
        assert await tab.run("document.querySelectorAll('img, main script, b').length") == 0
        assert await tab.run("document.title") == "Remote access"
        assert browser.console == []
        injected = (
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=4'}))"
        )
        with pytest.raises(AssertionError, match="TrustedScript"):
            await tab.run(injected)
        with pytest.raises(AssertionError, match="TrustedHTML"):
            await tab.run("document.body.innerHTML = ''")


@asynccontextmanager
async def foreign_site(heard: list[bytes]) -> AsyncIterator[int]:
    """Another web server; yields its port. It hears requests, and serves an empty page."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            heard.append(await read_until(stream, b"\r\n\r\n"))
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1\r\n\r\n\n")

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with in_background(lambda: trio.serve_listeners(serve, [listener])):
        yield listener.socket.getsockname()[1]


ATTACKS: Final = """(async () => {
    const target = TARGET;
    const tried = async (path, options) => {
        try {
            const response = await fetch(target + path, {credentials: 'include', ...options});
            return response.type === 'opaque' ? 'sent unseen' : 'read';
        } catch { return 'blocked'; }
    };
    const websocket = (url, protocols) => new Promise((resolve) => {
        const opened = new WebSocket(url, protocols);
        opened.onopen = () => resolve('open');
        opened.onerror = () => resolve('blocked');
    });
    const loaded = (tag) => new Promise((resolve) => {
        const made = document.createElement(tag);
        made.onload = () => resolve('loaded');
        made.onerror = () => resolve('blocked');
        if (tag === 'link') { made.rel = 'stylesheet'; made.href = target + '/screen.css'; }
        else made.src = target + (tag === 'img' ? '/icon.svg' : '/screen.js');
        document.head.append(made);
    });
    const made = (tag, attributes) => Object.assign(document.createElement(tag), attributes);
    const form = () => new Promise((resolve) => {
        const form = made('form', {method: 'post', action: target + '/session', target: 'below'});
        document.body.append(made('iframe', {name: 'below', onload: () => resolve('sent')}), form);
        form.submit();
    });
    const withoutOrigin = () => new Promise((resolve) => {
        onmessage = ({data}) => resolve(data);
        const opened = `const opened = new WebSocket('${target.replace('http', 'ws')}')`;
        const said = (what) => `opened.on${what} = () => parent.postMessage('${what}', '*')`;
        const srcdoc = `<script>${opened}; ${said('open')}; ${said('error')};</script>`;
        document.body.append(made('iframe', {sandbox: 'allow-scripts', srcdoc}));
    });
    return {
        read: await tried('/session'),
        page: await tried('/'),
        blind: await tried('/session', {mode: 'no-cors', method: 'POST'}),
        end: await tried('/session', {method: 'DELETE', headers: {'Page-Secret': 'x'}}),
        token: await tried('/session', {method: 'POST', headers: {Authorization: 'Bearer guess'}}),
        websocket: await websocket(target.replace('http', 'ws')),
        guess: await websocket(target.replace('http', 'ws'), ['remote-access', 'page-secret.guess']),
        script: await loaded('script'), image: await loaded('img'), style: await loaded('link'),
        form: await form(), null: await withoutOrigin(),
    };
})()"""
FAILED_ATTACKS: Final = {
    **dict.fromkeys(["read", "page", "end", "token", "websocket", "guess", "script", "image", "style"], "blocked"),
    "form": "sent",  # and refused: the answer is not seen
    "null": "error",
}


@pytest.mark.parametrize("attacker", ["evil.test:80", "127.0.0.1:{port}"], ids=["cross-site", "another port"])
async def test_another_site_gets_nowhere(tmp_path: Path, attacker: str) -> None:
    heard: list[bytes] = []
    async with (
        site(tmp_path) as at,
        foreign_site(heard) as port,
        open_browser(tmp_path / "profile", {"evil.test:80": port}) as browser,
    ):
        victim, attack = await browser.open(), await browser.open()
        await sign_in(victim, at.origin)
        origin = f"http://{attacker.format(port=port)}"
        await attack.go(origin)
        done = await attack.run(ATTACKS.replace("TARGET", json.dumps(at.origin)))
        assert done.pop("blind") in {"sent unseen", "blocked"}
        assert done == FAILED_ATTACKS

        # Clickjacking.
        framed = f"Object.assign(document.createElement('iframe'), {{src: '{at.origin}'}})"
        await attack.run(f"document.body.append({framed})")
        await eventually(lambda: any("frame-ancestors" in complaint for complaint in browser.console))

        # The cookie, which the browser does send to another port: alone it is worth nothing.
        lines = [line for request in heard for line in request.split(b"\r\n")]
        cookies = [line for line in lines if line.startswith(b"Cookie: settings=")]
        assert bool(cookies) == origin.startswith("http://127.0.0.1")
        for line in cookies:
            stolen = {"Cookie": line.partition(b": ")[2].decode(), "Origin": at.origin}
            assert (await at.ask("GET", "/session", stolen)).status == 401
            assert await at.status_of_websocket(stolen, "remote-access") == 401

        # Nothing has happened to the session, nor to the settings.
        headers = "{'Page-Secret': sessionStorage.getItem('page-secret')}"
        assert await victim.run(f"fetch('/session', {{headers: {headers}}}).then(({{status}}) => status)") == 204
        assert await victim.run(text_of("state")) == "Off"


async def test_a_name_that_is_bound_to_loopback_shows_nothing(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        name = f"evil.test:{at.port}"
        async with open_browser(tmp_path / "profile", {name: at.port}) as browser:
            tab = await browser.open()
            await tab.go(f"http://{name}")
            assert await tab.run("document.body.innerText.trim()") == "this gateway has another name"
            begun = (
                "fetch('/session', {method: 'POST', headers: {Authorization: 'Bearer TOKEN'}}).then((r) => r.status)"
            )
            assert await tab.run(begun.replace("TOKEN", TOKEN)) == 421
