"""`PYTHONPATH=tests python -m simulation`: run simulated days of faults until one fails.

    --seed 7 --hours 24                 one day, with its report
    --seed 7 --hours 24 --soak 600      that day and those of the next seeds, for ten minutes

It stops at the first day that fails, and prints the report and the command that repeats the day.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import time
from collections.abc import Sequence

from .day import make_day
from .run import Report, run_day

__all__ = ["main"]

STUCK = 600.0
"""Real seconds after which a day counts as hung: the process prints all stacks and exits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run days; returns the exit status: 0 without a fault, 1 with one."""
    parser = argparse.ArgumentParser(
        prog="python -m simulation",
        description="Simulate days of faults: gateway, relay and visitors in virtual time.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first day (default 0)")
    parser.add_argument("--hours", type=float, default=24.0, help="length of a day (default 24)")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="go on with the next seeds for this long")
    parser.add_argument("--trace", action="store_true", help="print all events")
    parser.add_argument("--show", action="store_true", help="print the day as Python code and do not run it")
    chosen = parser.parse_args(arguments)
    if chosen.show:
        print(make_day(chosen.seed, hours=chosen.hours))
        return 0
    logging.getLogger("pioneer_tunnel").addHandler(logging.NullHandler())
    if chosen.soak is not None:
        report = _soak(chosen.seed, chosen.hours, chosen.soak)
    else:
        report = _live(chosen.seed, chosen.hours)
    if chosen.trace:
        print("\n".join(report.trace))
    print(report)
    return 0 if report.failure is None else 1


def _soak(seed: int, hours: float, seconds: float) -> Report:
    """Run one seed after the other; returns the report of the last day, or of the first that failed."""
    began = time.monotonic()
    days = 0
    while True:
        report = _live(seed + days, hours)
        days += 1
        spent = time.monotonic() - began
        print(f"{days} days in {spent:.0f} s, seeds {seed} to {seed + days - 1}", file=sys.stderr, flush=True)
        if report.failure is not None or spent >= seconds:
            return report


def _live(seed: int, hours: float) -> Report:
    # To descriptor 2: `sys.stderr` may be unusable by then.
    faulthandler.dump_traceback_later(STUCK, exit=True, file=2)
    try:
        return run_day(make_day(seed, hours=hours))
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())
