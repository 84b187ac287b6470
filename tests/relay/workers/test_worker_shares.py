"""What of the operator's limits each worker gets, and what all of them together say."""

from __future__ import annotations

from typing import Any, Final

import attrs
import pytest
from hypothesis import given, strategies as st
from rig import KEY

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.stats import SessionStats, StreamStats
from pioneer_tunnel.relay import (
    ConnectionStats,
    FleetConfig,
    FleetStats,
    RelayConfig,
    RelayLimits,
    RelayStats,
    RelayTunnelStats,
)
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.workers.reports import Report, past, summed_up, total
from pioneer_tunnel.relay.workers.shares import DIVIDED, DIVIDED_BY_ADDRESS, share_of

CONFIG: Final = RelayConfig(
    control_addr="127.0.0.1:0",
    ingress_addr="127.0.0.1:0",
    id="relay-1",
    public_names=["relay.test"],
    dashboard="127.0.0.1:9090",
    tunnels=[{"id": "office", "url": "http://office.test", "key": KEY.identity().public_key}],
)


def share(workers: int, **limits: Any) -> RelayLimits:
    return share_of(attrs.evolve(CONFIG, limits=RelayLimits(**limits)), workers).limits


@given(workers=st.integers(1, 256), connections=st.integers(4096, 100_000), pending=st.integers(256, 5000))
def test_all_workers_together_keep_to_the_limits(workers: int, connections: int, pending: int) -> None:
    of_one = share(workers, connections=connections, pending=pending)
    assert of_one.connections * workers <= connections
    assert of_one.pending * workers <= pending


@given(workers=st.integers(1, 64), limit=st.integers(0, 5000))
def test_a_worker_gets_a_little_more_than_its_part_of_an_address(workers: int, limit: int) -> None:
    of_one = share(workers, connections_per_address=limit).connections_per_address
    assert limit / workers <= of_one <= limit
    if not limit:
        assert of_one == 0, "no limit"


def test_each_limit_is_divided_or_named_as_not() -> None:
    kept = {
        "exempt",
        "streams_per_tunnel",
        "opens_per_second_per_tunnel",
        "buffered_bytes_per_tunnel",
        "unsent_bytes_per_tunnel",
        "failed_auth_delay_ms",
        "failed_auth_delay_max_ms",
        "keep_alive_timeout_ms",
    }
    assert {*DIVIDED, *DIVIDED_BY_ADDRESS} | kept == {field.name for field in attrs.fields(RelayLimits)}
    one, whole = share(4), RelayLimits()
    assert all(getattr(one, name) == getattr(whole, name) for name in kept)
    assert (one.connections, one.handshakes_per_second, one.suspended_sessions) == (2048, 50, 256)
    assert one.reserved_for_gateways is None
    assert share(4, reserved_for_gateways=8).reserved_for_gateways == 2


def test_small_limits_stay_limits() -> None:
    of_one = share(8, pending=1, handshakes_per_second=1, suspended_sessions=0, unsent_bytes=1024 * 1024)
    assert (of_one.pending, of_one.handshakes_per_second, of_one.suspended_sessions) == (1, 1, 0)
    assert of_one.unsent_bytes == 1024 * 1024
    with pytest.raises(InvalidSettingsError, match=r"connections.*100.*16 for each of 8 workers"):
        share(8, connections=100)


def test_workers_have_no_site_of_the_operator() -> None:
    assert share_of(CONFIG, 2).dashboard is None


FLEET: Final = FleetConfig(
    node="fra1",
    redis="redis://127.0.0.1",
    listen="127.0.0.1:7300",
    key_file="fra1.key",
    nodes=[{"name": "fra1", "address": "127.0.0.1:7300", "certificate": "fra1.pem", "workers": 2}],
)


def test_each_worker_of_a_node_has_a_port_of_its_own() -> None:
    shares = [share_of(attrs.evolve(CONFIG, fleet=FLEET), 2, index).fleet for index in range(2)]
    assert [None if one is None else one.listen.port for one in shares] == [7300, 7301]


def test_workers_that_other_nodes_do_not_reach_are_refused() -> None:
    with pytest.raises(InvalidSettingsError, match=r"relay\.fleet\.nodes\[0\]\.workers = 2: is less than the 3 of"):
        share_of(attrs.evolve(CONFIG, fleet=FLEET), 3)
    high = attrs.evolve(FLEET, listen=Address("127.0.0.1", 65534), nodes=())
    with pytest.raises(InvalidSettingsError, match=r"relay\.fleet\.listen = '127.0.0.1:65534': there are no 3 ports"):
        share_of(attrs.evolve(CONFIG, fleet=high), 3)


# Sums


def stats(sent: int, *, sessions: int = 0, tunnel: str = "office") -> RelayStats:
    streams = StreamStats(
        open=sessions, opened_total=sent, from_visitors_bytes_total=sent, to_visitors_bytes_total=sent
    )
    return RelayStats(
        since_unix=5.0,
        draining=False,
        connections=attrs.evolve(Admission(RelayLimits()).stats(), open=sessions, accepted_total=sent),
        tunnels={
            tunnel: RelayTunnelStats(
                sessions=tuple(SessionStats(since_unix=float(sent + one)) for one in range(sessions)),
                streams=streams,
                services={"": streams},
                sessions_total=sent,
                refusals_total={"gateway_away": sent},
            )
        },
        streams=streams,
        sessions_open=sessions,
        sessions_total=sent,
        refusals_total={"gateway_away": sent},
    )


def all_of(*parts: RelayStats) -> RelayStats:
    return total(parts, since_unix=1.0, draining=False, tunnels=["office"])


def test_every_number_is_a_sum() -> None:
    one, whole = stats(3, sessions=1), all_of(stats(3, sessions=1), stats(4, sessions=2))
    assert all_of(one) == attrs.evolve(one, since_unix=1.0)
    assert whole.streams == StreamStats(open=3, opened_total=7, from_visitors_bytes_total=7, to_visitors_bytes_total=7)
    assert whole.tunnels["office"].services == {"": whole.streams}
    assert [one.since_unix for one in whole.tunnels["office"].sessions] == [3.0, 4.0, 5.0]
    assert (whole.sessions_open, whole.sessions_total) == (3, 7)
    assert (whole.connections.open, whole.connections.accepted_total, whole.connections.limit) == (3, 7, 2 * 8192)
    assert whole.refusals_total == whole.tunnels["office"].refusals_total == {"gateway_away": 7}


def test_all_fields_are_summed() -> None:
    """A field that is added later must not be forgotten."""
    numbers: dict[str, Any] = {field.name: 1 for field in attrs.fields(RelayStats) if field.default == 0}
    one = attrs.evolve(stats(1), **numbers)
    found = all_of(one, one)
    assert {name: getattr(found, name) for name in numbers} == dict.fromkeys(numbers, 2)
    ones = ConnectionStats(**{field.name: 1 for field in attrs.fields(ConnectionStats)})
    summed = all_of(attrs.evolve(one, connections=ones), attrs.evolve(one, connections=ones)).connections
    assert {*attrs.asdict(summed).values()} == {2}


def node(served: int, **fields: Any) -> RelayStats:
    fleet = FleetStats(**{"node": "fra1", "redis_reachable": True, "hops_served_total": served, **fields})
    return attrs.evolve(stats(1), fleet=fleet)


def test_what_workers_tell_of_their_fleet_is_what_the_node_tells() -> None:
    one = node(3, nodes={"ams1": None, "fra2": 0.5}, hops_open=1, unannounced_tunnels=2, signed_tunnels=7)
    other = node(4, nodes={"ams1": 0.2, "fra2": 0.4}, hops_open=5, unconfirmed_seconds=3.0, redis_reachable=False)
    ended = past(node(10, hops_open=9, unconfirmed_seconds=99.0))
    assert all_of(one, other, ended).fleet == FleetStats(
        node="fra1",
        redis_reachable=False,
        nodes={"ams1": 0.2, "fra2": 0.4},
        hops_open=6,
        hops_served_total=17,
        unannounced_tunnels=2,
        signed_tunnels=7,
        unconfirmed_seconds=3.0,
    )
    assert all_of(stats(1)).fleet is None


@given(sent=st.lists(st.integers(0, 1000), min_size=1, max_size=5), ended=st.integers(0, 5))
def test_no_counter_falls_when_workers_end(sent: list[int], ended: int) -> None:
    parts = [stats(each, sessions=1) for each in sent]
    before = all_of(*parts)
    gone: list[RelayStats] = []
    for part in parts[:ended]:
        gone = [summed_up([*gone, past(part)])]
    after = all_of(*parts[ended:], *gone)
    assert after.streams.opened_total == before.streams.opened_total
    assert after.tunnels["office"].services[""].opened_total == before.streams.opened_total
    assert after.connections.accepted_total == before.connections.accepted_total
    assert after.refusals_total == before.refusals_total
    assert after.sessions_open == len(parts[ended:]) == after.connections.open
    assert len(after.tunnels["office"].sessions) == len(parts[ended:])


def test_a_report_goes_through_the_channel_whole() -> None:
    report = Report(
        stats=attrs.evolve(stats(3, sessions=2), fleet=node(1, nodes={"ams1": None}).fleet),
        certificates={},
        orders_certificates=False,
        version="0.1.0",
        cpu_seconds=0.5,
        memory_bytes=None,
    )
    assert Report.from_wire(report.to_wire()) == report
