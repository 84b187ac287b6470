"""`open_tunnel` keeps its promises to a visitor, through a real relay, over both engines."""

from __future__ import annotations

from typing import NoReturn

import pytest
import trio
import trio.testing
from rig import (
    HOST,
    KEY,
    ask,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    raise_again_and_again,
    read_exactly,
    relay_rig,
    request,
)
from tunnel_rig import WRONG_KEY, bound, connected, failing, pair

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    RestartLimitError,
    TunnelAuthError,
)
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import open_tunnel
from pioneer_tunnel.websocket import EngineName

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
