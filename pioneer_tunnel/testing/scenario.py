"""Run a test function with a `MemoryRelay` in virtual time.

    def test_my_gateway():
        run(FaultPlan([Refuse(), Up(60.0)]), my_scenario)

    async def my_scenario(relay):
        async with my_gateway(relay.url, relay.key, dial=relay.dial): ...

`run` combines `@virtual_time` and `open_memory_relay`. It needs no test framework, and a test can call it repeatedly.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from .faults import FaultPlan
from .memory_relay import MemoryRelay, open_memory_relay
from .virtual_time import LIMIT, run_virtually

__all__ = ["run"]

_T = TypeVar("_T")


def run(
    plan: FaultPlan, scenario: Callable[[MemoryRelay], Awaitable[_T]], *, seed: int = 0, limit: float = LIMIT
) -> _T:
    """Run `scenario` with a relay that follows `plan`, in virtual time, and return its result.

    Args:
        plan: the faults.
        scenario: an async function that takes the `MemoryRelay`. A single exception is raised without its group.
        seed: decides the order of tasks that Trio could run in any order (default 0).
        limit: virtual seconds that the run may take (default: two days).

    Raises:
        trio.TooSlowError: the run took longer than `limit`.
    """

    async def with_relay() -> _T:
        async with open_memory_relay(plan) as relay:
            return await scenario(relay)

    return run_virtually(with_relay, seed=seed, limit=limit)
