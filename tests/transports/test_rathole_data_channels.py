"""The transports `tcp` and `tls`: data channels that come to nothing."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import trio
import trio.testing
from rathole_rig import ADDRESS, CREATE, KEY, a_tunnel, connected, every_way
from rig import ask, echo, eventually, in_background, no_hang, nothing_left_behind, read_all, read_exactly

from pioneer_tunnel._model.status import State
from pioneer_tunnel._net import dialing as dialer
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.dialing import Attempt
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.log_limiter import LINES_IN_FULL
from pioneer_tunnel.testing import Moment, ScriptedPioneerRelay, Trouble, Way, open_pioneer_relay
from pioneer_tunnel.transports.interface import Target
from pioneer_tunnel.transports.rathole import data_channels
from pioneer_tunnel.transports.rathole.control_channel import RatholeTransport
from pioneer_tunnel.transports.tunnel_stream import TunnelStream


@every_way
@pytest.mark.parametrize("way", [Way.DROP, Way.RESET, Way.HALF, Way.JUNK, Way.UDP])
@pytest.mark.parametrize("moment", [Moment.DATA, Moment.START])
async def test_a_data_channel_that_breaks_harms_nobody_else(moment: Moment, way: Way) -> None:
    with nothing_left_behind():
        async with (
            open_pioneer_relay(key=KEY, troubles=[Trouble(moment, way)]) as relay,
            a_tunnel(relay) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            with no_hang():
                await tunnel.wait_connected()
            turned_away = await relay.visit()
            await eventually(lambda: relay.data_channels >= 8)
            assert tunnel.status.state is State.CONNECTED
            await turned_away.aclose()
            relay.drop_gateway()  # the second time the relay behaves
            await eventually(lambda: relay.control_channels == 2 and relay.connected)
            with no_hang():
                async with await relay.visit() as visitor:
                    assert await ask(visitor, b"x") == b"x"


@every_way
async def test_what_a_relay_spoils_again_and_again_is_few_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It asks for data channels as often as it likes, and each one that it spoils was a line."""

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "came to nothing" in record.getMessage()]

    async with open_pioneer_relay(key=KEY, then=Trouble(Moment.DATA, Way.JUNK)) as relay, a_tunnel(relay) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        relay.tell(CREATE * 50)
        await eventually(lambda: relay.data_channels >= 50 and len(told()) >= LINES_IN_FULL)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(told()) == LINES_IN_FULL
    assert told()[0].levelno == logging.WARNING


async def test_data_channels_that_are_lost_at_once_are_dialled_again_after_pauses(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Found by an attack: a relay that reset each one kept the gateway dialling, and everything else waiting."""
    trouble = Trouble(Moment.DATA, Way.RESET)
    relay = ScriptedPioneerRelay(key=KEY, then=trouble)
    target = Target(key=KEY, dial=relay.dial, address=ADDRESS, connect_timeout=10.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await nursery.start(functools.partial(RatholeTransport(), target, lambda stream: None, lambda event: None))
        relay.tell(CREATE * 1000)
        await trio.sleep(0.5)
        assert 32 <= relay.data_channels <= 700
        await trio.sleep(5)
        assert relay.data_channels >= 1000
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no reactor")
async def test_data_channels_are_dialled_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run after 32 of them, however many the relay asks for in one breath."""
    dials = [0]

    def count(host: str, port: int) -> Attempt | None:
        dials[-1] += 1
        return dialer.begin_dial(host, port)

    async def others() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            if dials[-1]:
                dials.append(0)

    monkeypatch.setattr(data_channels, "begin_dial", count)
    async with connected() as (relay, _), in_background(others):
        relay.tell(CREATE * 200)
        await eventually(lambda: relay.data_channels == 208)
    assert sum(dials) == 208
    assert max(dials) < 100


async def test_a_data_channel_is_dialled_again_for_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    dialled: list[float] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        if relay.control_channels == 0:
            return await relay.dial(host, port)
        dialled.append(trio.current_time())
        raise ConnectionRefusedError(111, "Connection refused")

    async with open_pioneer_relay(key=KEY, listen=False, pool=1) as relay, a_tunnel(relay, dial=dial) as tunnel:
        await tunnel.wait_connected()
        await trio.sleep(60)
        assert tunnel.status.state is State.CONNECTED
    assert 9 < dialled[-1] - dialled[0] <= 10
    assert 8 < len(dialled) < 20


@every_way
async def test_a_visitor_that_nobody_has_room_for_is_reset(delivered: list[TunnelStream]) -> None:
    async with connected(backlog=1) as (relay, tunnel), await relay.visit() as first:
        await first.send_all(b"1")
        await eventually(lambda: delivered)
        async with await relay.visit() as second:
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(second)
        async with await tunnel.accept() as stream:
            assert await read_exactly(stream, 1) == b"1"


@every_way
async def test_a_place_is_free_again_when_a_visitor_leaves_before_it_was_accepted(few_idle: int) -> None:
    async with connected(backlog=few_idle) as (relay, tunnel):

        async def turn_away() -> None:
            while True:
                (await tunnel.accept()).reset()

        for number in range(1, 4):
            visitors = [await relay.visit() for _ in range(few_idle)]
            await eventually(lambda number=number: relay.asked_for >= 8 + number * few_idle)  # type: ignore[misc]
            for visitor in visitors:
                await abandon(visitor)
            async with in_background(turn_away):
                await eventually(lambda: relay.data_channels == relay.asked_for)
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])), await relay.visit() as visitor:
            with no_hang():
                assert await ask(visitor, b"x") == b"x"


async def test_a_place_is_made_free_once(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = 0
    free_slot = data_channels.DataChannels._free_slot

    def count(self: Any) -> None:
        nonlocal freed
        freed += 1
        free_slot(self)

    monkeypatch.setattr(data_channels.DataChannels, "_free_slot", count)
    async with connected() as (relay, tunnel), await relay.visit() as visitor:
        await visitor.send_all(b"x")
        stream = await tunnel.accept()
        stream.acknowledge()
        stream.reset()
        stream.acknowledge()
        assert freed == 1


@every_way
async def test_a_visitor_who_left_while_it_waited_is_not_accepted(delivered: list[TunnelStream]) -> None:
    async with connected() as (relay, tunnel):
        gone = await relay.visit()
        await gone.send_all(b"gone")
        await eventually(lambda: delivered)
        await abandon(gone)
        await eventually(lambda: not delivered[0].usable)
        async with await relay.visit() as here:
            await here.send_all(b"here")
            with no_hang():
                async with await tunnel.accept() as stream:
                    assert await read_exactly(stream, 4) == b"here"
