"""The race: rounds in which everybody runs once, so that a busy moment hits all alike; then one table.

Run it so:

    python -m benchmarks                                    # all of it, in some minutes
    python -m benchmarks --only direct --only websockets --rounds 1
    python -m benchmarks --origin-port 7000 --peer other=127.0.0.1:7172:PID,PID
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

from .report import Figures, busy, machine, medians, table
from .traffic import connections_a_second, idle_streams, round_trips, throughput
from .tunnels import Contestant, Way, contestants, peer, rathole_contestants, start_origin

ROUND_TRIPS: Final = 2000
SEQUENTIAL: Final = 1000
CONCURRENT: Final = 2000
IDLE_STREAMS: Final = 1000
STREAMS: Final = (1, 8, 64)
"""How many of them carry a throughput together."""
SETTLE: Final = 0.3
"""Seconds for a tunnel to clear up after a measurement before the next."""


def measure(way: Way, mib: int) -> Figures:
    """Everything there is to know of one way to the origin. It has just been opened, so memory comes first."""
    endpoint, figures = way.endpoint, Figures()

    def note(what: str, costs: dict[str, float], per: float = 1) -> None:
        figures.update({f"{name}_{what}": cost / per for name, cost in costs.items()})

    def memory() -> dict[str, float]:
        time.sleep(SETTLE)
        return {name: process.memory for name, process in way.processes.items()}

    def cpu() -> dict[str, float]:
        time.sleep(SETTLE)
        return {name: process.cpu for name, process in way.processes.items()}

    def cpu_since(before: dict[str, float]) -> dict[str, float]:
        return {name: now - before[name] for name, now in cpu().items()}

    note("memory_idle", memory())
    with idle_streams(endpoint, IDLE_STREAMS):
        note("memory_streams", memory())

    times = round_trips(endpoint, ROUND_TRIPS)
    figures["round_trip_p50"], figures["round_trip_p99"] = times[len(times) // 2], times[len(times) * 99 // 100]

    before = cpu()
    for streams in STREAMS:
        figures[f"down_{streams}"] = throughput(endpoint, "down", streams=streams, total=mib << 20)
        figures[f"up_{streams}"] = throughput(endpoint, "up", streams=streams, total=mib << 20)
    note("cpu_gib", cpu_since(before), 2 * len(STREAMS) * mib / 1024)

    before = cpu()
    figures["connections_1"] = connections_a_second(endpoint, count=SEQUENTIAL, at_once=1)
    figures["connections_50"] = connections_a_second(endpoint, count=CONCURRENT, at_once=50)
    note("cpu_connection", cpu_since(before), (SEQUENTIAL + CONCURRENT) / 1000)

    note("memory_after", memory())
    return figures


def race(runners: dict[str, Contestant], *, rounds: int, mib: int) -> tuple[dict[str, list[Figures]], list[float]]:
    """The figures of each round, by contestant, and how busy others kept the machine between the runs."""
    results: dict[str, list[Figures]] = {name: [] for name in runners}
    others: list[float] = []
    names = [*runners]
    for number in range(rounds):
        for name in names:
            others.append(busy(0.5))
            print(f"round {number + 1} of {rounds}: {name} (others: {others[-1]:.0%})", file=sys.stderr)
            with runners[name]() as way:
                results[name].append(measure(way, mib))
        names.append(names.pop(0))  # nobody is first, or follows the same one, each time
    return results, others


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast, and at what cost.")
    parser.add_argument("--rounds", type=int, default=3, help="how often everybody runs (default %(default)s)")
    parser.add_argument("--mib", type=int, default=256, help="MiB for each throughput (default %(default)s)")
    parser.add_argument("--only", metavar="NAME", action="append", help="who runs, instead of all; may be repeated")
    parser.add_argument(
        "--peer",
        metavar="NAME=HOST:PORT:PID,PID",
        action="append",
        type=peer,
        default=[],
        help="a tunnel that runs already, forwards to our origin, and has these relay and gateway processes",
    )
    parser.add_argument(
        "--rathole",
        metavar="PROGRAM",
        type=Path,
        help="the program of rathole 0.5: race its client against ours, at its own server, over tcp and tls",
    )
    parser.add_argument("--origin-port", metavar="PORT", type=int, default=0, help="where our origin listens")
    parser.add_argument("--json", action="store_true", help="print every figure of every round instead of the table")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was started is ended
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with start_origin(arguments.origin_port) as origin:
        runners = contestants(origin) | dict(arguments.peer)
        if arguments.rathole is not None:
            runners |= rathole_contestants(origin, arguments.rathole.absolute())
        chosen = arguments.only or [*runners]
        if unknown := set(chosen) - set(runners):
            parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(runners)}")
        chosen_ones = {name: runners[name] for name in chosen}
        results, others = race(chosen_ones, rounds=arguments.rounds, mib=arguments.mib)
    if arguments.json:
        print(json.dumps({"machine": machine(), "others": others, "mib": arguments.mib, "rounds": results}, indent=2))
        return
    print(
        f"{machine()}.\nOthers kept the machine {max(others):.0%} busy at the most, {median(others):.0%} as a rule.\n"
        f"Medians of {arguments.rounds} rounds, {arguments.mib} MiB for each throughput; in brackets, times direct."
        " Differences under 25 % are noise.\n"
    )
    print(table(medians(results)))


if __name__ == "__main__":
    main()
