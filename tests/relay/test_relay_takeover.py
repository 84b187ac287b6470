"""Two hosts with one key: who has the tunnel, and what the other one learns."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from memory_relay import EPOCH, relay_in_memory, until_cancelled
from rig import echo, in_background, read_exactly, request
from statuses import check_contract

from pioneer_tunnel._model.errors import ReplacedError
from pioneer_tunnel._model.status import ErrorKind, State


async def test_the_first_one_keeps_its_tunnel_over_many_tries(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        async with relay.tunnel("host-b") as second, in_background(lambda: trio.serve_listeners(echo, [first])):
            for _ in range(60):
                await trio.sleep(60)
                visitor = await relay.visit()
                await visitor.send_all(request())
                assert await read_exactly(visitor, len(request())) == request()
                await visitor.aclose()
            assert len(relay.cables) > 100, "it tries on"
            assert {status.state for status in first.history} <= {State.STARTING, State.CONNECTED}
            check_contract(first.history)
            waiting = second.status
            assert (waiting.state, waiting.error_kind) == (State.FAILED, ErrorKind.RELAY_CONNECT_FAILED)
            assert "instance 'host-a' has this tunnel, since 2023-11-14 22:13:20 UTC" in (waiting.message or "")
            assert len(waiting.message or "") <= 300
            assert {status.message for status in second.history if status.message} == {waiting.message}
            check_contract(second.history)


async def test_it_waits_as_long_as_it_was_told(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        async with relay.tunnel("host-b") as second:
            while second.status.retry_at_unix is None:
                await trio.sleep(0.1)
            assert second.status.retry_at_unix >= EPOCH + 5, "and not after the second that its own policy has"


async def test_when_the_first_one_leaves_the_second_has_it(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, trio.open_nursery() as nursery:
        first, leaving = await nursery.start(until_cancelled, relay.tunnel("host-a"))
        await first.wait_connected()
        async with relay.tunnel("host-b") as second:
            await trio.sleep(60)
            assert second.status.state is State.FAILED
            leaving.cancel()
            with trio.fail_after(40):
                await second.wait_connected()
            check_contract(second.history)


async def test_one_that_was_up_and_comes_back_too_late_says_reconnecting(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        relay.cables[0].end.outbound.break_()
        async with relay.tunnel("host-b", dial=relay.dial) as second:
            await second.wait_connected()
            await trio.sleep(60)
            assert (first.status.state, first.status.error_kind) == (
                State.RECONNECTING,
                ErrorKind.RELAY_CONNECT_FAILED,
            )
            assert "'host-b'" in (first.status.message or "")
            check_contract(first.history)


async def test_the_newest_one_has_it_and_the_other_stops(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory() as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        async with relay.tunnel("host-b") as second:
            await second.wait_connected()
            with pytest.raises(ReplacedError, match="'host-b'"):
                await first.accept()
            await trio.sleep(3600)
            assert (first.status.state, first.status.error_kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
            assert "'host-b'" in (first.status.message or "")
            assert {status.state for status in second.history} == {State.STARTING, State.CONNECTED}
            assert len(relay.cables) == 2, "nobody tries again"
            check_contract(first.history)


async def test_two_without_an_instance_do_not_fight_either(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory() as relay, relay.tunnel("") as first:
        await first.wait_connected()
        async with relay.tunnel("") as second:
            await second.wait_connected()
            await trio.sleep(3600)
            assert (first.status.state, first.status.error_kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
            assert len(relay.cables) == 2
