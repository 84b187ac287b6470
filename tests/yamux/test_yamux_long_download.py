"""A download through two sessions and a path that holds some bytes and queues the rest. Time is simulated, in seconds.

Windows must be large enough to fill the path, and not so large that bytes of other streams wait long in the queue.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Final

import pytest
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st

from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import StreamOpened
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import LARGEST_FRAME
from pioneer_tunnel.yamux.session import Role, Session
from pioneer_tunnel.yamux.stream_state import Stream

MIB: Final = 1 << 20
PIECE: Final = bytes(MIB)


class Download:
    """A sender that never runs dry, and a reader that reads at once; the path has its queue on the way down.

    Args:
        rate: bytes that pass the path in a second.
        round_trip: seconds without a queue.
        streams: how many carry it together.
        jitter: seconds that bytes on the way up take longer at the most.
    """

    def __init__(self, *, rate: float, round_trip: float, streams: int = 1, jitter: float = 0.0) -> None:
        self.rate: Final = rate
        self.round_trip = round_trip
        self.now = 0.0
        self.came = 0
        self.longest_queue = 0.0  # in seconds, since it was last set
        self._jitter: Final = jitter
        self._random: Final = random.Random(0)
        self._free_at = self._last_up = 0.0
        self._order: Final = itertools.count()
        self._events: Final[list[tuple[float, int, Callable[[], None]]]] = []
        self.reader: Final = Session(Role.CLIENT, Limits())
        self.sender: Final = Session(Role.SERVER, Limits())
        self.streams: Final[list[Stream]] = []
        self._sending: Final[list[Stream]] = []
        self.reader.ping(0.0)  # as `connection` does
        self.send_up()
        self.run(1.0)
        self.streams.extend(self.reader.open_stream(self.now) for _ in range(streams))
        self.send_up()

    def run(self, seconds: float) -> float:
        """Let time pass; returns bytes per second."""
        until, before = self.now + seconds, self.came
        self.longest_queue = 0.0
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until
        return (self.came - before) / seconds

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def send_up(self) -> None:
        if frames := b"".join(self.reader.data_to_send(MIB)):
            late = self._random.uniform(0, self._jitter)
            self._last_up = max(self._last_up, self.now + self.round_trip / 2 + late)
            self._at(self._last_up, lambda: self._at_sender(frames))

    def _at_sender(self, frames: bytes) -> None:
        self.sender.receive_data(frames, self.now)
        for event in self.sender.events():
            if isinstance(event, StreamOpened):
                self.sender.acknowledge(event.stream)
                self._sending.append(event.stream)
        for stream in self._sending:
            while stream.queued <= stream.send_window.credit:
                self.sender.send(stream, PIECE)
        # The path takes everything at once. It is after the sender, where nothing overtakes, that bytes wait.
        while pieces := self.sender.data_to_send(LARGEST_FRAME):
            sent = b"".join(pieces)
            self._free_at = max(self._free_at, self.now) + len(sent) / self.rate
            self.longest_queue = max(self.longest_queue, self._free_at - self.now)
            self._at(self._free_at + self.round_trip / 2, lambda sent=sent: self._at_reader(sent))  # type: ignore[misc]

    def _at_reader(self, sent: bytes) -> None:
        self.reader.receive_data(sent, self.now)
        self.reader.events()
        for stream in self.streams:
            while data := self.reader.read(stream, MIB, self.now):
                self.came += len(data)
        self.send_up()


@fuzzed(15)
@given(
    rate=st.floats(2e5, 2e6),
    round_trip=st.floats(0.001, 0.4),
    streams=st.sampled_from([1, 1, 2, 5]),
    jitter=st.sampled_from([0.0, 0.3]),
)
@example(rate=3e6, round_trip=0.02, streams=1, jitter=0.0)
@example(rate=3e6, round_trip=0.4, streams=1, jitter=0.3)
def test_a_download_fills_the_path_and_not_the_queue(
    rate: float, round_trip: float, streams: int, jitter: float
) -> None:
    jitter *= round_trip
    path = Download(rate=rate, round_trip=round_trip, streams=streams, jitter=jitter)
    path.run(10 * round_trip + 2)
    assert path.run(30) >= 0.9 * rate  # headers, and windows that are cut
    # The initial windows, or a few times what the path holds and what is sent in one piece, however long it takes.
    few_times = 5 * (rate * (round_trip + jitter) + streams * LARGEST_FRAME)
    assert path.longest_queue * rate <= max(streams * INITIAL_WINDOW, few_times) + LARGEST_FRAME


@pytest.mark.parametrize("longer", [0.1, 0.3])
def test_a_path_that_becomes_longer_is_filled_again_within_some_seconds(longer: float) -> None:
    rate = 3e6
    path = Download(rate=rate, round_trip=0.02)
    path.run(3.0)
    assert path.streams[0].receive_window.size <= 2 * INITIAL_WINDOW
    path.round_trip = longer
    path.run(10.0 + 50 * longer)
    assert path.run(20.0) >= 0.9 * rate


def test_a_window_does_not_grow_when_its_path_becomes_shorter() -> None:
    """Then there is a queue, and only its window knows how much of the round trip that is."""
    path = Download(rate=1e6, round_trip=0.3)
    path.run(5.0)
    size = path.streams[0].receive_window.size
    assert size > INITIAL_WINDOW
    path.round_trip = 0.02
    path.run(100.0)
    assert path.streams[0].receive_window.size == size


def test_a_path_that_became_longer_before_the_download_is_filled_within_two_seconds() -> None:
    path = Download(rate=1e7, round_trip=0.001, streams=0)
    path.round_trip = 0.1
    path.streams.append(path.reader.open_stream(path.now))
    path.send_up()
    path.run(2.0)
    assert path.run(3.0) >= 0.9 * path.rate
