"""`yamux.heartbeat`: a slow path is not a dead one, and a peer that hangs is not a slow path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, final

import attrs
import pytest

from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel.yamux.heartbeat import Heartbeat

STILL: Final = Delivery(
    arrived=100,
    taken=10,
    acknowledged=5000,
    written=5000,
    segment=1448,
    window_left=0,
    in_slow_start=True,
    longest_pause=10.0,
    resend_after=3.0,
)


@final
class Silence:
    """A peer of which no byte is read from the time 0 on; the system tells what `at` returns."""

    def __init__(self, interval: float, at: Callable[[float], Delivery | None]) -> None:
        self._heartbeat: Final = Heartbeat(interval)
        self._at: Final = at
        self.pings: Final[list[float]] = []

    def dead_at(self, *, give_up: float = 1000.0) -> float | None:
        """When the peer is taken for dead; None if it is not before `give_up`."""
        now = 0.0
        while now < give_up:
            if self._heartbeat.look(now, 0.0, self._at(now)):
                self.pings.append(now)
            if now >= self._heartbeat.dead_at:
                return now
            assert self._heartbeat.next_look > now
            now = min(self._heartbeat.next_look, self._heartbeat.dead_at)
        return None


@pytest.mark.parametrize("interval", [0.1, 1.0, 15.0, 60.0])
def test_without_a_system_that_tells_the_peer_is_dead_after_twice_the_interval(interval: float) -> None:
    silence = Silence(interval, lambda now: None)
    assert silence.dead_at() == 2 * interval
    assert silence.pings == [interval]


@pytest.mark.parametrize(("interval", "expected"), [(15.0, 30.0), (60.0, 120.0), (4.0, 10.0), (1.0, 10.0)])
def test_when_nothing_moves_the_peer_is_dead_after_that_too(interval: float, expected: float) -> None:
    """But never earlier than the path itself may pause."""
    assert Silence(interval, lambda now: STILL).dead_at() == expected


def test_a_path_with_long_round_trips_may_pause_for_longer() -> None:
    silence = Silence(15.0, lambda now: attrs.evolve(STILL, longest_pause=45.0))
    assert silence.dead_at() == 45.0


@pytest.mark.parametrize("interval", [1.0, 2.0, 4.0, 15.0])
def test_a_ping_behind_queued_bytes_is_no_silence(interval: float) -> None:
    """64 KiB wait at 8 KB/s for each direction; in every second some are acknowledged."""
    silence = Silence(
        interval,
        lambda now: attrs.evolve(STILL, taken=round(now * 5), acknowledged=round(now * 8000), written=10**9),
    )
    assert silence.dead_at() is None


def test_an_answer_behind_a_gap_is_no_silence() -> None:
    silence = Silence(2.0, lambda now: attrs.evolve(STILL, arrived=round(now * 5)))
    assert silence.dead_at() is None


@pytest.mark.parametrize(("interval", "expected"), [(15.0, 31.0), (2.0, 10.5)])
def test_a_peer_whose_system_lives_and_whose_process_hangs_is_dead(interval: float, expected: float) -> None:
    """Its system acknowledges the ping, and all that is sent after it."""
    silence = Silence(
        interval, lambda now: attrs.evolve(STILL, taken=round(now * 5), acknowledged=round(now * 8000), written=100)
    )
    assert silence.dead_at() == expected


def test_when_the_path_breaks_while_bytes_wait_the_peer_is_dead_after_the_same_time() -> None:
    silence = Silence(15.0, lambda now: attrs.evolve(STILL, taken=round(min(now, 20) * 5), written=10**9))
    assert silence.dead_at() == 50.0


def test_a_byte_begins_everything_anew() -> None:
    heartbeat = Heartbeat(15.0)
    assert not heartbeat.look(0.0, 0.0, STILL)
    assert heartbeat.look(15.0, 0.0, STILL)
    assert not heartbeat.look(16.0, 15.5, STILL)
    assert heartbeat.next_look == 30.5
    assert heartbeat.look(30.5, 15.5, attrs.evolve(STILL, taken=11))
    assert heartbeat.dead_at == 45.5


def test_a_path_is_in_doubt_5_seconds_after_a_ping_without_an_answer() -> None:
    heartbeat = Heartbeat(15.0)
    heartbeat.look(0.0, 0.0, STILL)
    assert heartbeat.doubt_at == math.inf
    assert heartbeat.look(15.0, 0.0, STILL)
    assert heartbeat.doubt_at == 20.0
    heartbeat.look(16.0, 0.0, attrs.evolve(STILL, arrived=101))
    assert heartbeat.doubt_at == 21.0, "bytes moved"
    heartbeat.look(17.0, 16.5, STILL)
    assert heartbeat.doubt_at == math.inf, "a byte came"


def test_the_doubt_waits_for_longer_on_a_path_that_may_pause_for_longer() -> None:
    heartbeat = Heartbeat(15.0)
    assert heartbeat.look(15.0, 0.0, attrs.evolve(STILL, longest_pause=40.0))
    assert heartbeat.doubt_at == 35.0


@pytest.mark.parametrize("delivery", [None, STILL])
def test_a_ping_follows_traffic(delivery: Delivery | None) -> None:
    heartbeat = Heartbeat(15.0, follows_traffic=True)
    assert heartbeat.look(20.0, 0.0, delivery, traffic=0)
    assert heartbeat.awaits_traffic
    assert not heartbeat.look(21.0, 21.0, delivery, traffic=1)
    assert heartbeat.next_look == 24.0
    assert not heartbeat.look(24.0, 23.0, delivery, traffic=2)
    assert heartbeat.look(26.0, 23.0, delivery, traffic=2)
    assert heartbeat.doubt_at == 31.0
    assert not heartbeat.look(26.1, 26.1, delivery, traffic=2)
    assert heartbeat.next_look == 41.1, "once, until there is more of it"


def test_traffic_changes_nothing_for_an_end_that_does_not_follow_it() -> None:
    heartbeat = Heartbeat(15.0)
    assert not heartbeat.look(14.0, 0.0, STILL, traffic=1)
    assert heartbeat.next_look == 15.0


def test_a_check_asks_at_once_and_fails_after_2_seconds() -> None:
    heartbeat = Heartbeat(15.0)
    heartbeat.look(0.0, 0.0, STILL)
    heartbeat.check()
    assert heartbeat.look(4.0, 0.0, STILL)
    assert heartbeat.doubt_at == heartbeat.check_fails_at == 6.0
    assert heartbeat.dead_at == 30.0
    assert not heartbeat.look(5.0, 4.5, STILL)
    assert heartbeat.check_fails_at == math.inf


def test_a_check_shares_a_ping_that_is_not_answered() -> None:
    heartbeat = Heartbeat(15.0)
    assert heartbeat.look(15.0, 0.0, STILL)
    heartbeat.check()
    assert not heartbeat.look(17.0, 0.0, STILL)
    assert heartbeat.check_fails_at == 19.0


def test_a_check_waits_for_bytes_that_tcp_sends_again() -> None:
    """After a hole, TCP sends lost bytes again after up to 3 seconds. The path may live."""
    heartbeat = Heartbeat(15.0)
    waiting = attrs.evolve(STILL, written=6000)
    heartbeat.look(0.0, 0.0, waiting)
    heartbeat.check()
    assert heartbeat.look(4.0, 0.0, waiting)
    assert heartbeat.doubt_at == 6.0
    assert heartbeat.check_fails_at == 8.0
