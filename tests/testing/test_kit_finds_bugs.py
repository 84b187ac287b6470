"""The proof of the kit: a gateway of somebody's own, with bugs planted in it, tested as docs/testing.md says.

It is built on `open_tunnel` alone, with a loop and statuses of its own, as a gateway that knows nothing of
`RemoteAccess`. Without a bug it passes; with any of them it does not, and the plan that shows it is one a person reads.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final, final

import pytest
import trio
from hypothesis import Phase, given, settings
from rig import echo

from pioneer_tunnel import State, Status, Tunnel, TunnelAuthError, TunnelError, open_tunnel
from pioneer_tunnel.testing import (
    FaultPlan,
    MemoryRelay,
    TasksLeaked,
    check_task_leak,
    open_memory_relay,
    open_status_recorder,
    virtual_time,
)
from pioneer_tunnel.testing.strategies import fault_plans


@final
class Bug(enum.Enum):
    KEEPS_RETRYING = "after tunnel_auth_failed it waits a little and tries again"
    SHOWS_CONNECTED = "it says when the link is up, and not when it is down"
    LEAKS_A_TASK = "each time that the link comes up, it starts a task that never ends"


@final
class Gateway:
    """Echoes what visitors say, keeps a lamp lit, and tries again by itself when the relay is not to be had."""

    def __init__(self, relay: MemoryRelay, show: Callable[[Mapping[str, Any]], None], bugs: frozenset[Bug]) -> None:
        self._relay: Final = relay
        self._show: Final = show
        self._bugs: Final = bugs
        self._lamp_is_kept = False

    async def run(self) -> None:
        async with trio.open_nursery() as tasks:
            while True:
                try:
                    await self._serve(tasks)
                except TunnelAuthError:
                    if Bug.KEEPS_RETRYING not in self._bugs:
                        break
                except TunnelError:
                    break
                await trio.sleep(5)

    async def _serve(self, tasks: trio.Nursery) -> None:
        relay = self._relay
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial, random=Random(0)) as tunnel:
            tasks.start_soon(self._pass_on, tunnel, tasks)
            await trio.serve_listeners(echo, [tunnel])

    async def _pass_on(self, tunnel: Tunnel, tasks: trio.Nursery) -> None:
        was_up = False
        async for status in tunnel.watch():
            is_news = status.state in {State.STARTING, State.CONNECTED} or Bug.SHOWS_CONNECTED not in self._bugs
            if is_news:
                self._show(Status(state=status.state, error_kind=status.error_kind, message=status.message).to_wire())
            was_up, comes_up = status.state is State.CONNECTED, status.state is State.CONNECTED and not was_up
            if comes_up and (Bug.LEAKS_A_TASK in self._bugs or not self._lamp_is_kept):
                self._lamp_is_kept = True
                tasks.start_soon(self._keep_lamp_lit)

    async def _keep_lamp_lit(self) -> None:
        while True:
            await trio.sleep(3600)


@asynccontextmanager
async def running(
    relay: MemoryRelay, show: Callable[[Mapping[str, Any]], None], *bugs: Bug
) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Gateway(relay, show, frozenset(bugs)).run)
        yield nursery
        nursery.cancel_scope.cancel()


def tells_the_truth(*bugs: Bug) -> FaultPlan | None:
    """The property of docs/testing.md, tried; returns the plan that shows that it does not hold."""
    failed: list[FaultPlan] = []

    @settings(deadline=None, max_examples=25, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])
    @given(plan=fault_plans(max_faults=2))
    @virtual_time
    async def test(plan: FaultPlan) -> None:
        try:
            async with (
                open_memory_relay(plan) as relay,
                open_status_recorder(relay, conflated=True) as recorder,
                running(relay, recorder.see, *bugs),
            ):
                await relay.played()
                await trio.sleep(60)
                assert not relay.dials_after_final
        except AssertionError:
            failed.append(plan)
            raise

    try:
        test()
    except AssertionError:
        return failed[-1]
    return None


@virtual_time
async def leaves_no_task_behind(*bugs: Bug) -> None:
    async with open_memory_relay() as relay, running(relay, lambda status: None, *bugs) as nursery:
        await relay.wait_reachable()
        await check_task_leak(nursery, relay.reconnect)


def test_without_a_bug_nothing_is_found() -> None:
    assert tells_the_truth() is None
    leaves_no_task_behind()


def test_a_gateway_that_keeps_retrying_is_found() -> None:
    assert repr(tells_the_truth(Bug.KEEPS_RETRYING)) == "FaultPlan(then=Reject())"


def test_a_gateway_that_shows_connected_while_the_link_is_down_is_found() -> None:
    assert "then=Takeover(" in repr(tells_the_truth(Bug.SHOWS_CONNECTED))


def test_a_gateway_that_leaks_a_task_per_reconnect_is_found() -> None:
    with pytest.raises(TasksLeaked, match=r"3 times more have left tasks behind: 3 of .*_keep_lamp_lit"):
        leaves_no_task_behind(Bug.LEAKS_A_TASK)
    assert tells_the_truth(Bug.LEAKS_A_TASK) is None  # statuses do not show it
