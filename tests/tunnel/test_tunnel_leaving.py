"""A tunnel that is left: in order, with an error, by cancellation, or after its visitors."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn

import pytest
import trio
import trio.testing
from rig import (
    HANG,
    KEY,
    ask,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_rig,
    request,
    seeds,
)
from tunnel_rig import connected, failing, pair

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    RelayConnectError,
    TunnelAuthError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State, Status
from pioneer_tunnel.transports.interface import Deliver, Report, Session, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel
from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.yamux import session as yamux_session

# Leaving


async def test_after_close_accept_raises_closed(engine: EngineName) -> None:
    async with connected(engine) as (_, tunnel):
        await tunnel.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await tunnel.accept()
    with pytest.raises(trio.ClosedResourceError):
        await tunnel.accept()
    with pytest.raises(trio.ClosedResourceError):
        await tunnel.wait_connected()


async def test_closing_wakes_who_waits_in_accept() -> None:
    async with connected(None) as (_, tunnel), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await tunnel.accept()

        await trio.testing.wait_all_tasks_blocked(0.01)
        with no_hang():
            await tunnel.aclose()


async def test_after_aclose_visitors_are_turned_away_and_open_streams_go_on() -> None:
    async with connected(None) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor, stream:
            await tunnel.aclose()
            async with await rig.visit() as late:
                await late.send_all(request())
                with no_hang():
                    assert b" 502 " in (await read_all(late)).partition(b"\r\n")[0]
            await stream.send_all(b"still here")
            assert await read_exactly(visitor, 10) == b"still here"


async def test_visitors_in_the_backlog_when_the_listener_closes_are_reset_at_once(
    delivered: list[TunnelStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They used to hang until the session gave up on their being accepted, 30 seconds later."""
    monkeypatch.setattr(yamux_session, "ACCEPT_TIMEOUT", 10 * HANG)
    async with connected(None) as (rig, tunnel), await rig.visit() as visitor:
        await visitor.send_all(request())
        await eventually(lambda: delivered)
        await tunnel.aclose()
        with no_hang():
            assert b" 502 " in (await read_all(visitor)).partition(b"\r\n")[0]


async def test_visitors_in_the_backlog_when_the_tunnel_ends_are_turned_away(delivered: list[TunnelStream]) -> None:
    async with relay_rig() as rig:
        async with rig.tunnel() as tunnel:
            await tunnel.wait_connected()
            visitor = await rig.visit()
            await visitor.send_all(request())
            await eventually(lambda: delivered)
        with no_hang():
            assert b" 502 " in (await read_all(visitor)).partition(b"\r\n")[0]
        await visitor.aclose()


async def test_leaving_says_stopped_and_ends_the_watch() -> None:
    seen = []

    async def watch(tunnel: Tunnel) -> None:
        seen.extend([status.state async for status in tunnel.watch()])

    async with relay_rig() as rig, trio.open_nursery() as nursery, rig.tunnel() as tunnel:
        nursery.start_soon(watch, tunnel)
        await tunnel.wait_connected()
        await trio.testing.wait_all_tasks_blocked()
    assert (seen[0], seen[-1]) == (State.STARTING, State.STOPPED)
    assert State.CONNECTED in seen


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        ExceptionGroup("mine", [ValueError("one"), KeyError("two")]),
        ExceptionGroup("mine", [ValueError("only")]),
        KeyboardInterrupt(),
        TunnelAuthError("not the tunnel's own"),
    ],
    ids=repr,
)
async def test_what_the_body_raises_comes_out_as_it_is(error: BaseException) -> None:
    cause = RuntimeError("why")
    with pytest.raises(type(error)) as raised:  # noqa: PT012
        async with open_tunnel("ws://relay.test", key=KEY, transport=failing(InvalidSettingsError("no"))) as tunnel:
            with pytest.raises(InvalidSettingsError):
                await tunnel.accept()
            raise error from cause
    assert raised.value is error
    assert error.__cause__ is cause


async def test_a_failure_inside_somebody_elses_group_stays_there() -> None:
    mine = ValueError("mine")
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with (
            open_tunnel("ws://relay.test", key=KEY, transport=failing(InvalidSettingsError("no"))) as tunnel,
            trio.open_nursery() as nursery,
        ):

            @nursery.start_soon
            async def fail() -> None:
                try:
                    await tunnel.accept()
                finally:
                    raise mine

    assert raised.value.exceptions == (mine,)


class Broken(random.Random):
    """A source of jitter with a bug."""

    def random(self) -> float:
        raise ZeroDivisionError("no chance")

    def uniform(self, a: float, b: float) -> float:
        raise ZeroDivisionError("no chance")


def run_and_catch(body: Callable[[Tunnel], Awaitable[object]], **options: object) -> tuple[BaseException, Tunnel]:
    """What comes out of `trio.run` when the body waits in a tunnel. pytest-trio would pass a stray `Cancelled` over."""
    tunnels = []

    async def main() -> None:
        with no_hang():
            async with open_tunnel("ws://relay.test", key=KEY, **options) as tunnel:  # type: ignore[arg-type]
                tunnels.append(tunnel)
                await body(tunnel)

    try:
        trio.run(main)
    except BaseException as error:  # noqa: BLE001  # the caller looks at it
        return error, tunnels[0]
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), SystemExit(3), AssertionError("a bug")], ids=repr)
def test_the_end_of_the_program_and_a_bug_come_out_of_the_transport(error: BaseException, connected: bool) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        if connected:
            task_status.started(Session())
            await trio.sleep(0)
        raise error

    raised, tunnel = run_and_catch(Tunnel.accept, transport=serve)
    assert raised is error
    assert tunnel.status.state is State.STOPPED


async def watch(tunnel: Tunnel) -> list[Status]:
    return [status async for status in tunnel.watch()]


@pytest.mark.parametrize(
    "body",
    [Tunnel.accept, Tunnel.wait_connected, watch, lambda tunnel: trio.serve_listeners(echo, [tunnel])],
    ids=["accept", "wait_connected", "watch", "serve_listeners"],
)
def test_a_bug_in_the_tunnels_own_task_comes_out_of_whatever_the_body_waits_for(
    body: Callable[[Tunnel], Awaitable[object]],
) -> None:
    raised, tunnel = run_and_catch(body, random=Broken(), transport=failing(RelayConnectError("no")))
    assert isinstance(raised, ZeroDivisionError)
    assert [status.state for status in trio.run(watch, tunnel)] == [State.STOPPED]


def test_a_clock_that_fails_still_ends_the_watch() -> None:
    times = [2.0, 1.0]  # when counting begins, and of the first status
    raised, tunnel = run_and_catch(Tunnel.accept, transport=failing(RelayConnectError("no")), wall_clock=times.pop)
    assert isinstance(raised, IndexError)
    assert trio.run(watch, tunnel)


async def test_cancellation_passes_through_the_body() -> None:
    with trio.move_on_after(0.01) as scope:
        async with open_tunnel("ws://relay.test", key=KEY, transport=failing(InvalidSettingsError("no"))):
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("relay", "changes", "problem"),
    [
        ("http://relay.test", {}, "http"),
        ("ws://relay.test?a=b", {}, "query"),
        ("ws://user:pw@relay.test", {}, "user"),
        ("relay.test:443", {"relay_identity": "ed25519:zz"}, "relay_identity"),
        ("ws://relay.test", {"key": RelayKey("short")}, "shorter than 20 characters"),
        ("ws://relay.test", {"key": RelayKey("ed25519:" + "ab" * 32)}, "public half"),
        ("relay.test:2333", {"key": RelayKey("ed25519:" + "ab" * 32), "transport": "tcp"}, "public half"),
        ("relay.test:2333", {"transport": "process"}, "none is configured"),
        ("ws://relay.test", {"websocket_engine": "other"}, "is not installed"),
    ],
)
async def test_what_cannot_be_used_is_refused_at_once(relay: str, changes: dict[str, Any], problem: str) -> None:
    arguments: dict[str, Any] = {"key": KEY} | changes
    with pytest.raises((InvalidSettingsError, UnsupportedTransportError), match=problem):
        async with open_tunnel(relay, **arguments):
            pytest.fail("it was entered")


async def test_a_bare_address_is_dialled_with_tls() -> None:
    hello = b""

    async def dial(host: str, port: int) -> trio.abc.Stream:
        nonlocal hello
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(read_hello, theirs)
        return ours

    async def read_hello(stream: trio.abc.Stream) -> None:
        nonlocal hello
        hello = bytes(await stream.receive_some())
        await stream.aclose()

    async with trio.open_nursery() as nursery, open_tunnel("relay.test:443", key=KEY, dial=dial) as tunnel:
        await eventually(lambda: tunnel.status.error_kind is not None)
    assert hello[:2] == b"\x16\x03"
    assert any("TLS" in (status.message or "") for status in tunnel.history)


@seeds(30, quick=8)
async def test_cancellation_at_any_moment_leaves_nothing_behind(engine: EngineName, seed: int) -> None:
    """Cancelled while it dials, opens, serves, closes: no task and no socket stays, at either end."""
    chance = random.Random(seed)

    async def visit() -> None:
        while True:
            with trio.move_on_after(chance.uniform(0, 0.02)), suppress(trio.BrokenResourceError, OSError):
                async with await rig.visit() as visitor:
                    await ask(visitor, request(body=bytes(chance.randrange(500_000))))
            await trio.sleep(0)

    with nothing_left_behind():
        async with relay_rig(engine) as rig:
            with trio.move_on_after(chance.uniform(0, 0.05)):
                async with (
                    rig.tunnel() as tunnel,
                    in_background(visit, visit, lambda: trio.serve_listeners(echo, [tunnel])),
                ):
                    await trio.sleep_forever()


async def test_leaving_tells_the_relay_which_then_answers_503(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        async with rig.tunnel() as tunnel:
            await tunnel.wait_connected()

        async def is_told_503() -> bool:
            async with await rig.visit() as visitor:
                return b" 503 " in (await ask(visitor, request())).partition(b"\r\n")[0]

        await eventually(is_told_503)


async def test_a_relay_that_reads_nothing_can_be_left() -> None:
    """The goodbye is bounded, also towards a dead relay in the middle of a large send."""
    async with relay_rig() as rig:
        frozen = trio.Event()

        async def dial(host: str, port: int) -> trio.abc.Stream:
            return Freezable(await rig.dial(host, port), frozen)

        async with rig.tunnel(dial=dial) as tunnel:
            await tunnel.wait_connected()
            visitor, stream = await pair(rig, tunnel)
            async with trio.open_nursery() as nursery:
                frozen.set()
                nursery.start_soon(stream.send_all, bytes(4 * 1024 * 1024))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        await visitor.aclose()


class Freezable(trio.abc.Stream):
    """A connection whose other end takes nothing any more once `frozen` is set."""

    def __init__(self, stream: trio.abc.Stream, frozen: trio.Event) -> None:
        self._stream = stream
        self._frozen = frozen

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        if self._frozen.is_set():
            await trio.sleep_forever()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._frozen.is_set():
            await trio.sleep_forever()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


# Stopping in order


async def test_drain_waits_for_the_visitors_and_then_disconnects(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel), trio.open_nursery() as nursery:
        visitor, stream = await pair(rig, tunnel)
        nursery.start_soon(tunnel.drain, HANG)
        with no_hang(), pytest.raises(trio.ClosedResourceError):
            await tunnel.accept()
        await trio.testing.wait_all_tasks_blocked(0.01)  # until the relay has the go-away
        async with await rig.visit() as late:
            await late.send_all(request())
            with no_hang():
                assert (await read_all(late)).endswith(b"the gateway is not connected\n")
        async with visitor, stream:
            await stream.send_all(b"still here")
            assert await read_exactly(visitor, 10) == b"still here"
            assert tunnel.status.state is State.CONNECTED
            await visitor.send_eof()
        with no_hang():
            await eventually(lambda: tunnel.status.state is State.STOPPED)
        with pytest.raises(trio.ClosedResourceError):
            await tunnel.wait_connected()
        await tunnel.drain()  # once more changes nothing
    assert [status.state for status in tunnel.history].count(State.STOPPED) == 1


async def test_the_whole_answer_leaves_before_drain_returns() -> None:
    """A handler has closed its stream, and its bytes still wait."""
    async with connected(None) as (rig, tunnel), trio.open_nursery() as nursery:
        visitor, stream = await pair(rig, tunnel)
        received: list[bytes] = []

        @nursery.start_soon
        async def read_slowly() -> None:
            await trio.sleep(0.1)
            received.append(await read_all(visitor))
            await visitor.aclose()

        with no_hang():
            await stream.send_all(bytes(2**20))
            await stream.aclose()
            await tunnel.drain(10 * HANG)
        assert len(received[0]) == 2**20


async def test_who_waits_to_be_accepted_is_accepted(delivered: list[TunnelStream]) -> None:
    async with connected(None) as (rig, tunnel), await rig.visit() as visitor, trio.open_nursery() as nursery:
        await visitor.send_all(request())
        await eventually(lambda: delivered)
        nursery.start_soon(tunnel.drain, 10 * HANG)
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with await tunnel.accept() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            await visitor.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await tunnel.accept()


async def test_after_the_grace_visitors_are_reset() -> None:
    async with connected(None) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(b"half of")
            await read_exactly(visitor, 7)
            with no_hang():
                await tunnel.drain(0.05)
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"too late")
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)


async def test_a_drain_that_is_cancelled_ends_the_tunnel_at_once() -> None:
    async with connected(None) as (rig, tunnel):
        visitor, _ = await pair(rig, tunnel)
        async with visitor:
            with trio.move_on_after(0.05):
                await tunnel.drain(10 * HANG)
            with no_hang():
                await eventually(lambda: tunnel.status.state is State.STOPPED)


async def test_a_tunnel_that_has_failed_can_be_drained() -> None:
    async with open_tunnel("wss://relay.test", key=KEY, transport=failing(TunnelAuthError("no"))) as tunnel:
        await eventually(lambda: tunnel.status.state is State.FAILED)
        with no_hang():
            await tunnel.drain()
        assert tunnel.status.state is State.FAILED
        with pytest.raises(TunnelAuthError):
            await tunnel.accept()
