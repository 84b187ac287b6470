"""What a visitor costs a relay with workers: `python -m benchmarks.scaling.workers`.

Gateways and visitors come to any worker, as the kernel spreads them. So with two workers half of the visitors reach the
one that does not have their gateway's session, and are passed to the other. A relay is measured alone, with one worker
and with two, in turns:

    counts      of all its processes, for visitors one after the other, and for some at a time: the difference between
                many and twice as many
    CPU         of all its processes, for visitors some at a time
    rate        visitors per second, with the gateways and the visitors on the same cores
    CPU, busy   of all its processes, for visitors who come while the relay is stopped, and are served when it goes on

Each visitor connects, asks one request, and closes. For `requests` each connection asks many.

A process that is busy serves several visitors each time that it wakes. With some visitors at a time, two workers are
less busy than one, and wake more often for each visitor; so do two relays that have nothing to do with each other.
`busy` leaves that out: each process has all of its visitors before it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from ..counts import Counts, counted
from ..machine import busy, machine
from ..processes import allow_many_descriptors, stopped
from .relays import Relay, gateways, relay, visit
from .visitors import await_answer, come, request

TUNNELS: Final = 20
MANY: Final = 200
SETTLE: Final = 1.0
WAYS: Final[dict[str, tuple[str, ...]]] = {
    "alone": (),
    "1 worker": ("--workers", "1"),
    "2 workers": ("--workers", "2"),
}


def count(arguments: Iterable[str], *, at_once: int, requests: int) -> Counts:
    """The counts for one visitor, or for one request if there are several on each connection."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        command = (sys.executable, "-m", "benchmarks.counted", str(folder))
        with relay(folder, TUNNELS, arguments=[*arguments], command=command) as one, gateways(one):
            many, units = (MANY, MANY) if requests == 1 else (TUNNELS, MANY * TUNNELS)
            visit(one, count=TUNNELS * 5, at_once=at_once)  # what is done the first time only
            costs = []
            for twice in (1, 2):
                times = {"count": many * twice} if requests == 1 else {"count": many, "requests": MANY * twice}
                before = _counted(one, folder)
                visit(one, at_once=at_once, **times)
                after = _counted(one, folder)
                costs.append({what: after[what] - before[what] for what in after})
    return {what: round((costs[1][what] - costs[0][what]) / units, 1) for what in costs[0]}


def _counted(one: Relay, folder: Path) -> Counts:
    time.sleep(SETTLE)
    return counted(_pids(one.process.pid), folder)


def _pids(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _ratio(count: float, of: float) -> str:
    return f"{count / of:.2f}" if of else "-"


def measure(arguments: Iterable[str], *, visitors: int, at_once: int, requests: int) -> tuple[float, float]:
    """CPU milliseconds of a visitor or request at the relay, and how many there are per second."""
    with (
        TemporaryDirectory() as name,
        relay(Path(name), TUNNELS, arguments=[*arguments]) as one,
        gateways(one),
    ):
        visit(one, count=TUNNELS * 5, at_once=at_once)
        time.sleep(SETTLE)
        before = one.process.cpu
        seconds = visit(one, count=visitors, at_once=at_once, requests=requests)
        time.sleep(SETTLE)
        return (one.process.cpu - before) * 1000 / visitors / requests, visitors * requests / seconds


def measure_busy(arguments: Iterable[str], *, bursts: int) -> float:
    """CPU milliseconds of a visitor at the relay, when `MANY` come while it is stopped."""
    with (
        TemporaryDirectory() as name,
        relay(Path(name), TUNNELS, arguments=[*arguments]) as one,
        gateways(one),
    ):
        visit(one, count=TUNNELS * 5, at_once=TUNNELS)
        _burst(one)
        before = one.process.cpu
        for _ in range(bursts):
            _burst(one)
        return (one.process.cpu - before) * 1000 / bursts / MANY


def _burst(one: Relay) -> None:
    with ExitStack() as open_visitors:
        with stopped(_pids(one.process.pid)):
            visitors = [open_visitors.enter_context(come(one.visitors)) for _ in range(MANY)]
            for number, visitor in enumerate(visitors):
                request(visitor, number % TUNNELS)
        for visitor in visitors:
            await_answer(visitor)
        with stopped(_pids(one.process.pid)):
            open_visitors.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.workers", description="Workers of a relay.")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--visitors", type=int, default=3000, help="in each round (default %(default)s)")
    parser.add_argument("--at-once", type=int, default=20, help="visitors at a time (default %(default)s)")
    parser.add_argument(
        "--bursts", type=int, default=10, help=f"of {MANY} visitors in each round (default %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=1, help="on each connection (default %(default)s)")
    parser.add_argument("--only-counts", action="store_true", help="measure no times: for a busy machine")
    arguments = parser.parse_args()
    allow_many_descriptors()
    print(machine())
    for at_once in (1, arguments.at_once):
        print(f"{at_once} at a time")
        alone: Counts = {}
        for way, workers in WAYS.items():
            counts = count(workers, at_once=at_once, requests=arguments.requests)
            alone = alone or counts
            shown = ", ".join(f"{count:,.1f} {what} ({_ratio(count, alone[what])})" for what, count in counts.items())
            print(f"{way}: {shown}", flush=True)
    if arguments.only_counts:
        return
    print(f"others use {busy(1.0):.0%} of the machine")
    times: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, workers in WAYS.items():
            cpu, rate = measure(
                workers, visitors=arguments.visitors, at_once=arguments.at_once, requests=arguments.requests
            )
            times[way].append((cpu, rate, measure_busy(workers, bursts=arguments.bursts)))
    for way, measured in times.items():
        cpu, rate, busy_cpu = (median(each) for each in zip(*measured, strict=True))
        print(f"{way}: {cpu:.3f} CPU ms, {rate:,.0f}/s; busy {busy_cpu:.3f} CPU ms")


if __name__ == "__main__":
    main()
