"""A scenario: a plan, a relay that follows it, and what a test does with them, in one run in virtual time.

    def test_my_gateway():
        run(FaultPlan([Refuse(), Up(60.0)]), my_scenario)

    async def my_scenario(relay):
        async with my_gateway(relay.url, relay.key, dial=relay.dial): ...

Neighbours: `virtual_time` has the clock, `memory_relay` the relay. `run` is for whoever has no test framework, or more
than one run in a test; `@virtual_time` and `open_memory_relay` are the same in two parts.
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
    """Run `scenario` with a relay on which goes wrong what `plan` says, and return what it returns.

    Args:
        plan: what goes wrong.
        scenario: an async function that takes the `MemoryRelay`; what it raises comes out as it is.
        seed: decides which of several tasks runs first, wherever that is open.
        limit: virtual seconds that it may take (default: two days).

    Raises:
        trio.TooSlowError: it took longer than `limit`.
    """

    async def with_relay() -> _T:
        async with open_memory_relay(plan) as relay:
            return await scenario(relay)

    return run_virtually(with_relay, seed=seed, limit=limit)
