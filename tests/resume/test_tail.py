"""`resume.tail`: both counters, the tail, and a model of both ends over pairs of connections that are cut anywhere."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import pytest
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._wire.resumption import Counters
from pioneer_tunnel.resume import DEFAULT_WINDOW, Tail
from pioneer_tunnel.resume.tail import LEAST_WINDOW


def test_what_is_acknowledged_is_forgotten() -> None:
    tail = Tail()
    tail.keep([b"abc", b"defg"])
    assert tail.acknowledge(4)
    assert tail.held == 3
    assert tail.resume(Counters(0, 4)) == [b"efg"]
    assert tail.resume(Counters(0, 5)) == [b"fg"]
    assert tail.acknowledge(7)
    assert tail.resume(Counters(0, 7)) == []


def test_a_late_report_changes_nothing() -> None:
    tail = Tail()
    tail.keep([b"abcdef"])
    assert tail.acknowledge(5)
    assert not tail.acknowledge(3)
    assert tail.held == 1


def test_nobody_reports_more_than_was_sent() -> None:
    tail = Tail()
    tail.keep([b"abc"])
    with pytest.raises(RemoteProtocolError, match="reports 4 received bytes, and 3 were sent"):
        tail.acknowledge(4)


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (Counters(9, 1), "send again from 2 to 6"),
        (Counters(9, 7), "send again from 2 to 6"),
        (Counters(3, 4), "4 have come"),
    ],
)
def test_counters_that_do_not_fit_are_refused(peer: Counters, why: str) -> None:
    tail = Tail()
    tail.keep([b"abcdef"])
    tail.acknowledge(2)
    tail.receive([b"1234"])
    with pytest.raises(RemoteProtocolError, match=why):
        tail.resume(peer)
    assert (tail.held, tail.counters) == (4, Counters(6, 4))


def test_a_full_tail_stops_the_sender() -> None:
    tail = Tail(window=LEAST_WINDOW)
    tail.keep([bytes(LEAST_WINDOW - 1)])
    assert not tail.is_full()
    tail.keep([b"x"])
    assert tail.is_full()
    tail.acknowledge(1)
    assert not tail.is_full()


def test_while_memory_is_short_the_tail_is_small() -> None:
    tail = Tail()
    tail.keep([bytes(LEAST_WINDOW)])
    assert tail.is_full(short=True)
    assert not tail.is_full()


@given(st.integers(0, 64 * 1024 * 1024))
def test_a_report_is_due_before_the_peer_has_to_wait(window: int) -> None:
    tail, peer = Tail(peer_window=window), Tail(window=window)
    owed = 0
    while owed < tail.report_every:
        assert not peer.is_full()
        peer.keep([bytes(16 * 1024)])
        owed = tail.receive([bytes(16 * 1024)])


def test_the_tail_holds_references() -> None:
    chunk = bytes(100_000)
    tail = Tail()
    tail.keep([chunk])
    [again] = tail.resume(Counters(0, 0))
    assert again is chunk
    assert DEFAULT_WINDOW > LEAST_WINDOW


# The model


class Wire:
    """One direction of a connection: what was sent and has not arrived, bytes and reports in order."""

    def __init__(self) -> None:
        self.way: deque[bytes | int] = deque()


class End:
    def __init__(self, seed: int) -> None:
        self.tail: Final = Tail()
        self.seed: Final = seed
        self.got: Final = bytearray()
        self.made = 0
        self.out: Wire | None = None  # of the carrier that it uses
        self.comes: Wire | None = None

    def make(self, amount: int) -> bytes:
        data = stream(self.seed, self.made, amount)
        self.made += amount
        return data


def stream(seed: int, start: int, amount: int) -> bytes:
    return bytes((position * 7 + position // 251 + seed) & 255 for position in range(start, start + amount))


class TwoEnds(RuleBasedStateMachine):
    """A gateway and a relay. Each connection is a pair of wires, which either end may lose at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.gateway, self.relay = End(1), End(2)
        self._connect(self.gateway, self.relay)
        self._asked: Counters | None = None  # the gateway's counters, on their way to the relay
        self._answer: tuple[Counters, Wire, Wire] | None = None  # the relay's, on their way back, and the new wires

    @staticmethod
    def _connect(one: End, other: End) -> tuple[Wire, Wire]:
        there, back = Wire(), Wire()
        one.out = other.comes = there
        other.out = one.comes = back
        return there, back

    ends = st.sampled_from(["gateway", "relay"])

    @rule(end=ends, amounts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
    def send(self, end: str, amounts: list[int]) -> None:
        one: End = getattr(self, end)
        if one.out is None:
            return  # what yamux has to send waits
        chunks = [one.make(amount) for amount in amounts]
        one.tail.keep(chunks)
        one.out.way.extend(chunks)

    @rule(end=ends, data=st.data())
    def arrive(self, end: str, data: st.DataObject) -> None:
        """Something arrives, cut anywhere."""
        one: End = getattr(self, end)
        if one.comes is None or not one.comes.way:
            return
        first = one.comes.way.popleft()
        if isinstance(first, int):
            one.tail.acknowledge(first)
            return
        amount = data.draw(st.integers(1, len(first)))
        if amount < len(first):
            one.comes.way.appendleft(first[amount:])
        one.got.extend(first[:amount])
        one.tail.receive([first[:amount]])

    @rule(end=ends)
    def report(self, end: str) -> None:
        one: End = getattr(self, end)
        if one.out is not None:
            one.out.way.append(one.tail.received)
            one.tail.reported = one.tail.received

    @rule(end=ends)
    def notice_a_loss(self, end: str) -> None:
        """One end notices; what is on its way to it is lost. The other end may still believe in the connection."""
        one: End = getattr(self, end)
        one.out = one.comes = None

    # A resume, each step of which may be the last

    @rule()
    def ask(self) -> None:
        """The gateway redials. It may have noticed a loss, or only suspect one."""
        self.gateway.out = self.gateway.comes = None
        self._asked, self._answer = self.gateway.tail.counters, None

    @precondition(lambda self: self._asked is not None)
    @rule()
    def answer(self) -> None:
        """The relay gives its old connection up, counts, and sends again at once."""
        assert self._asked is not None
        there, back = Wire(), Wire()
        self.relay.tail.check(self._asked)
        counters = self.relay.tail.counters
        again = self.relay.tail.resume(self._asked)
        back.way.extend(bytes(chunk) for chunk in again)
        self.relay.out, self.relay.comes = back, there
        self._asked, self._answer = None, (counters, there, back)

    @precondition(lambda self: self._answer is not None)
    @rule()
    def hear(self) -> None:
        """The answer reaches the gateway."""
        assert self._answer is not None
        counters, there, back = self._answer
        again = self.gateway.tail.resume(counters)
        there.way.extend(bytes(chunk) for chunk in again)
        self.gateway.out, self.gateway.comes = there, back
        self._answer = None

    @invariant()
    def no_byte_is_lost_or_doubled(self) -> None:
        for one, other in ((self.gateway, self.relay), (self.relay, self.gateway)):
            assert bytes(one.got) == stream(other.seed, 0, len(one.got))
            assert one.tail.received == len(one.got)
            assert other.tail.acknowledged <= len(one.got) <= other.tail.sent == other.made

    def teardown(self) -> None:
        """After a last resume, everything arrives."""
        self.ask()
        self.answer()
        self.hear()
        for one, other in ((self.gateway, self.relay), (self.relay, self.gateway)):
            assert one.comes is not None
            for item in one.comes.way:
                if isinstance(item, bytes):
                    one.got.extend(item)
                    one.tail.receive([item])
            assert bytes(one.got) == stream(other.seed, 0, other.made)
            other.tail.acknowledge(one.tail.received)
            assert other.tail.held == 0


test_both_ends: Any = TwoEnds.TestCase
test_both_ends.settings = settings(max_examples=examples(200), stateful_step_count=40, deadline=None)
