"""A visitor on its way from the Trio thread to an event loop that does not take it any more."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import pytest
import trio
from rig import nothing_left_behind, read_all

from pioneer_tunnel.aio.bridge import AsyncioWire, Bridge, Bridged, Link
from pioneer_tunnel.aio.on_asyncio import open_app_server
from pioneer_tunnel.asgi import Options
from pioneer_tunnel.asgi.scope import Visitor
from pioneer_tunnel.testing import MemoryStream, open_memory_relay
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import open_tunnel

VISITOR: Final = Visitor(None, None, "http")


@asynccontextmanager
async def visiting() -> AsyncIterator[tuple[MemoryStream, TunnelStream]]:
    async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
        await tunnel.wait_connected()
        async with await relay.visit() as visitor:
            await visitor.send_all(b"x")
            yield visitor, await tunnel.accept()


async def is_reset(visitor: MemoryStream) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some()


def never(*_: Any) -> NoReturn:
    raise AssertionError


async def made_in_a_loop(deliver: Any = never, ended: Any = never) -> Bridge:
    return Bridge(deliver, ended)


async def test_a_visitor_that_comes_when_the_loop_is_closed_is_reset() -> None:
    bridge = await trio.to_thread.run_sync(asyncio.run, made_in_a_loop())
    with nothing_left_behind():
        async with visiting() as (visitor, stream):
            await bridge.handle(stream)
            await is_reset(visitor)


async def test_a_visitor_for_whom_there_is_no_descriptor_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    bridge = await trio.to_thread.run_sync(asyncio.run, made_in_a_loop())
    async with visiting() as (visitor, stream):
        monkeypatch.setattr(socket, "socketpair", refuse)
        await bridge.handle(stream)
        monkeypatch.undo()
        await is_reset(visitor)


class Here:
    """An event loop that calls at once."""

    def call_soon_threadsafe(self, call: Any, *arguments: Any) -> None:
        call(*arguments)


@pytest.mark.parametrize("complete", [False, True])
async def test_an_end_without_a_word_is_a_reset(monkeypatch: pytest.MonkeyPatch, complete: bool) -> None:
    """As when the loop is gone, and the garbage collector closes what was open in it."""

    def deliver(bridged: Bridged) -> None:
        bridged.socket.send(b"an answer")
        bridged.link.answer_ended = complete
        bridged.socket.close()

    monkeypatch.setattr(asyncio, "get_running_loop", Here)
    ended: list[bool] = []
    bridge = Bridge(deliver, lambda: ended.append(True))
    async with visiting() as (visitor, stream):
        await bridge.handle(stream)
        if complete:
            assert await read_all(visitor) == b"an answer"
        else:
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
    assert ended == [True]


async def test_a_server_that_stops_takes_no_visitor() -> None:
    ours, theirs = socket.socketpair()

    async def main() -> None:
        async with open_app_server(never, "off", Options()) as server:
            server.cancel()
            server._start(Bridged(theirs, VISITOR, Link()))

    await trio.to_thread.run_sync(asyncio.run, main())
    assert ours.recv(1) == b""
    ours.close()


async def test_a_socket_that_cannot_be_used_turns_one_visitor_away(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()

    async def refuse(wire: AsyncioWire) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    async def main() -> None:
        async with open_app_server(never, "off", Options()) as server:
            server._start(Bridged(theirs, VISITOR, Link()))
            await asyncio.sleep(0)

    monkeypatch.setattr(AsyncioWire, "open", refuse)
    await trio.to_thread.run_sync(asyncio.run, main())
    assert "turned away" in caplog.text
    assert ours.recv(1) == b""
    ours.close()


@pytest.mark.parametrize("way", ["reset", "aclose"])
async def test_a_stream_that_is_closed_at_this_end_has_gone(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As a generation of `RemoteAccess` does at its end."""
    delivered: list[Bridged] = []
    monkeypatch.setattr(asyncio, "get_running_loop", Here)
    bridge = Bridge(delivered.append, lambda: None)
    async with visiting() as (_, stream), trio.open_nursery() as nursery:
        nursery.start_soon(bridge.handle, stream)
        await trio.testing.wait_all_tasks_blocked()
        if way == "reset":
            stream.reset()
        else:
            await stream.aclose()
    (bridged,) = delivered
    assert bridged.socket.recv(1) == b"x"
    assert bridged.socket.recv(1) == b""
    assert not bridged.link.visitor_ended
    bridged.socket.close()
