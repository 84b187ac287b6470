"""`open_tunnel` keeps its promises to a visitor, through a real relay, over both engines."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import pytest
import trio
import trio.testing
from rig import (
    HANG,
    HOST,
    KEY,
    RelayRig,
    ask,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    raise_again_and_again,
    read_all,
    read_exactly,
    relay_rig,
    request,
    seeds,
    tunnel_entry,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    RelayConnectError,
    RestartLimitError,
    TunnelAuthError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.transports.interface import Deliver, Report, Serve, Session, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel
from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.yamux import session as yamux_session

WRONG_KEY = RelayKey("ptk1_a-key-that-nobody-has-registered")
BOUND = [tunnel_entry(bind_addr="127.0.0.1:0")]


@asynccontextmanager
async def connected(engine: EngineName | None, **changes: object) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    async with relay_rig(engine) as rig, rig.tunnel(**changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield rig, tunnel


Come = Callable[[], Awaitable[trio.SocketStream]]


@asynccontextmanager
async def bound(engine: EngineName | None, **changes: object) -> AsyncIterator[tuple[Come, Tunnel]]:
    """A tunnel whose visitors come to a port of their own, so that every byte is theirs."""
    async with relay_rig(engine, tunnels=BOUND) as rig, rig.tunnel(**changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield functools.partial(connect, rig.addresses.tunnels["office"]), tunnel


async def pair(rig: RelayRig, tunnel: Tunnel, asked: bytes = b"") -> tuple[trio.SocketStream, TunnelStream]:
    """A visitor, and its stream at the gateway with the request read."""
    visitor, asked = await rig.visit(), asked or request()
    await visitor.send_all(asked)
    stream = await tunnel.accept()
    assert await read_exactly(stream, len(asked)) == asked
    return visitor, stream


def failing(error: TunnelError) -> Serve:
    """A transport that comes to nothing."""

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        raise error

    return serve


# Coming up


async def test_the_context_is_entered_at_once_and_connects_meanwhile(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        dialled = trio.Event()

        async def dial(host: str, port: int) -> trio.SocketStream:
            dialled.set()
            assert host == "relay.test"
            return await rig.dial(host, port)

        async with rig.tunnel(dial=dial) as tunnel:
            assert not dialled.is_set()
            assert tunnel.status.state is State.STARTING
            assert tunnel.public_url is None
            with no_hang():
                status = await tunnel.wait_connected()
            assert status.state is State.CONNECTED
            assert status.public_url == tunnel.public_url == f"http://{HOST}"


async def test_a_visitor_is_served_and_its_address_is_known(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor, stream:
            assert stream.visitor == Address(*visitor.socket.getsockname())
            assert stream.proxy_header.local == Address(*visitor.socket.getpeername())
            assert stream.tls is False
            assert stream.tunnelled
            assert str(stream.visitor) in repr(stream)
            await stream.send_all(b"answer")
            assert await read_exactly(visitor, 6) == b"answer"


async def test_200_visitors_at_once_each_get_their_own_answer(engine: EngineName) -> None:
    answers: dict[int, bytes] = {}

    async def visit(number: int) -> None:
        async with await rig.visit() as visitor:
            answers[number] = await ask(visitor, request(body=b"visitor %d " % number * 500))

    async with connected(engine) as (rig, tunnel), in_background(lambda: trio.serve_listeners(echo, [tunnel])):
        with no_hang():
            async with trio.open_nursery() as visitors:
                for number in range(200):
                    visitors.start_soon(visit, number)
    assert answers == {number: request(body=b"visitor %d " % number * 500) for number in range(200)}


async def test_a_visitor_that_reads_nothing_does_not_hold_up_the_others(engine: EngineName) -> None:
    async def flood(stream: TunnelStream) -> None:
        async with stream:
            first = await stream.receive_some()
            await stream.send_all(bytes(64 * 1024 * 1024) if first == b"flood" else first)
            await echo(stream)

    async with (
        bound(engine) as (come, tunnel),
        in_background(lambda: trio.serve_listeners(flood, [tunnel])),
        await come() as deaf,
    ):
        await deaf.send_all(b"flood")
        await trio.sleep(0.3)
        with no_hang():
            for _ in range(20):
                async with await come() as visitor:
                    assert await ask(visitor, bytes(range(256)) * 64) == bytes(range(256)) * 64


# Ending a stream


async def test_a_visitor_that_ends_its_half_gets_the_whole_reply(engine: EngineName) -> None:
    """The visitor's FIN comes first, the large reply after: where other tunnels lose data."""
    reply = random.Random(1).randbytes(8 * 1024 * 1024)

    async def answer(stream: TunnelStream) -> None:
        async with stream:
            question = await read_all(stream)
            await trio.sleep(0.05)
            await stream.send_all(hashlib.sha256(question).digest() + reply)

    async with (
        bound(engine) as (come, tunnel),
        in_background(lambda: trio.serve_listeners(answer, [tunnel])),
        await come() as visitor,
    ):
        question = bytes(1024 * 1024)
        with no_hang():
            assert await ask(visitor, question) == hashlib.sha256(question).digest() + reply


async def test_an_answer_to_a_request_that_was_not_read_to_its_end_arrives(engine: EngineName) -> None:
    """Found by an attack: the server's reset overtook its answer, and the visitor was told 502."""
    refused = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000

    async def refuse(local: trio.SocketStream) -> None:
        async with local:  # with most of the request unread, so the system resets
            await local.receive_some(1000)
            await local.send_all(refused)

    async with trio.open_nursery() as nursery, connected(engine) as (rig, tunnel):
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
        handler = functools.partial(forward, local=Address(*listener.socket.getsockname()))
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        for _ in range(5):
            async with await rig.visit() as visitor:
                with suppress(trio.BrokenResourceError):
                    await visitor.send_all(request(body=bytes(200_000)))
                with no_hang():
                    assert await read_exactly(visitor, len(refused)) == refused
        nursery.cancel_scope.cancel()


async def test_a_local_server_that_thinks_is_told_that_its_half_closed_visitor_has_left(engine: EngineName) -> None:
    """Found by an attack: the local connection stayed for as long as the server had nothing to say."""
    thinks, told = trio.Event(), trio.Event()

    async def think(local: trio.SocketStream) -> None:
        async with local:
            with suppress(trio.BrokenResourceError):
                await read_all(local)
                thinks.set()
                while True:  # once it has read the end, only a send would tell; the system's view of it will do
                    await trio.sleep(0.01)
                    if local.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_ERROR):
                        told.set()
                        return

    async with trio.open_nursery() as nursery, relay_rig(engine) as rig, rig.tunnel() as tunnel:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, think, 0, host="127.0.0.1"))
        handler = functools.partial(forward, local=Address(*listener.socket.getsockname()))
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        with no_hang():
            await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            await visitor.send_eof()
            with no_hang():
                await thinks.wait()
            await rig.stop()  # the link is lost
            with no_hang():
                await told.wait()
        nursery.cancel_scope.cancel()


async def test_the_gateway_may_end_its_half_first_and_go_on_receiving(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        upload = random.Random(2).randbytes(2 * 1024 * 1024)
        visitor, stream = await pair(rig, tunnel, request(f"Content-Length: {len(upload)}"))
        async with visitor, stream:
            await stream.send_all(b"all that I have")
            await stream.send_eof()
            assert await read_all(visitor) == b"all that I have"
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    await visitor.send_all(upload)
                    await visitor.send_eof()

                with no_hang():
                    assert await read_all(stream) == upload


async def test_aclose_ends_the_visitors_connection_orderly_after_all_data(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(bytes(200_000))
            await stream.aclose()
            with no_hang():
                assert await read_all(visitor) == bytes(200_000)


async def test_reset_ends_the_visitors_connection_with_a_reset(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(b"half an ans")
            assert await read_exactly(visitor, 11) == b"half an ans"
            stream.reset()
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            assert not stream.usable


async def test_a_cancelled_aclose_is_a_reset(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(b"half an ans")
            assert await read_exactly(visitor, 11) == b"half an ans"
            await trio.aclose_forcefully(stream)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)


async def test_a_visitor_that_resets_breaks_the_stream(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with stream:
            await abandon(visitor)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
            assert not stream.usable


async def test_what_a_handler_leaves_open_is_reset(engine: EngineName) -> None:
    async def forget(stream: TunnelStream) -> None:
        await stream.send_all(b"I may have")

    async with (
        connected(engine) as (rig, tunnel),
        in_background(lambda: trio.serve_listeners(forget, [tunnel])),
        await rig.visit() as visitor,
    ):
        await visitor.send_all(request())
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)


async def test_a_visitor_of_a_full_backlog_is_reset(engine: EngineName, delivered: list[TunnelStream]) -> None:
    async with connected(engine, backlog=2) as (rig, tunnel):
        waiting = []
        for _ in range(2):
            waiting.append(await rig.visit())
            await waiting[-1].send_all(request())
        await eventually(lambda: len(delivered) == 2)
        async with await rig.visit() as third:
            await third.send_all(request())
            with no_hang():
                assert b" 502 " in (await read_all(third)).partition(b"\r\n")[0]
        for visitor in waiting:
            stream = await tunnel.accept()
            assert await read_exactly(stream, len(request())) == request()
            await stream.aclose()
            assert await read_all(visitor) == b""
            await visitor.aclose()


async def test_a_visitor_that_left_while_it_waited_is_not_accepted(
    engine: EngineName, delivered: list[TunnelStream]
) -> None:
    async with bound(engine) as (come, tunnel):
        gone = await come()
        await eventually(lambda: delivered)
        await abandon(gone)
        await eventually(lambda: not delivered[0].usable)
        async with await come() as visitor:
            with no_hang():
                stream = await tunnel.accept()
            async with stream:
                assert stream.visitor == Address(*visitor.socket.getsockname())


async def test_tunnel_streams_keep_trios_contract(engine: EngineName) -> None:
    """Both ends are ours: a yamux stream at the gateway, and the visitor's socket behind a real relay."""

    async with bound(engine) as (come, tunnel):

        async def make_pair() -> tuple[trio.SocketStream, TunnelStream]:
            visitor = await come()
            return visitor, await tunnel.accept()

        with no_hang():
            await trio.testing.check_half_closeable_stream(make_pair, None)


# Reconnecting


async def test_accept_waits_through_a_relay_that_is_killed_and_started_again(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel), in_background(lambda: trio.serve_listeners(echo, [tunnel])):
        for _ in range(3):
            async with await rig.visit() as visitor:
                assert await ask(visitor, request(body=b"hello")) == request(body=b"hello")
            await rig.stop()
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
            assert tunnel.status.error_kind is ErrorKind.RELAY_CONNECT_FAILED
            assert tunnel.public_url == f"http://{HOST}"
            await rig.start()
            with no_hang():
                await tunnel.wait_connected()


async def test_visitors_keep_coming_while_the_relay_restarts(engine: EngineName) -> None:
    """Each gets its whole answer, or none and knows it: never a part."""
    served = 0

    async def keep_coming() -> None:
        nonlocal served
        while True:
            try:
                async with await rig.visit() as visitor:
                    answer = await ask(visitor, request(body=bytes(300_000)))
            except (OSError, trio.BrokenResourceError):
                continue
            status = answer.partition(b"\r\n")[0]
            if status.startswith(b"HTTP/1.1 50"):
                await trio.sleep(0.01)
                continue
            assert answer == request(body=bytes(300_000))
            served += 1

    async with (
        connected(engine) as (rig, tunnel),
        in_background(lambda: trio.serve_listeners(echo, [tunnel]), *[keep_coming] * 4),
    ):
        for _ in range(3):
            before = served
            await eventually(lambda before=before: served > before + 3)  # type: ignore[misc]
            await rig.stop()
            await rig.start()
        before = served
        await eventually(lambda: served > before + 3)


async def test_retry_now_cuts_the_wait_short() -> None:
    async with relay_rig() as rig:
        await rig.stop()
        async with rig.tunnel(restart=RestartPolicy(initial=1000, maximum=1000)) as tunnel:
            await eventually(lambda: tunnel.status.retry_at_unix is not None)
            assert tunnel.status.state is State.FAILED
            await rig.start()
            tunnel.retry_now()
            with no_hang():
                await tunnel.wait_connected()


# Failing for good


async def test_a_rejected_key_is_raised_by_accept_each_time(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, rig.tunnel(key=WRONG_KEY) as tunnel:
        with no_hang():
            with pytest.raises(TunnelAuthError) as first:
                await tunnel.accept()
            with pytest.raises(TunnelAuthError) as second:
                await tunnel.accept()
            with pytest.raises(TunnelAuthError):
                await tunnel.wait_connected()
        assert first.value.args == second.value.args
        assert tunnel.status.state is State.FAILED
        assert tunnel.status.error_kind is ErrorKind.TUNNEL_AUTH_FAILED
        assert WRONG_KEY.reveal() not in str(tunnel.history)
    assert tunnel.status == tunnel.history[-1]
    assert tunnel.history[-1].state is State.STOPPED


async def test_a_final_failure_comes_out_of_serve_listeners_bare(engine: EngineName) -> None:
    with nothing_left_behind():
        async with relay_rig(engine) as rig:
            with no_hang(), pytest.raises(TunnelAuthError):
                async with rig.tunnel(key=WRONG_KEY) as tunnel:
                    await trio.serve_listeners(echo, [tunnel])


async def test_a_final_failure_can_be_raised_again_and_again() -> None:
    async with open_tunnel("ws://relay.test", key=KEY, transport=failing(InvalidSettingsError("no"))) as tunnel:
        await raise_again_and_again(tunnel.accept, InvalidSettingsError)
        await raise_again_and_again(tunnel.wait_connected, InvalidSettingsError)


async def test_restarts_that_are_used_up_tell_the_last_cause() -> None:
    async def dial(host: str, port: int) -> NoReturn:
        raise ConnectionRefusedError(111, "Connection refused")

    policy = RestartPolicy(initial=0.01, maximum=0.01, max_restarts=2)
    async with open_tunnel("ws://relay.test", key=KEY, dial=dial, restart=policy) as tunnel:
        with no_hang(), pytest.raises(RestartLimitError, match="Connection refused"):
            await tunnel.accept()
    assert max(status.attempt or 0 for status in tunnel.history) == 3


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
