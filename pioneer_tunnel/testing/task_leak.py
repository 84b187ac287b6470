"""Check that a repeated action, such as a reconnect, leaves no tasks behind.

    async with trio.open_nursery() as nursery:
        await nursery.start(my_gateway.run)
        await check_task_leak(nursery, relay.reconnect)

In Trio each task is in a nursery. But a nursery that lives as long as the gateway may gain a task with each reconnect,
which a test of one reconnect does not show.
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
    """The repeated action left tasks behind.

    Attributes:
        leaked: the number of additional tasks by task name.
    """

    def __init__(self, leaked: Counter[str], times: int) -> None:
        self.leaked: Final = leaked
        tasks = ", ".join(f"{count} of {name}" for name, count in leaked.most_common())
        super().__init__(f"{times} times more have left tasks behind: {tasks}")


def count_tasks(nursery: trio.Nursery) -> Counter[str]:
    """Count the tasks of `nursery` and of all nurseries below it, by task name."""
    found: Counter[str] = Counter()
    for task in nursery.child_tasks:
        found[task.name] += 1
        for below in task.child_nurseries:
            found += count_tasks(below)
    return found


async def check_task_leak(nursery: trio.Nursery, again: Callable[[], Awaitable[object]], *, times: int = 3) -> None:
    """Run `again` twice, count tasks, run it `times` more, and compare. The first two runs may start tasks that stay.

    Args:
        nursery: the nursery to count in. It holds the gateway, but no tasks that the test starts meanwhile.
        again: the action. It returns when the state is as before, as `MemoryRelay.reconnect` does.
        times: number of runs after the first two (default 3).

    Raises:
        TasksLeaked: there are more tasks than after the first two runs.
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
