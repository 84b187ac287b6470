"""How the ASGI server ends: applications that fail, and a stop, graceful or not."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import trio
from asgi_rig import (
    FACES,
    Browser,
    Face,
    echo,
    head,
    in_thread,
    no_lifespan,
    respond,
    serving,
    until,
)
from rig import read_all

from pioneer_tunnel.asgi.exchange import Exchange
from pioneer_tunnel.asgi.interface import Receive, Scope, Send

pytestmark = pytest.mark.parametrize("face", FACES)


# Applications that fail


async def test_an_application_that_fails_before_its_answer_gives_500(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        match scope["path"]:
            case "/raises" | "/raises\r\nforged":
                raise KeyError("why")
            case "/raises-after-start":
                await send({"type": "http.response.start", "status": 200})
                raise KeyError("why")
            case "/returns":
                pass
            case "/bad-header":
                await respond(send, headers=[(b"x", b"a\r\nSet-Cookie: b")])
            case "/bad-status":
                await respond(send, status=99)
            case "/bad-type":
                await send({"type": "http.response.nonsense"})
            case "/body-first":
                await send({"type": "http.response.body", "body": b""})

    targets = (
        "raises",
        "raises%0D%0Aforged",
        "raises-after-start",
        "returns",
        "bad-header",
        "bad-status",
        "bad-type",
        "body-first",
    )
    async with serving(app, face) as served:
        for target in targets:
            async with await served.visit() as stream:
                await stream.send_all(head("GET", f"/{target}"))
                answer = await read_all(stream)
                assert answer.startswith(b"HTTP/1.1 500 "), (target, answer)
                assert b"Cookie" not in answer
    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == len(targets)
    for target, line in zip(targets, lines, strict=True):
        assert f"/{target.replace('%0D%0A', ' ')}" in line.getMessage()  # a visitor cannot forge a line of the log


async def test_an_answer_that_is_cut_off_is_a_reset(face: Face) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        headers = [] if scope["path"] != "/length" else [(b"content-length", b"9")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        match scope["path"]:
            case "/raises":
                raise KeyError("why")
            case "/length":
                await send({"type": "http.response.body", "body": b""})

    async with serving(app, face) as served:
        for request in (
            head("GET", "/raises"),
            head("GET", "/returns"),
            head("GET", "/length"),
            b"GET /returns HTTP/1.0\r\n\r\n",
        ):
            async with await served.visit() as stream:
                await stream.send_all(request)
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(stream)


# How it stops


async def test_a_graceful_stop_finishes_what_is_under_way(face: Face) -> None:
    asked, go = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        if scope["path"] == "/slow":
            asked.set()
            await until(go)
        await respond(send, b"whole")

    async with serving(app, face) as served, await served.visit() as idle, await served.visit() as busy:
        await Browser(idle).ask()
        await busy.send_all(head("GET", "/slow") * 2)
        await in_thread(asked)
        served.stop()
        assert await read_all(idle) == b""
        assert not served.ended.is_set()
        go.set()
        answers = await read_all(busy)
        assert b"whole" in answers
        assert answers.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in answers
        await in_thread(served.ended)
        assert served.errors == []


async def test_what_is_not_over_in_time_is_cancelled_and_reset(face: Face) -> None:
    asked = threading.Event()
    ended: list[type[BaseException]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        asked.set()
        try:
            await until(threading.Event())
        except BaseException as error:
            ended.append(type(error))
            raise

    async with serving(app, face, graceful_timeout=0.05) as served, await served.visit() as stream:
        await stream.send_all(head("GET", "/"))
        await in_thread(asked)
        served.stop()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(stream)
        await in_thread(served.ended)
        assert served.errors == []
    assert [error.__name__ for error in ended] == ["Cancelled" if face == "trio" else "CancelledError"]


async def test_cancelling_it_resets_what_is_under_way(face: Face) -> None:
    asked = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        asked.set()
        await until(threading.Event())

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("GET", "/"))
        await in_thread(asked)
        served.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(stream)


async def test_a_bug_in_the_server_breaks_one_connection(
    face: Face, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Exchange.run

    async def fails_once(exchange: Exchange) -> Any:
        monkeypatch.setattr(Exchange, "run", run)
        raise ZeroDivisionError

    async with serving(echo, face) as served, await served.visit() as first, await served.visit() as other:
        monkeypatch.setattr(Exchange, "run", fails_once)
        await first.send_all(head("GET", "/"))
        with pytest.raises(trio.BrokenResourceError):
            await read_all(first)
        assert (await Browser(other).ask()).status == 200
    assert "ZeroDivisionError" in caplog.text
