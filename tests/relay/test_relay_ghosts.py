"""Sessions of gateways that are not there any more: they keep neither the tunnel nor its visitors."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing
from memory_relay import relay_in_memory
from raw_gateways import raw_gateway
from rig import (
    eventually,
    no_hang,
    open_sockets,
    read_all,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
    until_it_raises,
)
from statuses import check_contract

from pioneer_tunnel._model.status import State
from pioneer_tunnel.relay.gateways.takeover import ANSWER_TIMEOUT, Takeover
from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.yamux import YamuxConnection, YamuxStream


async def test_a_dead_holder_does_not_lock_the_tunnel(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(request())
        stream = await first.accept()
        await stream.send_all(b"half of")
        await read_exactly(visitor, 7)
        relay.cables[0].pull()
        async with relay.tunnel("host-b") as second:
            started = trio.current_time()
            await second.wait_connected()
            assert trio.current_time() - started == pytest.approx(ANSWER_TIMEOUT)
            with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
                await read_broken(visitor)
            assert relay.cables[0].let_go


async def read_broken(visitor: trio.abc.ReceiveStream) -> None:
    """Streams in memory cannot be reset: the pump closes them, and the sender gets an error."""
    assert await visitor.receive_some() == b""
    raise trio.BrokenResourceError


async def test_two_newcomers_to_a_dead_holder_do_not_both_get_in(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        relay.cables[0].pull()
        async with relay.tunnel("host-b") as second, relay.tunnel("host-c") as third:
            await trio.sleep(10)
            states = [second.status.state, third.status.state]
            assert sorted(states) == [State.CONNECTED, State.FAILED]
            [winner] = [
                name
                for name, tunnel in (("host-b", second), ("host-c", third))
                if tunnel.status.state is State.CONNECTED
            ]
            [loser] = [tunnel for tunnel in (second, third) if tunnel.status.state is State.FAILED]
            assert repr(winner) in (loser.status.message or "")


async def test_a_gateway_without_an_instance_is_a_stranger_to_its_own_ghost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("") as first:
        await first.wait_connected()
        async with relay.tunnel("") as second:
            await trio.sleep(1)
            assert "an instance without name has this tunnel" in (second.status.message or "")
            relay.cables[0].pull()
            with trio.fail_after(30):
                await second.wait_connected()


@pytest.mark.parametrize("room", [0.0, 100.0, float("inf")], ids=["stuck", "stuck soon", "swallowed"])
@pytest.mark.parametrize("takeover", [*Takeover])
async def test_a_ghost_is_gone_within_a_second(
    autojump_clock: trio.testing.MockClock, takeover: Takeover, room: float
) -> None:
    """Whether the socket still takes data."""
    async with relay_in_memory(takeover=takeover) as relay, relay.tunnel("host-a") as ghost:
        await ghost.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(request())
        stream = await ghost.accept()
        await stream.send_all(b"half of")
        await read_exactly(visitor, 7)
        relay.cables[0].pull(room=room)
        await visitor.send_all(bytes(100_000))
        await trio.sleep(0.1)
        async with relay.tunnel("host-a") as back:
            started = trio.current_time()
            await back.wait_connected()
            assert trio.current_time() == started, "at once"
            with pytest.raises(trio.BrokenResourceError):
                await until_it_raises(lambda: drip(visitor))
            while not relay.cables[0].let_go:
                await trio.sleep(0.01)
            assert trio.current_time() - started < 1


async def test_a_gateway_that_comes_back_is_no_other_one(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_in_memory(takeover="first") as relay, relay.tunnel("host-a") as tunnel:
        await tunnel.wait_connected()
        for cable in range(3):
            relay.cables[cable].end.inbound.break_()
            await trio.sleep(5)
            assert tunnel.status.state is State.CONNECTED
        check_contract(tunnel.history)


async def test_a_ghost_that_never_reads_does_not_keep_its_visitors(
    engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over real sockets, with their buffers full of what it does not take."""
    opened = 0
    open_stream = YamuxConnection.open_stream_nowait

    def count(self: YamuxConnection) -> YamuxStream:
        nonlocal opened
        opened += 1
        return open_stream(self)

    monkeypatch.setattr(YamuxConnection, "open_stream_nowait", count)
    async with relay_rig(engine, tunnels=[tunnel_entry(takeover="first")]) as rig, raw_gateway(rig, instance="me"):
        visitors = [await rig.visit() for _ in range(10)]
        async with trio.open_nursery() as nursery:
            for visitor in visitors:
                nursery.start_soon(send_what_it_takes, visitor, request(body=bytes(240_000)))
            await eventually(lambda: opened == len(visitors))
            await trio.testing.wait_all_tasks_blocked(0.05)
            before = open_sockets()
            async with rig.tunnel(instance="me") as tunnel:
                await tunnel.wait_connected()
                with no_hang():
                    for visitor in visitors:
                        assert (await read_all(visitor)).startswith(b"HTTP/1.1 502 ")
            nursery.cancel_scope.cancel()
        for visitor in visitors:
            await visitor.aclose()
        await eventually(lambda: len(open_sockets()) <= len(before) - 2 * len(visitors))


async def drip(stream: trio.abc.SendStream) -> None:
    await stream.send_all(b"a drop")
    await trio.sleep(0.01)


async def send_what_it_takes(stream: trio.SocketStream, data: bytes) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(data)
