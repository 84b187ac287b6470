"""The channel between the parent and a worker: calls, messages in order, and sockets that go with them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from hypothesis import given, settings, strategies as st
from rig import no_hang

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.relay.workers import channel as channel_module
from pioneer_tunnel.relay.workers.channel import CallFailed, Channel

JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class End:
    """What an end answers, and what it has heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any, list[int]]] = []

    async def answer(self, method: str, params: Any) -> Any:
        match method:
            case "echo":
                return params
            case "invalid":
                raise InvalidSettingsError("relay.id: is missing")
            case "taken":
                raise OSError(98, "Address already in use")
            case "wait":
                await trio.sleep_forever()
        raise RuntimeError("a bug")

    def hear(self, method: str, params: Any, sockets: Sequence[socket.socket]) -> None:
        self.heard.append((method, params, [one.getsockname()[1] for one in sockets]))
        for one in sockets:
            assert not one.get_inheritable()
            one.close()


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[Channel, Channel, End]]:
    """The first one calls, the second one answers."""
    ours, theirs = socket.socketpair()
    end = End()
    first, second = Channel(ours, End().answer, End().hear), Channel(theirs, end.answer, end.hear)
    with no_hang():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            nursery.start_soon(second.run)
            yield first, second, end
            nursery.cancel_scope.cancel()


@settings(max_examples=20)
@given(params=st.lists(JSON, max_size=8))
def test_calls_are_answered_and_messages_heard_in_order(params: list[Any]) -> None:
    async def run() -> None:
        async with two_ends() as (first, _, end):
            for one in params:
                first.tell("tell", one)
                assert await first.call("echo", one) == one
            assert [heard[1] for heard in end.heard] == params

    trio.run(run)


async def test_a_long_message_and_sockets_between_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (one, other)]
        async with two_ends() as (first, _, end):
            long = "x" * 3_000_000
            first.tell("first", None, [one, other])
            first.tell("second", long)
            first.tell("third", None, [other])
            assert await first.call("echo", long) == long
    assert end.heard == [("first", None, ports), ("second", long, []), ("third", None, ports[1:])]


async def test_what_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with two_ends() as (first, _, _end):
        with pytest.raises(CallFailed, match=r"relay\.id: is missing") as failed:
            await first.call("invalid")
        assert failed.value.kind is ErrorKind.INVALID_SETTINGS
        with pytest.raises(CallFailed, match="Address already in use"):
            await first.call("taken")
        with pytest.raises(CallFailed, match="an unforeseen failure, see the log: RuntimeError"):
            await first.call("nothing")
        assert "a bug" in caplog.text
        assert await first.call("echo", 1) == 1


async def test_an_end_that_is_gone_fails_calls_and_takes_no_messages() -> None:
    async with two_ends() as (first, second, _end):
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await first.call("wait")

            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            second.close()
        with pytest.raises(trio.BrokenResourceError):
            await first.call("echo")
        first.tell("tell")


async def test_an_end_that_takes_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that was stopped must not use up the parent's memory."""
    monkeypatch.setattr(channel_module, "MOST_QUEUED", 1_000_000)
    ours, theirs = socket.socketpair()
    end = End()
    channel = Channel(ours, end.answer, end.hear)
    with theirs, no_hang():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run)
            for _ in range(20):
                channel.tell("tell", "x" * 100_000)
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BrokenResourceError):
                await channel.call("echo")
    assert "takes no messages" in caplog.text
