"""The race: rounds in which everybody runs once, so that a busy moment of the machine affects all alike."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import final

import attrs

from .connections import Endpoint
from .machine import busy
from .measuring import Figures, Sizes, measure
from .processes import LOOPBACK, ended
from .way import MEMORY_GROUPS, SPEED_GROUPS, Contestant

__all__ = ["Results", "race", "start_origin"]


@final
@attrs.define
class Results:
    """What came of a race.

    Attributes:
        memory: the figures that were measured once, by contestant.
        rounds: the others, by contestant and round.
        failures: what could not be measured.
        others: how busy other programs kept the machine before each run, from 0 to 1.
    """

    memory: dict[str, Figures]
    rounds: dict[str, list[Figures]]
    failures: list[str] = attrs.field(factory=list)
    others: list[float] = attrs.field(factory=list)


@contextmanager
def start_origin(port: int = 0) -> Iterator[Endpoint]:
    """The origin, at `port` or at a free one for 0."""
    with ended(Popen([sys.executable, "-m", f"{__package__}.origin", str(port)], stdout=PIPE, text=True)) as process:
        assert process.stdout is not None
        yield LOOPBACK, int(process.stdout.readline())


def race(
    contestants: Sequence[Contestant], origin: Endpoint, *, rounds: int, sizes: Sizes, groups: Collection[str]
) -> Results:
    """Measure the `groups` of each contestant, with new processes and in another order in each round."""
    order = [*contestants]
    results = Results({each.name: {} for each in order}, {each.name: [] for each in order})

    def run(contestant: Contestant, wanted: Collection[str], title: str) -> Figures:
        chosen = {*wanted} & {*groups} & {*contestant.groups}
        if not chosen:
            return {}
        results.others.append(busy(sizes.settle))
        print(f"{title}: {contestant.name} (others: {results.others[-1]:.0%})", file=sys.stderr)

        def failed(group: str, error: Exception) -> None:
            reason = str(error).strip().splitlines() or [repr(error)]
            results.failures.append(f"{contestant.name}, {title}, {group}: {reason[0]}")
            print(f"    {results.failures[-1]}", file=sys.stderr)

        try:
            with contestant.open(origin) as way:
                most = attrs.evolve(sizes, streams=min(sizes.streams, contestant.most_streams))
                return measure(way, most, chosen, failed)
        except (OSError, RuntimeError) as error:
            failed("start", error)
            return {}

    for contestant in order:
        # Each with new processes: what one has freed may stay in them.
        results.memory[contestant.name] = {}
        for group in MEMORY_GROUPS:
            results.memory[contestant.name] |= run(contestant, (group,), "memory")
    for number in range(rounds):
        for contestant in order:
            figures = run(contestant, SPEED_GROUPS, f"round {number + 1} of {rounds}")
            results.rounds[contestant.name].append(figures)
        order.append(order.pop(0))  # so that no way is always first, or always after the same one
    return results
