"""Does something that happens again and again leave tasks behind?

    async with trio.open_nursery() as nursery:
        await nursery.start(my_gateway.run)
        await check_task_leak(nursery, relay.reconnect)

Trio has no lost tasks: each is in a nursery. But a nursery that lives as long as the gateway may collect one more with
each reconnect, which no test of a single one shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, final

import trio
import trio.testing

__all__ = ["TasksLeaked", "check_task_leak", "count_tasks"]


@final
class TasksLeaked(AssertionError):
    """Tasks are left behind.

    Attributes:
        leaked: how many, by name.
    """

    def __init__(self, leaked: Counter[str], times: int) -> None:
        self.leaked: Final = leaked
        tasks = ", ".join(f"{count} of {name}" for name, count in leaked.most_common())
        super().__init__(f"{times} times more have left tasks behind: {tasks}")


def count_tasks(nursery: trio.Nursery) -> Counter[str]:
    """The living tasks of `nursery` and of all nurseries below it, by name."""
    found: Counter[str] = Counter()
    for task in nursery.child_tasks:
        found[task.name] += 1
        for below in task.child_nurseries:
            found += count_tasks(below)
    return found


async def check_task_leak(nursery: trio.Nursery, again: Callable[[], Awaitable[object]], *, times: int = 3) -> None:
    """Do something twice, which may start what then stays, and `times` more, after which there must not be more tasks.

    Args:
        nursery: what is looked at: one that holds the gateway, and not what the test itself starts meanwhile.
        again: what to do; it returns when all is as it was before, as `MemoryRelay.reconnect` does.
        times: how often, after the first two (default 3).

    Raises:
        TasksLeaked: there are more tasks than before, and which.
    """
    await _repeat(again, 2)
    before = count_tasks(nursery)
    await _repeat(again, times)
    leaked = count_tasks(nursery) - before
    if leaked:
        raise TasksLeaked(leaked, times)


async def _repeat(again: Callable[[], Awaitable[object]], times: int) -> None:
    for _ in range(times):
        await again()
        await trio.testing.wait_all_tasks_blocked()
