"""How fast, at what cost, and compared with whom: a race, figures of this project alone, and then tables and a plot.

python -m benchmarks                                 # all of it
python -m benchmarks --quick --only direct,ws        # little of it
python -m benchmarks --list                          # who can run here, and why others cannot
python -m benchmarks --program rathole=/path/to/rathole
python -m benchmarks --origin-port 7000 --peer other=127.0.0.1:7172:PID,PID
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Final

import attrs

from . import measuring
from .figures import Run, collect
from .goals import judge
from .imports import measure_imports
from .long_path import measure_long_path
from .machine import machine
from .measuring import Figures
from .peers import find
from .plot import can_plot, plot
from .processes import Process, allow_many_descriptors
from .race import Results, race, start_origin
from .report import report
from .way import MEMORY_GROUPS, PROCESSES, SPEED_GROUPS, Contestant, Programs, Way

ROUNDS: Final = 3
ALONE_GROUPS: Final = ("alone",)
"""What needs no contestant."""
GROUPS: Final = (*MEMORY_GROUPS, *SPEED_GROUPS, *ALONE_GROUPS)


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _program(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(text)
    return name, Path(path).absolute()


def _peer(text: str) -> Contestant:
    """Another tunnel, which runs already, from `NAME=HOST:PORT:PID,PID`."""
    name, equals, rest = text.partition("=")
    host, port, *pids = rest.split(":")
    if not (name and equals) or len(pids) > 1:
        raise ValueError(text)
    processes = [Process(int(pid)) for pid in ",".join(pids).split(",") if pid]
    way = Way(endpoint=(host, int(port)), processes=dict(zip(PROCESSES, processes, strict=False)))
    return Contestant(name=name, about="a tunnel that ran already", open=lambda _: nullcontext(way))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast, and at what cost.")
    add = parser.add_argument
    add("--rounds", type=int, help=f"how often everybody runs (default {ROUNDS}, and 1 with --quick)")
    add("--quick", action="store_true", help="less of everything: to see that it runs, not to compare")
    add("--only", metavar="NAME,...", type=_names, default=[], help="who runs; --list has the names")
    add("--figures", metavar="GROUP,...", type=_names, default=[*GROUPS], help=f"of {', '.join(GROUPS)}")
    add("--out", metavar="FOLDER", type=Path, default=Path("build/bench"), help="default %(default)s")
    add("--list", action="store_true", help="tell who can run here, and end")
    add("--program", metavar="NAME=PATH", action="append", type=_program, default=[], help="one that is not on PATH")
    add("--origin-port", metavar="PORT", type=int, default=0, help="where the origin listens")
    add(
        "--peer",
        metavar="NAME=HOST:PORT:PID,PID",
        action="append",
        type=_peer,
        default=[],
        help="a tunnel that runs already, forwards to our origin, and has these relay and gateway processes",
    )
    parsed = parser.parse_args(arguments)
    if unknown := {*parsed.figures} - {*GROUPS}:
        parser.error(f"--figures: no {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    parsed.everybody = [*find(Programs(dict(parsed.program))), *parsed.peer]
    there = {contestant.name for contestant in parsed.everybody}
    if unknown := {*parsed.only} - there:
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(there))}")
    return parsed


def choose(everybody: Sequence[Contestant], only: Sequence[str]) -> list[Contestant]:
    """Who runs. A line tells of each one that would but cannot."""
    chosen = [each for each in everybody if (each.name in only if only else each.by_default)]
    for contestant in chosen:
        if contestant.missing:
            print(f"without {contestant.name}: {contestant.missing}", file=sys.stderr)
    return [each for each in chosen if not each.missing]


def measure_alone(*, quick: bool) -> Figures:
    print("in one process", file=sys.stderr)
    return measure_long_path() | measure_imports(2 if quick else 7)


def write(folder: Path, run: Run, results: Results, heading: str) -> str:
    """Write `bench.json`, `bench.md` and, where matplotlib is, `bench.svg`; return the text of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = judge(run)
    text = f"{heading}\n\n{report(run, verdicts)}\n"
    if results.failures:
        text += "\nNot measured:\n\n" + "".join(f"- {failure}\n" for failure in results.failures)
    goals = {verdict.goal.title: {"measured": verdict.value, "result": verdict.word} for verdict in verdicts}
    saved = {"run": heading, "figures": run, "goals": goals, **attrs.asdict(results)}
    (folder / "bench.json").write_text(json.dumps(saved, indent=2) + "\n")
    (folder / "bench.md").write_text(text)
    if can_plot():
        plot(run, folder / "bench.svg")
    else:
        print("without a plot: there is no matplotlib (the extra `bench`)", file=sys.stderr)
    return text


def main() -> None:
    options = parse()
    if options.list:
        for each in options.everybody:
            print(f"{each.name:12} {each.about}{f' -- not here: {each.missing}' if each.missing else ''}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was started is ended
    allow_many_descriptors()
    began = time.monotonic()
    sizes = measuring.QUICK if options.quick else measuring.DEFAULT
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    chosen = choose(options.everybody, options.only)
    with start_origin(options.origin_port) as origin:
        results = race(chosen, origin, rounds=rounds, sizes=sizes, groups=options.figures)
    alone = measure_alone(quick=options.quick) if {*ALONE_GROUPS} & {*options.figures} else {}
    others = results.others or [0.0]
    heading = (
        f"{machine()}. {time.strftime('%d %B %Y')}, {(time.monotonic() - began) / 60:.0f} minutes. Before each run,"
        f" other programs used {median(others):.0%} of the machine as a rule, and {max(others):.0%} at most.\n\n"
        f"Medians of {rounds} round{'s'[: rounds > 1]}, and in brackets from the worst to the best; {sizes.mib} MiB"
        " for each throughput. Memory, growth and figures in one process were measured once."
    )
    print(write(options.out, collect(results.memory, results.rounds, alone), results, heading))
    print(f"in {options.out}: bench.md, bench.json and bench.svg", file=sys.stderr)


if __name__ == "__main__":
    main()
