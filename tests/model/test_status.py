"""Statuses, their form on the wire, and the feed that hands them out."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from statuses import states_of

from pioneer_tunnel._model.certificate_status import CertificateStatus
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel._model.text import clean_message
from pioneer_tunnel.tunnel.status_feed import StatusFeed

COMMON = settings(deadline=None, derandomize=True, max_examples=examples(200))

seconds = st.integers(0, 2**40)
certificates = st.builds(
    CertificateStatus, not_after_unix=st.none() | seconds, message=st.none() | st.text(max_size=400)
)
statuses = st.builds(
    Status,
    state=st.sampled_from(State),
    error_kind=st.none() | st.sampled_from(ErrorKind),
    message=st.none() | st.text(max_size=400),
    updated_at_unix=st.none() | seconds,
    public_url=st.none() | st.just("https://office.test"),
    attempt=st.none() | st.integers(1, 10**6),
    retry_at_unix=st.none() | seconds,
    relay_rtt_ms=st.none() | st.floats(0, 1e6),
    services=st.none() | st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    certificates=st.none() | st.dictionaries(st.text(max_size=9), certificates, max_size=3),
)

CONNECTED = Status(state=State.CONNECTED, updated_at_unix=1_700_000_000)


def numbered(number: int) -> Status:
    """Statuses that are news to each other."""
    return Status(state=State.RECONNECTING, retry_at_unix=number)


# The wire


def test_the_names_on_the_wire_are_those_of_the_contract() -> None:
    assert [*map(str, State)] == ["disabled", "starting", "connected", "reconnecting", "failed", "stopped"]
    assert [*map(str, ErrorKind)] == [
        "invalid_settings",
        "missing_key",
        "missing_binary",
        "local_gateway_unavailable",
        "relay_resolve_failed",
        "relay_connect_failed",
        "tunnel_auth_failed",
        "process_exited",
        "unsupported_transport",
        "restart_limit_reached",
        "io",
        "unknown",
    ]


def test_what_is_empty_is_absent_on_the_wire() -> None:
    assert Status(state=State.DISABLED).to_wire() == {"state": "disabled"}
    assert Status(state=State.DISABLED, message="").to_wire() == {"state": "disabled"}
    assert Status(state=State.DISABLED, message=" \n").to_wire() == {"state": "disabled"}


def test_a_whole_status_on_the_wire() -> None:
    status = Status(
        state=State.RECONNECTING,
        error_kind=ErrorKind.RELAY_CONNECT_FAILED,
        message="connection refused",
        updated_at_unix=1_700_000_000,
        public_url="https://office.test",
        attempt=3,
        retry_at_unix=1_700_000_004,
        relay_rtt_ms=12.5,
    )
    assert json.loads(json.dumps(status.to_wire())) == {
        "state": "reconnecting",
        "error_kind": "relay_connect_failed",
        "message": "connection refused",
        "updated_at_unix": 1_700_000_000,
        "public_url": "https://office.test",
        "attempt": 3,
        "retry_at_unix": 1_700_000_004,
        "relay_rtt_ms": 12.5,
    }
    assert [type(value) for value in status.to_wire().values()] == [str, str, str, int, str, int, int, float]


@COMMON
@given(status=statuses)
def test_to_the_wire_and_back_is_the_same(status: Status) -> None:
    assert Status.from_wire(json.loads(json.dumps(status.to_wire()))) == status


def test_unknown_keys_and_nulls_of_another_gateway_are_passed_over() -> None:
    wire = {"state": "connected", "message": None, "transport_detail": "process"}
    assert Status.from_wire(wire) == Status(state=State.CONNECTED)


@pytest.mark.parametrize(
    ("wire", "named"),
    [
        ({}, "'state' is missing"),
        ({"state": None}, "'state' is missing"),
        ({"state": "paused"}, "'state' is 'paused', not one of"),
        ({"state": []}, r"'state' is \[\], not one of"),
        ({"error_kind": "tired"}, "'error_kind' is 'tired', not one of"),
        ({"message": 3}, "'message' is 3, not of type str"),
        ({"updated_at_unix": "now"}, "'updated_at_unix' is 'now', not of type int"),
        ({"updated_at_unix": 1.5}, "'updated_at_unix' is 1.5, not of type int"),
        ({"attempt": True}, "'attempt' is True, not of type int"),
        ({"retry_at_unix": {}}, "'retry_at_unix' is {}, not of type int"),
        ({"public_url": 1}, "'public_url' is 1, not of type str"),
        ({"relay_rtt_ms": "fast"}, "'relay_rtt_ms' is 'fast', not of type int or float"),
        ({"services": ["web"]}, "'services' is not an object of texts"),
        ({"services": {"web": 1}}, "'services' is not an object of texts"),
        ({"certificates": ["a.test"]}, "'certificates' is not an object of objects"),
        ({"certificates": {"a.test": 1}}, "'certificates' is not an object of objects"),
        ({"certificates": {"a.test": {"not_after_unix": "soon"}}}, "'certificates' is not an object of objects"),
    ],
)
def test_a_field_that_the_contract_does_not_allow_is_named(wire: dict[str, Any], named: str) -> None:
    if wire and "state" not in wire:
        wire = {"state": "connected"} | wire
    with pytest.raises(ValueError, match=f"^status: {named}"):
        Status.from_wire(wire)


# Messages


@COMMON
@given(text=st.text(st.characters(codec=None), max_size=700))
def test_any_text_becomes_a_line_of_at_most_300_characters(text: str) -> None:
    message = clean_message(text)
    assert len(message) <= 300
    assert not [char for char in message if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029\r\n"]
    assert message == message.strip()
    assert clean_message(message) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain, with ümläuts and 漢字", "plain, with ümläuts and 漢字"),
        ("two\r\nlines", "two lines"),
        ("\x1b[31mred\x07", "[31mred"),
        ("a\u202eb\u200bc\u2028d", "a b c d"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_what_becomes_of_a_message(text: str, message: str) -> None:
    assert clean_message(text) == message
    assert Status(state=State.FAILED, message=text).message == message


# News


@pytest.mark.parametrize(
    ("changes", "says_else", "news"),
    [
        ({"state": State.RECONNECTING}, True, True),
        ({"error_kind": ErrorKind.LOCAL_GATEWAY_UNAVAILABLE}, True, True),
        ({"message": "other"}, True, True),
        ({"public_url": "https://other.test"}, False, True),
        ({"retry_at_unix": 1}, False, True),
        ({"relay_rtt_ms": 1.0}, False, False),
        ({"attempt": 2}, False, False),
        ({}, False, False),
    ],
)
def test_what_is_news(changes: dict[str, Any], says_else: bool, news: bool) -> None:
    changed = attrs.evolve(CONNECTED, **changes)
    assert changed.says_the_same_as(CONNECTED) is not says_else
    assert changed.is_news_after(CONNECTED) is news


def test_that_a_retry_is_no_longer_planned_is_no_news() -> None:
    waiting = attrs.evolve(CONNECTED, retry_at_unix=1)
    assert waiting.is_news_after(CONNECTED)
    assert not CONNECTED.is_news_after(waiting)


def test_a_status_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        CONNECTED.state = State.FAILED  # type: ignore[misc]


def test_a_timeline_has_each_state_once_while_it_lasts() -> None:
    states = [State.STARTING, State.FAILED, State.FAILED, State.CONNECTED, State.FAILED]
    assert states_of(Status(state=state) for state in states) == [
        State.STARTING,
        State.FAILED,
        State.CONNECTED,
        State.FAILED,
    ]


# The feed


async def test_a_watcher_gets_the_current_status_at_once_then_each_change() -> None:
    feed = StatusFeed(numbered(0))
    watcher = feed.watch()
    assert await anext(watcher) == numbered(0)
    for number in range(1, 4):
        feed.publish(numbered(number))
        assert await anext(watcher) == numbered(number)


async def test_a_watcher_waits_for_the_next_change() -> None:
    feed = StatusFeed(numbered(0))
    seen: list[Status] = []

    async def watch() -> None:
        seen.extend([status async for status in feed.watch()])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        feed.publish(numbered(1))
        await trio.testing.wait_all_tasks_blocked()
        feed.publish(numbered(1))  # the same: nobody wakes
        feed.publish(numbered(2))
        await trio.testing.wait_all_tasks_blocked()
        feed.end()
    assert seen == [numbered(0), numbered(1), numbered(2)]


async def test_a_slow_watcher_skips_to_the_newest_and_never_misses_it() -> None:
    feed = StatusFeed(numbered(0))
    watcher = feed.watch()
    assert await anext(watcher) == numbered(0)
    for number in range(1, 1000):
        feed.publish(numbered(number))
    assert await anext(watcher) == numbered(999)
    feed.publish(numbered(1000))
    feed.end()
    assert [status async for status in watcher] == [numbered(1000)]


async def test_a_late_watcher_of_an_ended_feed_gets_the_last_status_and_ends() -> None:
    feed = StatusFeed(numbered(0))
    feed.end()
    feed.end()
    assert [status async for status in feed.watch()] == [numbered(0)]


async def test_a_watcher_that_has_ended_stays_ended() -> None:
    feed = StatusFeed(numbered(0))
    watcher = feed.watch()
    feed.end()
    assert [status async for status in watcher] == [numbered(0)]
    feed.resume()
    feed.publish(numbered(1))
    with pytest.raises(StopAsyncIteration):
        await anext(watcher)
    assert await anext(feed.watch()) == numbered(1)


async def test_a_watcher_that_was_cancelled_has_lost_nothing() -> None:
    feed = StatusFeed(numbered(0))
    watcher = feed.watch()
    await anext(watcher)
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(watcher)
    feed.publish(numbered(1))
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(watcher)
    assert await anext(watcher) == numbered(1)


async def test_watching_is_a_checkpoint_even_when_there_is_something_to_see() -> None:
    watcher: AsyncIterator[Status] = StatusFeed(numbered(0)).watch()
    with trio.testing.assert_checkpoints():
        await anext(watcher)


async def test_a_watcher_is_no_async_generator_and_needs_no_closing() -> None:
    assert not hasattr(StatusFeed(numbered(0)).watch(), "aclose")


async def test_the_history_holds_the_last_256_and_counts_the_others() -> None:
    feed = StatusFeed(numbered(0))
    assert (feed.history, feed.dropped) == ((numbered(0),), 0)
    for number in range(1, 256):
        feed.publish(numbered(number))
        feed.publish(numbered(number))
    assert (len(feed.history), feed.dropped) == (256, 0)
    for number in range(256, 300):
        feed.publish(numbered(number))
    assert feed.history == tuple(numbered(number) for number in range(44, 300))
    assert feed.dropped == 44
    assert feed.current == numbered(299)


def test_the_history_keeps_the_newest_of_what_is_no_news_to_each_other() -> None:
    feed = StatusFeed(Status(state=State.STARTING))
    for round_trip in (1.0, 2.0, 3.0):
        feed.publish(Status(state=State.CONNECTED, relay_rtt_ms=round_trip))
    assert feed.history == (Status(state=State.STARTING), Status(state=State.CONNECTED, relay_rtt_ms=3.0))
    assert feed.dropped == 0


@COMMON
@given(
    script=st.lists(st.integers(0, 3), max_size=30),
    reads=st.sets(st.integers(0, 29)),
)
def test_whoever_reads_whenever_sees_changes_in_order_and_the_newest(script: list[int], reads: set[int]) -> None:
    """A status equal to the current one is no change; a read after a change gets the newest."""

    async def run() -> None:
        feed = StatusFeed(numbered(0))
        watcher = feed.watch()
        seen = [await anext(watcher)]
        changed = False
        for step, number in enumerate(script):
            changed |= feed.current != numbered(number)
            feed.publish(numbered(number))
            if changed and step in reads:
                seen.append(await anext(watcher))
                assert seen[-1] == feed.current
                changed = False
        feed.end()
        rest = [status async for status in watcher]
        assert rest == ([feed.current] if changed else [])
        history = iter(feed.history)
        assert all(status in history for status in [*seen, *rest])

    trio.run(run)
