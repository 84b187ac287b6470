"""Two gateways and one tunnel: who has it, what the other one learns, and dead sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from hypothesis import assume, given, strategies as st
from memory_relay import EPOCH, MemoryRelay, until_cancelled
from raw_gateways import raw_gateway
from rig import (
    KEY,
    RELAY_NAME,
    ask,
    echo,
    eventually,
    in_background,
    no_hang,
    open_sockets,
    read_all,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
    until_it_raises,
    upload,
)

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import ReplacedError
from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.handshake import SUBPROTOCOL, GatewayHandshake, Welcome
from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel._wire.messages import instance_shown
from pioneer_tunnel.relay.gateways.registry import MOST_CANDIDATES, LiveSession, LocalDirectory, TunnelTaken
from pioneer_tunnel.relay.gateways.takeover import (
    ANSWER_TIMEOUT,
    GHOST_TIMEOUT,
    Takeover,
    TakeoverRules,
    Verdict,
    answer_timeout,
    other_link,
)
from pioneer_tunnel.testing import StatusContract
from pioneer_tunnel.websocket import EngineName, Opening, load_engine
from pioneer_tunnel.yamux import YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.frames import ACK, SYN, FrameType, encode_header

OLD, NEW, STRANGE = "the old key", "the new key", "a key that is not in the list"
KEYS: Final = (OLD, NEW)

# The decision


@attrs.frozen
class Somebody:
    """A `Party`."""

    instance: str
    key_id: str = OLD
    place: LinkPlace | None = None


@pytest.mark.parametrize(
    ("takeover", "holder", "newcomer", "verdict"),
    [
        (Takeover.NEWEST, Somebody("a"), Somebody("a"), Verdict.REPLACE),
        (Takeover.NEWEST, Somebody("a"), Somebody("b"), Verdict.REPLACE),
        (Takeover.NEWEST, Somebody(""), Somebody(""), Verdict.REPLACE),
        (Takeover.FIRST, Somebody("a"), Somebody("a"), Verdict.REPLACE),
        (Takeover.FIRST, Somebody("a"), Somebody("b"), Verdict.ASK),
        (Takeover.FIRST, Somebody("a"), Somebody(""), Verdict.ASK),
        (Takeover.FIRST, Somebody(""), Somebody("b"), Verdict.ASK),
        (Takeover.FIRST, Somebody(""), Somebody(""), Verdict.ASK),
        *[
            (takeover, Somebody(one, holders), Somebody(other, newcomers), verdict)
            for takeover in Takeover
            for one, other in (("a", "a"), ("a", "b"), ("", ""), ("a", ""))
            for holders, newcomers, verdict in (
                (OLD, NEW, Verdict.RETIRE),
                (NEW, OLD, Verdict.ASK),
                (STRANGE, OLD, Verdict.RETIRE),
                (NEW, STRANGE, Verdict.ASK),
            )
        ],
    ],
)
def test_who_has_a_tunnel(takeover: Takeover, holder: Somebody, newcomer: Somebody, verdict: Verdict) -> None:
    assert TakeoverRules(takeover=takeover, keys=KEYS).verdict(holder=holder, newcomer=newcomer) is verdict


@pytest.mark.parametrize("takeover", Takeover)
@pytest.mark.parametrize(
    ("holder", "newcomer", "beside"),
    [
        (Somebody("a", place=LinkPlace(0, 2)), Somebody("a", place=LinkPlace(1, 2)), True),
        (Somebody("a", place=LinkPlace(1, 2)), Somebody("a", place=LinkPlace(1, 2)), False),
        (Somebody("a", place=LinkPlace(2, 3)), Somebody("a", place=LinkPlace(1, 2)), False),
        (Somebody("a", place=LinkPlace(0, 2)), Somebody("a"), False),
        (Somebody("a"), Somebody("a", place=LinkPlace(1, 2)), False),
    ],
)
def test_the_links_of_a_gateway_stand_side_by_side(
    takeover: Takeover, holder: Somebody, newcomer: Somebody, beside: bool
) -> None:
    verdict = TakeoverRules(takeover=takeover, keys=KEYS).verdict(holder=holder, newcomer=newcomer)
    assert verdict is (Verdict.BESIDE if beside else Verdict.REPLACE)


def test_the_links_of_two_gateways_do_not() -> None:
    one, other = Somebody("a", place=LinkPlace(0, 2)), Somebody("b", place=LinkPlace(1, 2))
    assert TakeoverRules(keys=KEYS).verdict(holder=one, newcomer=other) is Verdict.REPLACE
    assert TakeoverRules(takeover=Takeover.FIRST).verdict(holder=one, newcomer=other) is Verdict.ASK
    nameless = [attrs.evolve(each, instance="") for each in (one, other)]
    assert TakeoverRules(keys=KEYS).verdict(holder=nameless[0], newcomer=nameless[1]) is Verdict.REPLACE


somebody = st.builds(Somebody, st.sampled_from(["", "a", "b"]), st.sampled_from([*KEYS, STRANGE]))


@given(one=somebody, other=somebody, first=st.booleans())
def test_two_that_come_again_and_again_do_not_take_it_from_each_other_in_turn(
    one: Somebody, other: Somebody, first: bool
) -> None:
    """If each of two gateways replaces the other at once, one was told to stop, or they are the same gateway."""
    rules = TakeoverRules(takeover=Takeover.FIRST if first else Takeover.NEWEST, keys=KEYS)
    there = rules.verdict(holder=one, newcomer=other)
    back = rules.verdict(holder=other, newcomer=one)
    assume(not one.instance == other.instance != "")
    if first or one.key_id != other.key_id:
        assert Verdict.ASK in {there, back}
    else:
        assert there is back is Verdict.REPLACE


def test_ones_own_ghost_has_less_time_to_answer() -> None:
    assert answer_timeout("a", "a") == GHOST_TIMEOUT < 1
    assert answer_timeout("a", "b") == answer_timeout("", "") == ANSWER_TIMEOUT


def test_an_instance_is_shown_cleaned_and_short() -> None:
    assert instance_shown("host-a") == "instance 'host-a'"
    assert len(instance_shown("x" * 1024)) < 80
    assert "\n" not in instance_shown("a\nERROR forged\x1b[2J")
    assert "without name" in instance_shown("")


# The links of a gateway, in the directory


@attrs.define(eq=False)
class LinkSession(LiveSession):
    """A session of one link. `orders` are those that it got."""

    instance: str
    key_id: str
    place: LinkPlace | None
    id: str = ""
    sound: bool = True
    draining: bool = False
    burden: tuple[int, float] = (0, 0.0)
    since: float = 0.0
    orders: list[str] = attrs.field(factory=list)

    async def open_stream(self) -> ByteStream:
        raise trio.BrokenResourceError("it has no streams")

    async def answers(self, within: float) -> bool:
        return self.sound

    def replace(self, by: str) -> None:
        self.orders.append(f"replaced by {by}")

    def retire(self, by: str) -> None:
        self.orders.append(f"retired by {by}")

    def abandon(self) -> None:
        self.orders.append("abandoned")


places = st.none() | st.integers(2, 3).flatmap(lambda of: st.builds(LinkPlace, st.integers(0, of - 1), st.just(of)))
link_sessions = st.builds(
    LinkSession,
    st.sampled_from(["a", "b"]),
    st.sampled_from(KEYS),
    places,
    sound=st.booleans(),
    draining=st.booleans(),
    burden=st.tuples(st.integers(0, 3), st.sampled_from([0.01, 0.2])),
)


@given(came=st.lists(link_sessions, max_size=8), leaving=st.sets(st.integers(0, 7)), first=st.booleans())
def test_visitors_go_to_a_link_that_lives(came: list[LinkSession], leaving: set[int], first: bool) -> None:
    rules = TakeoverRules(takeover=Takeover.FIRST if first else Takeover.NEWEST, keys=KEYS)

    async def tell() -> None:
        directory = LocalDirectory()
        has_it: list[LinkSession] = []
        for number, session in enumerate(came):
            try:
                await directory.enter("office", session, rules=rules)
            except TunnelTaken:
                await directory.leave("office", session)
                assert has_it
                continue
            has_it = [other for other in has_it if not other.orders and other_link(other, session)] + [session]
            # Whoever has lost the tunnel was told, or drains and ends by itself.
            assert not session.orders
            if number in leaving:
                await directory.leave("office", session)
                has_it.remove(session)
            holders = [holder for holder in has_it if not holder.orders]
            found = await directory.find("office")
            assert found in holders if holders else found is None
            if found is not None:
                assert found.sound or not any(holder.sound for holder in holders)
                alike = [each for each in holders if (each.sound, each.draining) == (found.sound, found.draining)]
                assert found.burden == min(each.burden for each in alike)
            assert len({holder.instance for holder in holders}) <= 1
            assert len({holder.place for holder in holders}) == len(holders)

    trio.run(tell)


# Two hosts with one key


@asynccontextmanager
async def memory_relay(**entry: Any) -> AsyncIterator[MemoryRelay]:
    async with trio.open_nursery() as nursery:
        yield MemoryRelay(nursery, **entry)
        nursery.cancel_scope.cancel()


def judge(statuses: tuple[Status, ...]) -> None:
    contract = StatusContract()
    for status in statuses:
        contract.see(status)


async def test_the_first_one_keeps_its_tunnel_over_many_tries(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as first:
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
            judge(first.history)
            waiting = second.status
            assert (waiting.state, waiting.error_kind) == (State.FAILED, ErrorKind.RELAY_CONNECT_FAILED)
            assert "instance 'host-a' has this tunnel, since 2023-11-14 22:13:20 UTC" in (waiting.message or "")
            assert len(waiting.message or "") <= 300
            assert {status.message for status in second.history if status.message} == {waiting.message}
            judge(second.history)


async def test_it_waits_as_long_as_it_was_told(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as first:
        await first.wait_connected()
        async with relay.tunnel("host-b") as second:
            while second.status.retry_at_unix is None:
                await trio.sleep(0.1)
            assert second.status.retry_at_unix >= EPOCH + 5, "and not after the second that its own policy has"


async def test_when_the_first_one_leaves_the_second_has_it(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(takeover="first") as relay, trio.open_nursery() as nursery:
        first, leaving = await nursery.start(until_cancelled, relay.tunnel("host-a"))
        await first.wait_connected()
        async with relay.tunnel("host-b") as second:
            await trio.sleep(60)
            assert second.status.state is State.FAILED
            leaving.cancel()
            with trio.fail_after(40):
                await second.wait_connected()
            judge(second.history)


async def test_one_that_was_up_and_comes_back_too_late_says_reconnecting(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as first:
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
            judge(first.history)


async def test_the_newest_one_has_it_and_the_other_stops(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay() as relay, relay.tunnel("host-a") as first:
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
            judge(first.history)


async def test_two_without_an_instance_do_not_fight_either(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay() as relay, relay.tunnel("") as first:
        await first.wait_connected()
        async with relay.tunnel("") as second:
            await second.wait_connected()
            await trio.sleep(3600)
            assert (first.status.state, first.status.error_kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
            assert len(relay.cables) == 2


# Holders that are not there any more


async def test_a_dead_holder_does_not_lock_the_tunnel(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as first:
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
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as first:
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
    async with memory_relay(takeover="first") as relay, relay.tunnel("") as first:
        await first.wait_connected()
        async with relay.tunnel("") as second:
            await trio.sleep(1)
            assert "an instance without name has this tunnel" in (second.status.message or "")
            relay.cables[0].pull()
            with trio.fail_after(30):
                await second.wait_connected()


# A gateway that comes back


@pytest.mark.parametrize("room", [0.0, 100.0, float("inf")], ids=["stuck", "stuck soon", "swallowed"])
@pytest.mark.parametrize("takeover", [*Takeover])
async def test_a_ghost_is_gone_within_a_second(
    autojump_clock: trio.testing.MockClock, takeover: Takeover, room: float
) -> None:
    """Whether the socket still takes data."""
    async with memory_relay(takeover=takeover) as relay, relay.tunnel("host-a") as ghost:
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
    async with memory_relay(takeover="first") as relay, relay.tunnel("host-a") as tunnel:
        await tunnel.wait_connected()
        for cable in range(3):
            relay.cables[cable].end.inbound.break_()
            await trio.sleep(5)
            assert tunnel.status.state is State.CONNECTED
        judge(tunnel.history)


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


# Gateways that do not accept the relay


def of_another_relay() -> PublicKey:
    return SigningIdentity.generate().public_key


@pytest.mark.parametrize("instance", ["host-a", "host-b"], ids=["its own instance", "another"])
@pytest.mark.parametrize("takeover", [*Takeover])
async def test_a_gateway_that_rejects_the_relay_replaces_nobody(
    autojump_clock: trio.testing.MockClock, takeover: Takeover, instance: str, engine: EngineName
) -> None:
    """It pins another identity, closes after the welcome, and retries."""
    async with memory_relay(takeover=takeover, engine=engine) as relay, relay.tunnel("host-a") as holder:
        await holder.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(upload())
        stream = await holder.accept()
        await read_exactly(stream, len(upload()))
        pinned = relay.tunnel(instance, relay_identity=of_another_relay(), websocket_engine=engine)
        async with pinned as rejecting:
            for _ in range(5):
                await trio.sleep(60)
                await visitor.send_all(b"still here")
                with trio.fail_after(5):
                    assert await read_exactly(stream, 10) == b"still here"
            assert len(relay.cables) > 5, "it tries on"
            assert {status.state for status in rejecting.history} == {State.STARTING, State.FAILED}
        assert {status.state for status in holder.history} == {State.STARTING, State.CONNECTED}


async def test_one_with_a_newer_key_does_not_retire_the_holder_either(
    autojump_clock: trio.testing.MockClock,
) -> None:
    newer = RelayKey("ptk1_a-newer-key-of-the-tests-0123456789")
    keys = [str(key.identity().public_key) for key in (KEY, newer)]
    async with memory_relay(key=None, keys=keys) as relay, relay.tunnel("host-a") as holder:
        await holder.wait_connected()
        async with relay.tunnel("host-b", key=newer, relay_identity=of_another_relay()):
            await trio.sleep(60)
        visitor = await relay.visit()
        await visitor.send_all(request())
        with trio.fail_after(5):
            await holder.accept()
        assert {status.state for status in holder.history} == {State.STARTING, State.CONNECTED}


async def test_the_silent_ones_are_few(engine: EngineName) -> None:
    """Many gateways with the key that send nothing after the welcome do not disturb the tunnel."""
    more, dropped = 4, 0
    async with relay_rig(engine) as rig, rig.tunnel(instance="host-a") as tunnel:
        await tunnel.wait_connected()

        async def be_silent(*, task_status: trio.TaskStatus[None]) -> None:
            nonlocal dropped
            async with raw_gateway(rig, instance="silent", accepting=False) as (websocket, _):
                task_status.started()
                with pytest.raises(trio.BrokenResourceError):
                    await until_it_raises(websocket.receive)
                dropped += 1

        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])), trio.open_nursery() as silent:
            for _ in range(MOST_CANDIDATES + more):
                await silent.start(be_silent)
                async with await rig.visit() as visitor:
                    assert await ask(visitor, request()) == request()
            await eventually(lambda: dropped >= more)
            silent.cancel_scope.cancel()
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_the_silent_ones_are_soon_gone(autojump_clock: trio.testing.MockClock, engine: EngineName) -> None:
    async with memory_relay(engine=engine) as relay, relay.tunnel("host-a", websocket_engine=engine) as tunnel:
        await tunnel.wait_connected()
        started = trio.current_time()
        opening = GatewayHandshake(KEY.identity(), audience=RELAY_NAME, service="any", instance="silent")
        wanted = Opening(subprotocol=SUBPROTOCOL, address=RelayAddress.parse(f"ws://{RELAY_NAME}"))
        async with load_engine(engine).connect(await relay.dial(RELAY_NAME, 80), wanted) as websocket:
            answer: object = None
            while not isinstance(answer, Welcome):
                for text in await websocket.receive():
                    if isinstance(text, str):
                        answer = opening.receive(text)
                        if isinstance(answer, str):
                            await websocket.send([answer])
            with pytest.raises(trio.BrokenResourceError):
                await until_it_raises(websocket.receive)
        assert 10 <= trio.current_time() - started <= 12
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_a_gateway_that_only_answers_is_counted(engine: EngineName) -> None:
    """It sends nothing of its own before its heartbeat, but the relay pings at once."""
    async with relay_rig(engine) as rig, rig.tunnel(instance="host-a") as first:
        await first.wait_connected()
        async with raw_gateway(rig, instance="host-b", accepting=False) as (websocket, early):
            received = early
            with no_hang():
                while len(received) < 12:
                    for message in await websocket.receive():
                        assert not isinstance(message, str)
                        received += message
            assert received[:4] == encode_header(FrameType.PING, SYN, 0, 0)[:4]
            assert first.status.state is State.CONNECTED
            await websocket.send([encode_header(FrameType.PING, ACK, 0, int.from_bytes(received[8:12], "big"))])
            with no_hang(), pytest.raises(ReplacedError, match="'host-b'"):
                await first.accept()


async def test_a_session_that_counts_too_late_does_not_replace_a_newer_one() -> None:
    """A gateway came back, and then the first byte of its earlier connection arrives."""
    directory = LocalDirectory()
    early, late = Passive("host-a"), Passive("host-a")
    await directory.admit("office", early)
    await directory.admit("office", late)
    await directory.enter("office", late)
    assert early.orders == ["replace"]
    assert late.orders == []


async def test_one_that_is_replaced_while_it_waits_gets_nothing() -> None:
    """It pings the holder, which does not answer; meanwhile the holder's gateway has reconnected."""
    directory = LocalDirectory()
    first = TakeoverRules(takeover=Takeover.FIRST)
    early, late = Passive("host-b"), Passive("host-b")

    class Holder(Passive):
        async def answers(self, within: float) -> bool:
            if not self.orders:
                self.orders.append("asked")
                await directory.leave("office", self)
                await directory.enter("office", late, rules=first)
            return False

    holder = Holder("host-a")
    await directory.enter("office", holder)
    await directory.admit("office", early)
    await directory.admit("office", late)
    with pytest.raises(TunnelTaken):
        await directory.enter("office", early, rules=first)
    assert early.orders == ["replace"]
    assert await directory.find("office") is late


async def test_there_are_only_so_many_candidates() -> None:
    directory = LocalDirectory()
    candidates = [Passive(f"host-{number}") for number in range(MOST_CANDIDATES + 2)]
    for candidate in candidates:
        await directory.admit("office", candidate)
    assert [candidate.orders for candidate in candidates] == [["abandon"]] * 2 + [[]] * MOST_CANDIDATES
    for candidate in candidates:
        await directory.leave("office", candidate)
    assert not directory._candidates, "nothing is kept"


class Passive(LiveSession):
    """A session that records its orders."""

    id = ""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self.orders: list[str] = []

    @property
    def instance(self) -> str:
        return self._instance

    @property
    def key_id(self) -> str:
        return OLD

    @property
    def since(self) -> float:
        return 0.0

    async def open_stream(self) -> ByteStream:
        raise trio.BrokenResourceError

    async def answers(self, within: float) -> bool:
        return True

    def replace(self, by: str) -> None:
        self.orders.append("replace")

    def retire(self, by: str) -> None:
        self.orders.append("retire")

    def abandon(self) -> None:
        self.orders.append("abandon")


# The directory


async def test_a_holder_that_leaves_while_it_is_asked_leaves_the_tunnel_to_the_newcomer() -> None:
    directory = LocalDirectory()

    class Holder(Somebody):
        since = 0.0

        async def answers(self, within: float) -> bool:
            await directory.leave("office", self)  # type: ignore[arg-type]
            return False

        def abandon(self) -> None:
            pass

    newcomer: Any = Somebody("b")
    await directory.enter("office", Holder("a"))  # type: ignore[arg-type]
    await directory.enter("office", newcomer, rules=TakeoverRules(takeover=Takeover.FIRST))
    assert await directory.find("office") is newcomer


async def test_the_one_that_has_it_is_named() -> None:
    directory = LocalDirectory()

    class Holder(Somebody):
        since = 1_700_000_000.0

        async def answers(self, within: float) -> bool:
            return True

    holder: Any = Holder("host-a")
    await directory.enter("office", holder)
    with pytest.raises(TunnelTaken, match=r"'host-a'.*2023-11-14 22:13:20 UTC"):
        await directory.enter("office", Somebody("b"), rules=TakeoverRules(takeover=Takeover.FIRST))  # type: ignore[arg-type]
    assert await directory.find("office") is holder
