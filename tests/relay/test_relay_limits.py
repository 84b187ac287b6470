"""The limits of a relay: their table, and the counting by itself."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from admissions import limits, never
from hypothesis import given, settings, strategies as st
from rig import (
    relay_config,
)

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._storage.networks import proxy_networks
from pioneer_tunnel.relay import RelayConfig, RelayLimits, rates
from pioneer_tunnel.relay.admission import MOST_LEAVING, Admission, Arrival, OverLimit
from pioneer_tunnel.relay.rates import FailureBackoff, TokenBuckets

# The table


def test_limits_stand_in_a_table_of_the_relays_file() -> None:
    table = {
        "control_addr": "127.0.0.1:0",
        "ingress_addr": "127.0.0.1:0",
        "id": "relay",
        "public_names": ["relay.test"],
        "limits": {"connections_per_address": 0, "exempt": ["10.0.0.1", "2001:db8::/32"]},
    }
    config = RelayConfig.from_table(table)
    assert config.limits.connections_per_address == 0
    assert list(map(str, config.limits.exempt)) == ["10.0.0.1/32", "2001:db8::/32"]
    assert RelayConfig.from_table({key: table[key] for key in table if key != "limits"}).limits == RelayLimits()


def test_everything_that_is_wrong_with_them_is_told_at_once() -> None:
    wrong: dict[str, Any] = {
        "connections": 3,
        "pending": True,
        "streams_per_tunel": 5,
        "failed_auth_delay_ms": 300,
        "failed_auth_delay_max_ms": 200,
        "exempt": ["10.0.0.1/8", 7],
    }
    with pytest.raises(InvalidSettingsError) as refused:
        relay_config(limits=wrong)
    assert {problem.key for problem in refused.value.problems} == {
        "limits.connections",
        "limits.pending",
        "limits.streams_per_tunel",
        "limits.failed_auth_delay_max_ms",
        "limits.exempt[0]",
        "limits.exempt[1]",
    }
    with pytest.raises(InvalidSettingsError, match="array"):
        RelayLimits(exempt="10.0.0.1")


# How often


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=200),
)
def test_a_bucket_gives_no_more_than_its_rate_and_a_burst(rate: int, takes: list[tuple[str, float]]) -> None:
    buckets, now, taken = TokenBuckets(rate), 0.0, {"a": 0, "b": 0}
    for key, later in takes:
        now += later
        taken[key] += buckets.take(key, now)
    assert max(taken.values()) <= rate * (now + rates.BURST_SECONDS) + 1e-6


def test_a_bucket_fills_again_and_none_is_no_limit() -> None:
    buckets = TokenBuckets(2, remembered=2)
    assert [buckets.take("a", 0) for _ in range(9)] == [True] * 8 + [False]
    assert buckets.take("b", 0)
    assert [buckets.take("a", 1) for _ in range(3)] == [True, True, False]
    assert all(TokenBuckets(0).take("a", 0) for _ in range(1000))


def test_each_failure_waits_twice_as_long_up_to_a_bound_and_is_forgotten() -> None:
    failures = FailureBackoff(0.25, 5)
    assert [failures.failed("a", 0) for _ in range(7)] == [0.25, 0.5, 1, 2, 4, 5, 5]
    assert failures.failed("b", 0) == 0.25
    assert [failures.failed("a", 0) for _ in range(2000)][-1] == 5
    assert failures.failed("a", rates.FORGET_AFTER) == 0.25
    assert FailureBackoff(0, 5).failed("a", 0) == 0


def test_only_so_many_keys_are_remembered() -> None:
    failures, buckets = FailureBackoff(1, 8, remembered=3), TokenBuckets(0.25, remembered=3)
    for key in range(100):
        failures.failed(key, 0)
        buckets.take(key, 0)
    assert [failures.failed(key, 0) for key in (99, 98, 97, 96)] == [2, 2, 2, 1]
    assert [buckets.take(key, 0) for key in (99, 98, 97, 96)] == [False, False, False, True]


# How many


def test_a_connection_that_is_passed_on_counts_for_the_rate_of_its_address_alone() -> None:
    admission = Admission(limits(connections=16, connections_per_address=1, connects_per_second_per_address=1))
    for _ in range(3):
        assert admission.count_passed("192.0.2.1", 0)
    admission.cancel_passed("192.0.2.1")
    admission.arrive("192.0.2.1", 0, never)  # the same one
    assert admission.count_passed("192.0.2.1", 0)
    assert not admission.count_passed("192.0.2.1", 0)
    assert admission.count_passed("192.0.2.2", 0)
    assert admission.count_passed("127.0.0.1", 0)
    assert (admission.connections, admission.counts.accepted) == (1, 6)


def test_connections_are_counted_in_all_and_for_each_address() -> None:
    admission = Admission(limits(connections=16, connections_per_address=3))
    first = [admission.arrive("192.0.2.1", 0, never) for _ in range(3)]
    for arrival in first:
        arrival.settle()
    with pytest.raises(OverLimit, match="one address"):
        admission.arrive("192.0.2.1", 0, never)
    with pytest.raises(OverLimit, match="one address"):
        admission.arrive("::ffff:192.0.2.1", 0, never)
    first.pop().leave()
    admission.arrive("192.0.2.1", 0, never).settle()
    for number in range(13):
        admission.arrive(f"198.51.100.{number}", 0, never).settle()
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive("203.0.113.1", 0, never)


def test_64_bits_of_an_ipv6_address_are_an_address() -> None:
    admission = Admission(limits(connections_per_address=2))
    admission.arrive("2001:db8::1", 0, never)
    admission.arrive("2001:db8::2:0:0:1", 0, never)
    with pytest.raises(OverLimit):
        admission.arrive("2001:db8::3", 0, never)
    admission.arrive("2001:db8:0:1::1", 0, never)
    admission.arrive("fe80::1%eth0", 0, never)


def test_who_is_exempt_is_counted_in_all_only() -> None:
    few = RelayLimits(connections=20, connections_per_address=1, pending_per_address=1)
    admission = Admission(few)
    for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", None):
        for _ in range(5):
            arrival = admission.arrive(host, 0, never)
            assert arrival.failed(0) == 0
            arrival.settle()
    with pytest.raises(OverLimit):
        admission.arrive("127.0.0.1", 0, never)


def test_descriptors_bound_connections_whatever_the_limits_say() -> None:
    assert Admission(limits(connections=5000), descriptors=1024).most_connections == 960
    assert Admission(limits(connections=500), descriptors=1024).most_connections == 500
    assert Admission(limits(), descriptors=10).most_connections == 1
    assert Admission(limits(), descriptors=None).most_connections == 8192


def test_who_pends_never_takes_all_there_is() -> None:
    evicted: list[int] = []
    admission = Admission(limits(), descriptors=64 + 20)
    for number in range(12):
        admission.arrive(None, 0, partial(evicted.append, number))
    assert evicted == [0, 1]


def test_the_oldest_that_pends_makes_way() -> None:
    evicted: list[str] = []
    admission = Admission(limits(pending=3, pending_per_address=2))

    def arrive(host: str, name: str) -> Arrival:
        return admission.arrive(host, 0, partial(evicted.append, name))

    arrive("192.0.2.1", "settled").settle()
    for name in ("first", "second"):
        arrive(f"198.51.100.{len(name)}", name)
    arrive("192.0.2.1", "third")
    assert evicted == []
    arrive("192.0.2.1", "fourth")
    assert evicted == ["first"]
    arrive("192.0.2.1", "fifth")
    assert evicted == ["first", "third"], "the oldest of that address, and nobody else"


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "identify", "settle", "settle as a visitor", "leave"]), st.integers(0, 30)
        ),
        max_size=120,
    )
)
def test_the_books_balance(steps: list[tuple[str, int]]) -> None:
    few = limits(connections=16, connections_per_address=9, pending=5, pending_per_address=4)
    balancer = "10.0.0.1"
    admission = Admission(few, proxies=proxy_networks([balancer]))
    present: dict[int, Arrival] = {}
    pending: dict[int, str] = {}
    for number, (step, choice) in enumerate(steps):
        if step == "arrive":
            host = f"192.0.2.{choice % 3}" if choice % 4 else balancer
            with suppress(OverLimit):
                present[number] = admission.arrive(host, number, partial(pending.pop, number))
                pending[number] = host
        elif present:
            key = list(present)[choice % len(present)]
            if step == "identify":
                if present[key].source is not None:
                    continue
                try:
                    present[key].identify(f"192.0.2.{choice % 3}", number)
                except OverLimit:
                    present.pop(key).leave()
                    pending.pop(key, None)
                else:
                    pending |= {key: f"192.0.2.{choice % 3}"} if key in pending else {}
                    continue
            elif step == "settle":
                present[key].settle()
            elif step == "settle as a visitor":
                with suppress(OverLimit):
                    present[key].settle_as_visitor()
                assert admission._visitors <= 14
                if not present[key].is_visitor:
                    continue
            else:
                present.pop(key).leave()
            pending.pop(key, None)
        hosts = list(pending.values())
        assert len(present) <= 16 + MOST_LEAVING
        assert len(hosts) <= 5
        assert all(hosts.count(host) <= 4 for host in hosts if host != balancer)
    for arrival in present.values():
        arrival.leave()
    kept = (
        admission._connections,
        admission._visitors,
        admission._by_source,
        admission._pending,
        admission._pending_by_source,
    )
    assert not any(kept), "nothing is kept of those who have left"


def test_visitors_leave_room_for_gateways() -> None:
    admission = Admission(limits(connections=32))
    visitors = []
    for _ in range(28):
        visitors.append(admission.arrive(None, 0, never, only_visitors=True))
        visitors[-1].settle_as_visitor()
        visitors[-1].settle_as_visitor()  # for a later request of the same connection
    with pytest.raises(OverLimit, match="as many visitors"):
        admission.arrive(None, 0, never, only_visitors=True)
    gateways = [admission.arrive(None, 0, never) for _ in range(4)]
    with pytest.raises(OverLimit, match="as many visitors"):
        gateways[0].settle_as_visitor()
    for gateway in gateways:
        gateway.settle()
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive(None, 0, never)
    visitors[0].leave()
    admission.arrive(None, 0, never, only_visitors=True).settle_as_visitor()


def test_when_all_is_full_the_oldest_that_pends_makes_way() -> None:
    evicted: list[str] = []
    admission = Admission(limits(connections=16, reserved_for_gateways=0))
    for _ in range(14):
        admission.arrive(None, 0, never).settle_as_visitor()
    for name in ("first", "second", "third"):
        admission.arrive(None, 0, partial(evicted.append, name))
    assert evicted == ["first"]
    for _ in range(MOST_LEAVING - 1):
        admission.arrive(None, 0, partial(evicted.append, "more"))
    with pytest.raises(OverLimit, match="as many connections"):
        admission.arrive(None, 0, never)


def test_shares_of_the_connections_are_bounded_and_have_defaults() -> None:
    def most(**values: int) -> tuple[int, int]:
        admission = Admission(limits(**values), descriptors=1024 + 64)
        return admission._most_visitors, admission._most_visits

    assert most() == (896, 192), "shares of what the process may have"
    assert most(connections=160) == (140, 30)
    assert most(connections=160, reserved_for_gateways=100, streams_per_tunnel=0) == (80, 0)
    assert most(reserved_for_gateways=0, streams_per_tunnel=4096) == (1024, 4096)


def test_visitors_of_a_tunnel_are_counted() -> None:
    admission = Admission(limits(streams_per_tunnel=2, opens_per_second_per_tunnel=1))
    for _ in range(2):
        admission.begin_visit("office", 0)
    with pytest.raises(OverLimit, match="as many visitors"):
        admission.begin_visit("office", 0)
    admission.begin_visit("home", 0)
    for tunnel in ("home", "office", "office"):
        admission.end_visit(tunnel)
    for _ in range(2):
        admission.begin_visit("office", 0)
        admission.end_visit("office")
    with pytest.raises(OverLimit, match="new visitors"):
        admission.begin_visit("office", 0)
    assert not admission._visits
