"""A relay with more gateways than it takes per second: whom it turns away, and how it tells them to come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given, strategies as st
from raw_gateways import ADDRESS, raw_gateway
from rig import AT_ONCE, KEY, RelayRig, no_hang, relay_rig, tunnel_entry

from pioneer_tunnel._model.errors import RelayConnectError, RemoteProtocolError
from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel._model.status import State
from pioneer_tunnel._wire.handshake import Welcome
from pioneer_tunnel._wire.messages import LONGEST_WAIT, SPREAD, Message, Spread, parse_notice, spread_text
from pioneer_tunnel.relay.gateways import endpoint, spreading
from pioneer_tunnel.relay.gateways.spreading import Spreading
from pioneer_tunnel.transports.interface import Event, Session, SpreadTold, Target
from pioneer_tunnel.transports.native import NativeTransport, take_spread
from pioneer_tunnel.websocket import ENGINES, EngineName, WebSocket

CHOICE: Final[dict[str, Any]] = {SPREAD: lambda _: {}}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


async def text_from(websocket: WebSocket) -> str:
    while True:
        for message in await websocket.receive():
            if isinstance(message, str):
                return message


# The value


@given(span=st.floats(0, LONGEST_WAIT), longest=st.floats(0, LONGEST_WAIT))
def test_what_a_relay_asks_arrives(span: float, longest: float) -> None:
    read = parse_notice(spread_text(Spread(span=span, longest=longest)))
    assert isinstance(read, Spread)
    assert read.span == pytest.approx(span, abs=0.001)
    assert read.longest == pytest.approx(longest, abs=0.001)


VECTORS: Final[list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "native-spread.json").read_text()
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors(vector: dict[str, Any]) -> None:
    if "refused" in vector:
        with pytest.raises(RemoteProtocolError, match=vector["refused"]):
            parse_notice(vector["text"])
    else:
        assert parse_notice(vector["text"]) == Spread(span=vector["span"], longest=vector["longest"])


def test_a_welcome_with_malformed_advice_is_no_welcome() -> None:
    reported: list[Event] = []
    told = Message(SPREAD, {"span_ms": 1})
    welcome = Welcome(session="s", public_url="u", heartbeat=15, extensions={SPREAD: told})
    with pytest.raises(RelayConnectError, match="'longest_ms' is missing"):
        take_spread(welcome, reported.append)
    assert reported == []


@given(rate=st.floats(0.1, 10_000), before=st.integers(0, 100_000), now=st.integers(0, 100_000))
def test_advice_is_outdated_when_it_has_doubled_or_halved(rate: float, before: int, now: int) -> None:
    spreading = Spreading(rate)
    told, advice = spreading.advice(before), spreading.advice(now)
    assert advice.span == advice.longest == min(now / rate, LONGEST_WAIT)
    outdated = Spreading.is_outdated(told, advice)
    assert outdated == Spreading.is_outdated(advice, told)
    if outdated:
        assert abs(told.span - advice.span) >= 1
        assert max(told.span, advice.span) >= 2 * min(told.span, advice.span)


def test_without_a_limit_there_is_no_advice() -> None:
    assert Spreading(0).offer == {}
    assert Spreading(0).advice(1000) == Spread(span=0, longest=0)


# At the relay


@asynccontextmanager
async def busy_rig(rate: int, *, engine: EngineName | None = None) -> AsyncIterator[RelayRig]:
    """A relay that takes so many handshakes per second."""
    limits = {"handshakes_per_second": rate, "connects_per_second_per_address": 0}
    async with relay_rig(engine, limits=limits) as rig:
        yield rig


async def test_who_comes_too_often_is_asked_to_come_later_and_then_connects(engine: EngineName) -> None:
    async with busy_rig(1, engine=engine) as rig:
        async with raw_gateway(rig):
            pass  # it has taken the handshake of this second
        async with rig.tunnel(restart=AT_ONCE) as tunnel:
            started = trio.current_time()
            await tunnel.wait_connected()
            assert trio.current_time() - started > 0.1
            [refused] = {status.message for status in tunnel.history if status.state is State.FAILED}
            assert refused == "the relay is busy: 'more than 1 gateways per second want to connect'"


async def test_a_gateway_is_turned_away_before_it_has_proved_anything(engine: EngineName) -> None:
    """Gateways of the last release know `rejected` in place of the challenge, and heed its `retry_after_ms`."""
    async with busy_rig(1, engine=engine) as rig:
        async with raw_gateway(rig):
            pass
        with pytest.raises(RelayConnectError, match="busy") as refusal:
            async with raw_gateway(rig):
                pass
    assert refusal.value.retry_after is not None
    assert 0.5 < refusal.value.retry_after <= 1.0


async def test_a_wrong_proof_takes_no_turn_of_others() -> None:
    async with busy_rig(1) as rig:
        for _ in range(5):
            with pytest.raises(Exception, match="rejected the key"):
                async with raw_gateway(rig, new_relay_key()):
                    pass
        async with raw_gateway(rig):
            pass


async def test_the_welcome_and_later_texts_tell_gateways_how_to_come_back(
    engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "TELL_INTERVAL", 0.01)
    keys = [new_relay_key() for _ in range(4)]
    entries = [
        tunnel_entry(id=f"t{number}", url=f"http://t{number}.test", key=str(key.identity().public_key))
        for number, key in enumerate(keys)
    ]
    limits = {"handshakes_per_second": 4, "connects_per_second_per_address": 0}
    async with relay_rig(engine, tunnels=entries, limits=limits) as rig, AsyncExitStack() as gateways:
        monkeypatch.setattr(spreading, "LEAST_CHANGE", 0.1)
        first, _ = await gateways.enter_async_context(raw_gateway(rig, keys[0], choices=CHOICE))
        await gateways.enter_async_context(raw_gateway(rig, keys[1], choices=CHOICE))
        with no_hang():
            assert parse_notice(await text_from(first)) == Spread(span=0.5, longest=0.5)
        for key in keys[2:]:
            await gateways.enter_async_context(raw_gateway(rig, key, choices=CHOICE))
        with no_hang():
            assert parse_notice(await text_from(first)) == Spread(span=1.0, longest=1.0)


async def test_a_gateway_takes_what_the_welcome_says(engine: EngineName) -> None:
    events: list[Event] = []
    async with busy_rig(4, engine=engine) as rig, trio.open_nursery() as nursery:
        target = Target(address=ADDRESS, key=KEY, dial=rig.dial)

        async def serve(*, task_status: trio.TaskStatus[Session]) -> None:
            transport = NativeTransport(engine=engine)
            await transport(target, lambda _: None, events.append, task_status=task_status)

        await nursery.start(serve)
        nursery.cancel_scope.cancel()
    assert SpreadTold(Spread(span=0.25, longest=0.25)) in events


async def test_who_does_not_know_the_extension_is_told_nothing() -> None:
    async with busy_rig(1) as rig, raw_gateway(rig) as (websocket, _):
        with trio.move_on_after(0.2) as waiting:
            await text_from(websocket)
        assert waiting.cancelled_caught


async def test_a_relay_without_a_limit_offers_nothing() -> None:
    offered: list[Message] = []

    def choose(offer: Message) -> dict[str, Any]:
        offered.append(offer)
        return {}

    async with busy_rig(0) as rig, raw_gateway(rig, choices={SPREAD: choose}):
        assert offered == []
    async with busy_rig(1) as rig, raw_gateway(rig, choices={SPREAD: choose}):
        assert [offer.fields for offer in offered] == [{}]
