"""The lifespan of an ASGI application: startup, shutdown, and what goes wrong with them, on Trio and on asyncio."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import pytest
import trio
from asgi_rig import FACES, Browser, Face, in_thread, no_lifespan, respond, serving, until

from pioneer_tunnel import open_tunnel
from pioneer_tunnel.asgi import LifespanError, Options, serve
from pioneer_tunnel.asgi.interface import Receive, Scope, Send
from pioneer_tunnel.testing import open_memory_relay

each_face = pytest.mark.parametrize("face", FACES)


class App:
    """An application that notes what happens to it."""

    def __init__(self, **fails: Any) -> None:
        self.seen: list[Any] = []
        self.fails = fails

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            self.seen.append(dict(scope["state"]))
            scope["state"]["count"] = scope["state"].get("count", 0) + 1
            await respond(send)
            return
        assert (await receive())["type"] == "lifespan.startup"
        self.seen.append("startup")
        if "hangs" in self.fails:
            await until(threading.Event())
        if "startup" in self.fails:
            await send({"type": "lifespan.startup.failed", "message": self.fails["startup"]})
            return
        scope["state"]["shared"] = self.seen
        await send({"type": "lifespan.startup.complete"})
        if "between" in self.fails:
            raise KeyError("between")
        assert (await receive())["type"] == "lifespan.shutdown"
        self.seen.append("shutdown")
        if "hangs_at_end" in self.fails:
            await until(threading.Event())
        if "shutdown" in self.fails:
            await send({"type": "lifespan.shutdown.failed", "message": self.fails["shutdown"]})
        else:
            await send({"type": "lifespan.shutdown.complete"})


@each_face
@pytest.mark.parametrize("way", ["stop", "cancel"])
async def test_startup_comes_first_and_shutdown_last(face: Face, way: str) -> None:
    """Also when the server is cancelled. Each request has a copy of the state."""
    app = App()
    async with serving(app, face, lifespan="on") as served, await served.visit() as stream:
        browser = Browser(stream)
        await browser.ask()
        await browser.ask()
        getattr(served, way)()
        await in_thread(served.ended)
        assert served.errors == []
    assert app.seen == ["startup", {"shared": app.seen}, {"shared": app.seen}, "shutdown"]


@each_face
async def test_an_application_may_have_no_lifespan(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        assert scope["state"] == {}
        await respond(send)

    with caplog.at_level(logging.INFO):
        async with serving(app, face) as served, await served.visit() as stream:
            assert (await Browser(stream).ask()).status == 200
        assert "no lifespan" in caplog.text


@each_face
async def test_a_lifespan_that_is_off_is_not_asked_for(face: Face) -> None:
    app = App()
    async with serving(app, face, lifespan="off") as served, await served.visit() as stream:
        await Browser(stream).ask()
    assert app.seen == [{}]


async def fails_with(app: Any, face: Face, **options: Any) -> BaseException:
    async with serving(app, face, **options) as served:
        served.stop()
        await in_thread(served.ended)
        (error,) = served.errors
        return error


@each_face
async def test_what_fails_says_why(face: Face) -> None:
    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("why")

    for app, options, words in (
        (App(startup="no database"), {}, "startup has failed: no database"),
        (App(startup=""), {}, "startup has failed: it does not say why"),
        (App(hangs=True), {"startup_timeout": 0.05}, "startup took longer than 0.05 seconds"),
        (App(shutdown="no disk"), {}, "shutdown has failed: no disk"),
        (App(hangs_at_end=True), {"shutdown_timeout": 0.05}, "shutdown took longer than 0.05 seconds"),
        (raises, {"lifespan": "on"}, "has no lifespan, or its startup has raised"),
        (App(), {"lifespan": "sometimes"}, "lifespan is 'sometimes'"),
    ):
        error = await fails_with(app, face, **options)
        assert isinstance(error, ValueError if "sometimes" in words else LifespanError)
        assert words in str(error)
        assert not isinstance(app, App) or "shutdown" not in app.seen or "shutdown" in words


@each_face
async def test_a_lifespan_that_raises_after_the_startup_is_logged_and_the_server_goes_on(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(App(between=True), face) as served, await served.visit() as stream:
        assert (await Browser(stream).ask()).status == 200
        served.stop()
        await in_thread(served.ended)
        assert served.errors == []
    assert "the application's lifespan has failed" in caplog.text


@pytest.mark.parametrize("value", [0, -1, True, "5", None])
def test_an_option_is_a_number_above_0(value: Any) -> None:
    with pytest.raises(ValueError, match=f"head_timeout is {value!r}"):
        Options(head_timeout=value)


def test_ctrl_c_on_trio_lets_the_application_shut_down() -> None:
    app = App()

    async def main() -> None:
        async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:

            async def press() -> None:
                signal.raise_signal(signal.SIGINT)

            await serve(app, tunnel, shutdown_trigger=press)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert app.seen == ["startup", "shutdown"]
