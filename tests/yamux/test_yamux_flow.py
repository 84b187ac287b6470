"""`yamux.flow`: the arithmetic of credit holds whatever happens, and windows grow only where that carries more."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Final

import pytest
from fuzzing import fuzzed, fuzzed_machine
from hypothesis import assume, example, given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel.yamux.flow import (
    INITIAL_WINDOW,
    SEND_BOUND,
    SEND_RESERVE,
    TRUSTED,
    ReceiveWindow,
    RoundTrips,
    SendBudget,
    SendWindow,
    WindowBudget,
)

KIB: Final = 1024
MIB: Final = 1024 * KIB
MAX_CREDIT: Final = 2**32 - 1

amounts = st.integers(0, 2 * INITIAL_WINDOW) | st.integers(0, 2**32)

shares = st.sampled_from([0.1, 0.5, 1.0, 1.0]) | st.floats(0, 1)


# What the peer lets us send


@fuzzed()
@given(st.lists(st.tuples(st.booleans(), amounts)))
def test_a_send_window_is_what_was_granted_less_what_was_spent(steps: list[tuple[bool, int]]) -> None:
    window, expected = SendWindow(), INITIAL_WINDOW
    for is_grant, amount in steps:
        if is_grant and expected + amount <= MAX_CREDIT:
            window.grant(amount)
            expected += amount
        elif is_grant:
            with pytest.raises(RemoteProtocolError):
                window.grant(amount)
        elif amount <= expected:
            window.spend(amount)
            expected -= amount
        else:
            with pytest.raises(LocalProtocolError):
                window.spend(amount)
        assert window.credit == expected


def test_credit_may_fill_its_32_bits_and_no_more() -> None:
    window = SendWindow()
    window.grant(MAX_CREDIT - INITIAL_WINDOW)
    assert window.credit == MAX_CREDIT
    with pytest.raises(RemoteProtocolError, match=r"credit of 1 on top of 4294967295 overflows 32 bits"):
        window.grant(1)


def test_what_is_spent_without_credit_is_named() -> None:
    with pytest.raises(LocalProtocolError, match=r"262145 bytes to send, but a credit of 262144"):
        SendWindow().spend(INITIAL_WINDOW + 1)


# What all streams may grow by together


@fuzzed()
@given(st.integers(0, MIB), st.lists(st.integers(0, MIB)))
def test_a_budget_gives_what_it_has_and_no_more(limit: int, wishes: list[int]) -> None:
    budget = WindowBudget(limit)
    taken = [budget.take(wish) for wish in wishes]
    assert all(0 <= got <= wish for got, wish in zip(taken, wishes, strict=True))
    assert sum(taken) == min(sum(wishes), limit)
    for got in taken:
        budget.give_back(got)
    assert budget.left == limit


# What waits to be sent


def test_a_stream_may_hold_less_the_less_is_left() -> None:
    budget = SendBudget(8 * SEND_BOUND)
    assert budget.bound == SEND_BOUND
    budget.take(4 * SEND_BOUND)
    assert budget.bound == SEND_BOUND // 2
    budget.take(4 * SEND_BOUND)
    assert budget.bound == SEND_RESERVE
    budget.take(-8 * SEND_BOUND)
    assert budget.bound == SEND_BOUND


@fuzzed()
@given(st.integers(1, 64), st.integers(1, 500))
def test_streams_never_hold_more_than_the_limit_and_their_reserves(share: int, streams: int) -> None:
    process = SendBudget(4 * MIB)
    sessions = [SendBudget(MIB, process) for _ in range(8)]
    for number in range(streams):
        session = sessions[number % share % 8]
        session.take(session.bound)
        assert session.held <= MIB + SEND_RESERVE * streams
        assert process.held <= 4 * MIB + SEND_RESERVE * streams
    for session in sessions:
        session.close()
        session.take(-session.held)  # its streams end later
    assert process.held == 0


# What we let the peer send


class OneWindow:
    """A receive window beside its own account of what was received, read and granted."""

    def __init__(self, budget: WindowBudget, limit: int, now: float) -> None:
        self.window: Final = ReceiveWindow(budget, limit, now)
        self.limit: Final = limit
        self.received = self.read = self.granted = 0
        self.cut = False  # at the last read

    @property
    def growth(self) -> int:
        return self.window.size - INITIAL_WINDOW

    def check(self) -> None:
        window = self.window
        assert window.credit == INITIAL_WINDOW + self.granted - self.received
        assert window.unread == self.received - self.read
        # Credit comes back for what was read, and for growth, and for nothing else.
        assert window.owed == self.read + self.growth - self.granted
        assert window.size == window.credit + window.unread + window.owed
        assert min(window.credit, window.unread, window.owed) >= 0
        assert INITIAL_WINDOW <= window.size <= max(self.limit, INITIAL_WINDOW)
        # Less than half a window may be owed, so the peer never waits for credit when everything was read.
        if self.cut:
            assert window.credit + window.unread > window.size // 8
        else:
            assert window.owed < window.size // 2


class WindowsOfASession(RuleBasedStateMachine):
    """Some streams' receive windows with one budget; the peer, the application and the clock do as they like."""

    @initialize(growth=st.sampled_from([0, 1, 100 * KIB, MIB, 5 * MIB, 100 * MIB]))
    def begin(self, growth: int) -> None:
        self.growth_limit = growth
        self.budget = WindowBudget(growth)
        self.now = 0.0
        self.windows: list[OneWindow] = []

    @rule(limit=st.sampled_from([0, 64 * KIB, INITIAL_WINDOW, INITIAL_WINDOW + 1, MIB, 16 * MIB, 2**40]))
    @precondition(lambda self: len(self.windows) < 4)
    def open(self, limit: int) -> None:
        self.windows.append(OneWindow(self.budget, limit, self.now))

    @rule(which=st.integers(0, 3), share=shares)
    @precondition(lambda self: self.windows)
    def receive(self, which: int, share: float) -> None:
        one = self.windows[which % len(self.windows)]
        amount = math.floor(one.window.credit * share)
        one.window.receive(amount)
        one.received += amount

    @rule(which=st.integers(0, 3), excess=st.integers(1, 2**32))
    @precondition(lambda self: self.windows)
    def receive_too_much(self, which: int, excess: int) -> None:
        window = self.windows[which % len(self.windows)].window
        with pytest.raises(RemoteProtocolError):
            window.receive(window.credit + excess)

    @rule(
        which=st.integers(0, 3),
        share=shares,
        round_trip=st.none() | st.sampled_from([0.0, 0.01, 1.0]),
        cut=st.booleans(),
        quick=st.booleans(),
    )
    @precondition(lambda self: self.windows)
    def read(self, which: int, share: float, round_trip: float | None, cut: bool, quick: bool) -> None:
        one = self.windows[which % len(self.windows)]
        amount, size = math.ceil(one.window.unread * share), one.window.size
        grant = one.window.read(amount, self.now, round_trip, cut=cut, quick=quick)
        one.read += amount
        one.granted += grant
        one.cut = cut or quick
        assert grant == 0 or grant >= size // (8 if cut or quick else 2)
        assert one.window.size <= 2 * size
        if round_trip is None:
            assert one.window.size == size

    @rule(seconds=st.sampled_from([0.0001, 0.005, 0.5, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=st.integers(0, 3), twice=st.booleans())
    @precondition(lambda self: self.windows)
    def close(self, which: int, twice: bool) -> None:
        window = self.windows.pop(which % len(self.windows)).window
        unread = window.unread
        window.close()
        if twice:
            window.close()
        # What is still read grants nothing, and what would still come is refused.
        assert window.read(unread, self.now, 0.01) == 0
        with pytest.raises(RemoteProtocolError):
            window.receive(1)

    @invariant()
    def every_account_is_right(self) -> None:
        for one in self.windows:
            one.check()

    @invariant()
    def growth_is_paid_for(self) -> None:
        assert self.budget.left + sum(one.growth for one in self.windows) == self.growth_limit
        assert self.budget.left >= 0

    def teardown(self) -> None:
        for one in getattr(self, "windows", []):
            one.window.close()
        if hasattr(self, "budget"):
            assert self.budget.left == self.growth_limit


TestWindowsOfASession = fuzzed_machine(WindowsOfASession.TestCase, 80, stateful_step_count=50)


def test_every_window_starts_with_what_the_specification_gives() -> None:
    window = ReceiveWindow(WindowBudget(0), 0, 0.0)
    assert window.size == window.credit == SendWindow().credit == 256 * KIB


def test_credit_is_given_for_what_was_read_not_for_what_came() -> None:
    window = ReceiveWindow(WindowBudget(0), 0, 0.0)
    window.receive(INITIAL_WINDOW)
    assert window.credit == 0
    assert window.read(INITIAL_WINDOW // 2 - 1, 0.0, None) == 0
    assert window.read(1, 0.0, None) == window.credit == INITIAL_WINDOW // 2


def test_data_beyond_the_credit_is_named() -> None:
    window = ReceiveWindow(WindowBudget(0), 0, 0.0)
    window.receive(INITIAL_WINDOW)
    with pytest.raises(RemoteProtocolError, match=r"7 bytes of DATA, but a credit of 0"):
        window.receive(7)


def use(
    window: ReceiveWindow,
    amount: int,
    now: float,
    round_trip: float | None,
    *,
    cut: bool = False,
    quick: bool = False,
) -> int:
    """Receive `amount` and read it at once."""
    window.receive(amount)
    return window.read(amount, now, round_trip, cut=cut, quick=quick)


HALF: Final = INITIAL_WINDOW // 2


@pytest.mark.parametrize(
    ("took", "size"),
    [(0.5, 2 * INITIAL_WINDOW), (1.0, 2 * INITIAL_WINDOW), (1.24, 2 * INITIAL_WINDOW), (1.25, INITIAL_WINDOW)],
)
def test_a_window_grows_when_its_half_came_in_little_more_than_a_round_trip(took: float, size: int) -> None:
    window = ReceiveWindow(WindowBudget(MIB), MIB, 100.0, opened_here=True)
    use(window, HALF, 100.0 + took, 1.0)
    assert window.size == size


def test_what_a_peer_sends_without_our_credit_says_nothing() -> None:
    """It may have waited on the way, and comes as fast as this end can read."""
    window = ReceiveWindow(WindowBudget(MIB), MIB, 0.0)
    use(window, HALF, 1.0, 1.0)
    use(window, HALF, 1.0, 1.0)
    assert window.size == INITIAL_WINDOW
    use(window, HALF, 2.0, 1.0)
    assert window.size == 2 * INITIAL_WINDOW


def test_what_had_piled_up_before_its_round_looks_no_faster() -> None:
    window = ReceiveWindow(WindowBudget(MIB), MIB, 0.0, opened_here=True)
    use(window, HALF, 60.0, 1.0)  # slowly
    use(window, HALF, 60.0, 1.0)  # at once, since it was on its way before
    assert window.size == INITIAL_WINDOW
    use(window, HALF, 62.5, 1.0)
    assert window.size == INITIAL_WINDOW


def test_a_rate_is_measured_for_some_time() -> None:
    window = ReceiveWindow(WindowBudget(MIB), MIB, 0.0, opened_here=True)
    for tick in range(1, 5):
        use(window, HALF, tick / 1000, 0.001)
        assert window.size == INITIAL_WINDOW
    use(window, HALF, 0.005, 0.001)
    assert window.size > INITIAL_WINDOW


@pytest.mark.parametrize(("looks", "grows"), [(9, False), (10, True)])
def test_a_round_trip_is_taken_for_a_millisecond_at_least(looks: int, grows: bool) -> None:
    """Otherwise the ends of a fast path would wait for each other after each batch."""
    window = ReceiveWindow(WindowBudget(MIB), MIB, 0.0, opened_here=True)
    for _ in range(looks - 1):
        use(window, HALF, 0.0, 0.0)
    use(window, HALF, 0.01125, 0.0)
    assert (window.size > INITIAL_WINDOW) is grows


def test_a_window_that_is_cut_gets_the_rest_of_its_credit_later() -> None:
    window = ReceiveWindow(WindowBudget(0), MIB, 0.0)
    assert use(window, INITIAL_WINDOW * 7 // 8 - 1, 0.0, None, cut=True) == 0
    assert use(window, 1, 0.0, None, cut=True) == INITIAL_WINDOW // 8
    assert window.credit == INITIAL_WINDOW // 4
    assert use(window, 1, 0.0, None) == INITIAL_WINDOW * 3 // 4 + 1


@pytest.mark.parametrize(("round_trip", "largest"), [(0.0004, 2 * INITIAL_WINDOW), (0.0006, 8 * INITIAL_WINDOW)])
def test_while_a_small_answer_is_awaited_little_waits_before_it_on_a_short_path(
    round_trip: float, largest: int
) -> None:
    window = ReceiveWindow(WindowBudget(100 * MIB), 100 * MIB, 0.0)
    window.size = window.credit = 8 * INITIAL_WINDOW
    use(window, window.credit, 0.0, round_trip, quick=True)
    assert window.credit == largest
    use(window, window.credit, 0.0, round_trip)
    assert window.credit == 8 * INITIAL_WINDOW


def test_a_window_is_not_cut_below_its_initial_size_for_a_small_answer() -> None:
    window = ReceiveWindow(WindowBudget(100 * MIB), 100 * MIB, 0.0)
    window.size = window.credit = 2 * INITIAL_WINDOW
    use(window, window.credit, 0.0, 0.0, quick=True)
    assert window.credit == INITIAL_WINDOW


def test_a_window_that_cannot_grow_is_not_cut() -> None:
    window = ReceiveWindow(WindowBudget(MIB), INITIAL_WINDOW, 0.0)
    assert use(window, HALF, 0.0, None, cut=True) == HALF


def test_when_round_trips_become_longer_some_are_measured_without_a_queue() -> None:
    """Longer ones may only mean that our own bytes queue on the path; or that the path has become longer."""
    trips = RoundTrips()
    trips.add(0.01)
    for _ in range(4):
        assert not trips.doubted
        trips.add(0.05)
    for measured in (0.05, 0.04):
        assert trips.doubted
        assert trips.shortest == 0.01
        trips.add(measured)
    assert trips.shortest == 0.04
    for _ in range(TRUSTED):
        assert not trips.doubted  # not again so soon
        trips.add(0.1)
    assert trips.doubted
    assert trips.shortest == 0.04


def test_the_first_round_trips_are_few() -> None:
    trips = RoundTrips()
    few = []
    for measured in (0.3, 0.1, 0.2, 0.1):
        few.append(trips.few)
        trips.add(measured)
    assert few == [False, True, True, True]
    assert not trips.few


@pytest.mark.parametrize("limit", [0, 1, 64 * KIB, INITIAL_WINDOW])
def test_a_limit_below_the_initial_window_means_no_growth(limit: int) -> None:
    """The peer has 256 KiB of credit from the start, whatever we would like: the window must not shrink below it."""
    budget = WindowBudget(MIB)
    window = ReceiveWindow(budget, limit, 0.0)
    window.receive(INITIAL_WINDOW)
    assert window.read(INITIAL_WINDOW, 0.0, 1.0) == INITIAL_WINDOW
    assert use(window, INITIAL_WINDOW, 1.0, 1.0) == INITIAL_WINDOW
    assert window.size == INITIAL_WINDOW
    assert budget.left == MIB


def test_no_limit_lets_credit_outgrow_its_32_bits() -> None:
    window = ReceiveWindow(WindowBudget(2**40), 2**40, 0.0)
    for seconds in range(40):
        use(window, window.credit, float(seconds), 1.0)
    assert window.size == window.credit == MAX_CREDIT


# What a path makes of it


class Path:
    """A sender that never runs dry, a path of some bandwidth and round trip, a window, and an application that reads.

    Time is simulated, in seconds: events wait in a heap for their turn.
    """

    PACKET: Final = 16 * KIB

    def __init__(self, *, bandwidth: float, round_trip: float, growth: int = 64 * MIB, limit: int = 16 * MIB) -> None:
        self.bandwidth: Final = bandwidth
        self.round_trip: Final = round_trip
        self.budget: Final = WindowBudget(growth)
        self.window: Final = ReceiveWindow(self.budget, limit, 0.0)
        self.delivered = 0
        self.now = 0.0
        self._sender = SendWindow()
        self._link_free_at = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.on_arrival: Callable[[], None] = lambda: None
        self.at(0.0, self._send)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def read(self, amount: int) -> None:
        amount = min(amount, self.window.unread)
        grant = self.window.read(amount, self.now, self.round_trip)
        self.delivered += amount
        if grant:
            self.at(self.now + self.round_trip / 2, lambda: self._be_granted(grant))

    def _be_granted(self, amount: int) -> None:
        self._sender.grant(amount)
        self._send()

    def _send(self) -> None:
        while amount := min(self.PACKET, self._sender.credit):
            self._sender.spend(amount)
            self._link_free_at = max(self._link_free_at, self.now) + amount / self.bandwidth
            self.at(self._link_free_at + self.round_trip / 2, lambda amount=amount: self._arrive(amount))  # type: ignore[misc]

    def _arrive(self, amount: int) -> None:
        self.window.receive(amount)
        self.on_arrival()

    # Applications

    def read_eagerly(self, piece: int) -> None:
        """Read everything as it arrives, `piece` bytes at a time."""

        def read() -> None:
            while self.window.unread:
                self.read(piece)

        self.on_arrival = read

    def read_at(self, rate: float, piece: int) -> None:
        """Read `piece` bytes at a time, `rate` bytes a second."""

        def read() -> None:
            self.read(piece)
            self.at(self.now + piece / rate, read)

        self.at(0.0, read)

    def read_in_bursts(self, every: float, piece: int) -> None:
        """Read nothing for `every` seconds, then everything that is there, `piece` bytes at a time."""

        def read() -> None:
            while self.window.unread:
                self.read(piece)
            self.at(self.now + every, read)

        self.at(every, read)


@fuzzed(25)
@given(
    bandwidth=st.floats(1e5, 1e8),
    round_trip=st.floats(0.005, 0.3),
    piece=st.sampled_from([1000, 16 * KIB, 64 * KIB, 256 * KIB]),
)
@example(bandwidth=5e7, round_trip=0.1, piece=64 * KIB)
@example(bandwidth=1e5, round_trip=0.05, piece=64 * KIB)
def test_a_window_follows_bandwidth_times_round_trip(bandwidth: float, round_trip: float, piece: int) -> None:
    product = bandwidth * round_trip
    assume(product <= 4 * MIB)
    path = Path(bandwidth=bandwidth, round_trip=round_trip)
    path.read_eagerly(piece)
    path.run(40 * round_trip)
    delivered = path.delivered
    path.run(10 * round_trip)
    # Large enough to keep the path full, and no larger than it takes to be sure of that.
    assert path.delivered - delivered >= 0.9 * 10 * product - Path.PACKET
    assert path.window.size <= max(INITIAL_WINDOW, 5.1 * product)


def test_a_window_grows_no_further_than_its_limit() -> None:
    path = Path(bandwidth=1e9, round_trip=0.1, limit=MIB)
    path.read_eagerly(64 * KIB)
    path.run(2.0)
    assert path.window.size == MIB


def test_a_window_grows_no_further_than_the_budget() -> None:
    path = Path(bandwidth=1e9, round_trip=0.1, growth=300 * KIB)
    path.read_eagerly(64 * KIB)
    path.run(2.0)
    assert path.window.size == INITIAL_WINDOW + 300 * KIB
    path.window.close()
    assert path.budget.left == 300 * KIB


@fuzzed(15)
@given(
    rate=st.floats(1e4, 1e6),
    round_trip=st.floats(0.005, 0.06),
    piece=st.sampled_from([1000, 16 * KIB, 64 * KIB, 256 * KIB]),
)
def test_a_slow_reader_gets_no_larger_window(rate: float, round_trip: float, piece: int) -> None:
    assume(rate * round_trip < INITIAL_WINDOW / 5)
    path = Path(bandwidth=5e7, round_trip=round_trip)
    path.read_at(rate, piece)
    path.run(5.0)
    assert path.window.size == INITIAL_WINDOW


@pytest.mark.parametrize("piece", [1000, 16 * KIB, 64 * KIB, 256 * KIB])
@pytest.mark.parametrize("every", [0.5, 3.0])
def test_a_slow_reader_gets_no_larger_window_by_reading_in_bursts(every: float, piece: int) -> None:
    """The bytes of a burst had arrived long before: how fast they are read says nothing of the path."""
    path = Path(bandwidth=5e7, round_trip=0.05)
    path.read_in_bursts(every, piece)
    path.run(30.0)
    assert path.window.size == INITIAL_WINDOW
    assert path.delivered >= INITIAL_WINDOW / 2 * (30 // every - 1)


@pytest.mark.parametrize("piece", [16 * KIB, 64 * KIB])
def test_a_reader_slower_than_the_path_gets_what_it_can_use(piece: int) -> None:
    path = Path(bandwidth=1e8, round_trip=0.05)
    path.read_at(1e7, piece)
    path.run(5.0)
    assert path.window.size <= 5.1 * 1e7 * 0.05
    assert path.delivered >= 0.9 * 1e7 * 5


def test_without_a_known_round_trip_nothing_grows() -> None:
    window = ReceiveWindow(WindowBudget(MIB), 16 * MIB, 0.0)
    for _ in range(10):
        window.receive(window.credit)
        window.read(window.unread, 0.0, None)
    assert window.size == INITIAL_WINDOW
