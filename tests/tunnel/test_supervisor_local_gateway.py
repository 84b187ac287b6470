"""What the restart loop finds out about the local gateway, and says of it."""

from __future__ import annotations

import trio
import trio.testing
from supervised import EPOCH, LocalGateway, supervised
from trio.testing import MockClock

from pioneer_tunnel._model.errors import LocalGatewayError
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall
from pioneer_tunnel.transports.interface import LocalDialFailed, LocalDialOk


async def test_the_tunnel_comes_up_without_a_local_gateway_and_says_that_it_is_missing(
    autojump_clock: MockClock,
) -> None:
    local, transport = LocalGateway(there=False), ScriptedTransport([Connect(after=1, public_url="https://o.test")])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(0.5)
        assert local.probes == []
        await trio.sleep(13)
        assert generation.said == ["starting", "connected", "connected/local_gateway_unavailable"]
        assert generation.status.message == "nothing listens at 127.0.0.1:17878"
        assert generation.status.public_url == "https://o.test"
        assert generation.status.retry_at_unix is None
        assert local.probes == [1, 6, 11]
        local.there = True
        await trio.sleep(100)
        assert generation.said[2:] == ["connected/local_gateway_unavailable", "connected"]
        assert local.probes == [1, 6, 11, 16]
    assert len(transport.attempts) == 1


async def test_the_local_gateway_is_probed_each_time_the_tunnel_comes_up(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(), ScriptedTransport([Fail(), Connect(60), Fail(), Connect(60)])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(20)
        assert len(local.probes) == 1
        assert generation.said[-1] == "connected"
        local.there = False
        await trio.sleep(50)
        assert generation.said[-2:] == ["connected", "connected/local_gateway_unavailable"]
    assert len(transport.attempts) == 4


async def test_a_tunnel_that_is_lost_while_the_local_gateway_is_missing_reconnects(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(there=False), ScriptedTransport([Connect(7), Connect(7)])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(100)
    local_down = "connected/local_gateway_unavailable"
    lost = ["reconnecting/relay_connect_failed", "connected", local_down]
    assert generation.said == ["starting", "connected", local_down, *lost, *lost]


async def test_a_probe_that_is_slow_ends_with_the_link(autojump_clock: MockClock) -> None:
    async def probe() -> None:
        await trio.sleep(9)
        raise LocalGatewayError("late")

    async with supervised(ScriptedTransport([Connect(5), Stall()]), probe=probe) as generation:
        await trio.sleep(100)
    assert generation.said[:3] == ["starting", "connected", "reconnecting/relay_connect_failed"]
    assert "connected/local_gateway_unavailable" not in generation.said


async def test_three_local_dials_in_a_row_say_so_and_the_gateway_is_probed_until_it_is_back(
    autojump_clock: MockClock,
) -> None:
    local, transport = LocalGateway(), ScriptedTransport()
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(5)
        transport.report(LocalDialOk())
        await trio.sleep(5)
        local.there = False
        transport.report(LocalDialFailed("connection refused"))
        transport.report(LocalDialFailed("connection refused"))
        assert generation.said[-1] == "connected"
        transport.report(LocalDialFailed("connection refused"))
        assert generation.status == Status(
            state=State.CONNECTED,
            error_kind=ErrorKind.LOCAL_GATEWAY_UNAVAILABLE,
            message="connection refused",
            attempt=1,
            updated_at_unix=int(EPOCH + 10),
        )
        await trio.sleep(14)
        local.there = True
        await trio.sleep(0.5)
        assert generation.said[-1] == "connected/local_gateway_unavailable"
        await trio.sleep(1)
        assert generation.status == Status(state=State.CONNECTED, attempt=1, updated_at_unix=int(EPOCH + 25))
        await trio.sleep(100)
        assert local.probes == [0, 15, 20, 25]
    assert len(transport.attempts) == 1


async def test_a_local_dial_that_works_starts_the_count_anew(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport()
    async with supervised(transport) as generation:
        await trio.sleep(1)
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
            transport.report(LocalDialFailed("no"))
            transport.report(LocalDialOk())
        assert generation.said == ["starting", "connected"]
        transport.report(LocalDialFailed("no"))
        transport.report(LocalDialFailed("no"))
        assert generation.said == ["starting", "connected"]
        transport.report(LocalDialFailed("no"))
        assert generation.said == ["starting", "connected", "connected/local_gateway_unavailable"]


async def test_a_visitor_that_gets_through_clears_it_too_and_spares_the_probe(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(), ScriptedTransport()
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(1)
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
        await trio.sleep(2)
        transport.report(LocalDialOk())
        assert generation.said[-1] == "connected"
        await trio.sleep(100)
        assert local.probes == [0]
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
        assert generation.said[-1] == "connected/local_gateway_unavailable"
        await trio.sleep(6)
        assert generation.said[-1] == "connected"
        assert local.probes == [0, 108]


async def test_the_count_of_local_dials_ends_with_the_link(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(10)])
    async with supervised(transport) as generation:
        await trio.sleep(5)
        transport.report(LocalDialFailed("no"))
        transport.report(LocalDialFailed("no"))
        await trio.sleep(20)
        transport.report(LocalDialFailed("no"))
        assert generation.said[-1] == "connected"
