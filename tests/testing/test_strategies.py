"""What the strategies make up is right, and shrinks to what a person would have written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import Phase, find, given, settings, strategies as st

from pioneer_tunnel import RelayKey, SettingsUpdate
from pioneer_tunnel.testing import (
    Drain,
    FaultPlan,
    HostSleep,
    Leave,
    NotResolved,
    Refuse,
    Reject,
    Up,
    Visitor,
)
from pioneer_tunnel.testing.strategies import chunkings, fault_plans, settings_updates, visitor_traffic

SHRINKING: Final = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])


@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda plan: True, FaultPlan()),
        (lambda plan: len(plan.faults) > 1, FaultPlan([Refuse(), Refuse()])),
        (lambda plan: plan.final, FaultPlan(then=Reject())),
        (lambda plan: NotResolved() in plan.faults and plan.final, FaultPlan([NotResolved()], then=Reject())),
        (
            lambda plan: any(isinstance(fault, Up) and fault.seconds > 42 for fault in plan.faults),
            FaultPlan([Up(43.0)]),
        ),
        (
            lambda plan: len(plan.faults) == 2 and isinstance(plan.faults[1], HostSleep),
            FaultPlan([Refuse(), HostSleep()]),
        ),
    ],
)
def test_a_failing_plan_shrinks_to_what_matters(fails: Callable[[FaultPlan], bool], smallest: FaultPlan) -> None:
    found = find(fault_plans(), lambda plan: bool(fails(plan)), settings=SHRINKING)
    assert repr(found) == repr(smallest)


@settings(deadline=None)
@given(plan=fault_plans(max_faults=2, final=True))
def test_plans_that_end_in_giving_up(plan: FaultPlan) -> None:
    assert plan.final is plan.then
    assert len(plan.faults) <= 2


@settings(deadline=None)
@given(plan=fault_plans(final=False))
def test_plans_that_end_up(plan: FaultPlan) -> None:
    assert plan.final is None
    assert plan.then.kind is None
    assert all((fault.kind is not None or isinstance(fault, Drain)) and not fault.final for fault in plan.faults)


@settings(deadline=None)
@given(data=st.data())
def test_chunks_are_the_whole_in_order(data: st.DataObject) -> None:
    whole = data.draw(st.binary(max_size=100))
    chunks = data.draw(chunkings(whole))
    assert b"".join(chunks) == whole
    assert all(chunks)


def test_chunks_shrink_to_one() -> None:
    assert find(chunkings(b"abcdef"), lambda chunks: True) == [b"abcdef"]
    assert find(chunkings(b"abcdef"), lambda chunks: len(chunks) > 1) == [b"a", b"bcdef"]
    assert find(chunkings(st.binary(min_size=2)), lambda chunks: len(chunks) > 1) == [b"\0", b"\0"]


def test_an_update_shrinks_to_one_that_changes_nothing() -> None:
    assert find(settings_updates(), lambda update: True, settings=SHRINKING) == SettingsUpdate()


def test_an_update_has_the_keys_and_servers_that_are_asked_for() -> None:
    key = RelayKey("ptk1_the-only-key-0123456789abcdef")
    updates = settings_updates(keys=st.just(key), servers=st.just("relay.test:1"))
    assert find(updates, lambda update: update.key is not None, settings=SHRINKING) == SettingsUpdate(key=key)
    found = find(updates, lambda update: update.server is not None, settings=SHRINKING)
    assert found == SettingsUpdate(server="relay.test:1")


def found_in(traffic: Callable[[list[Visitor]], bool]) -> list[Visitor]:
    return find(visitor_traffic(max_visitors=2, max_bytes=1000), traffic, settings=SHRINKING)


def test_traffic_shrinks_to_the_visitor_who_matters() -> None:
    assert found_in(lambda traffic: True) == []
    assert found_in(lambda traffic: len(traffic) > 0) == [Visitor()]
    assert found_in(lambda traffic: any(sum(visitor.sends) > 100 for visitor in traffic)) == [Visitor(sends=(101,))]


@settings(deadline=None)
@given(traffic=visitor_traffic(max_visitors=3, max_bytes=50, within=10))
def test_visitors_come_in_order_and_send_what_they_say(traffic: list[Visitor]) -> None:
    assert len(traffic) <= 3
    assert [visitor.after for visitor in traffic] == sorted(visitor.after for visitor in traffic)
    for visitor in traffic:
        assert visitor.after <= 10
        assert b"".join(visitor.chunks) == visitor.data
        assert tuple(map(len, visitor.chunks)) == visitor.sends
        assert eval(repr(visitor), {"Visitor": Visitor, "Leave": Leave}) == visitor
