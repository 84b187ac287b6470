"""Simulated days: gateway, relay and visitors in one process in virtual time, through faults that a seed makes up.

    report = run_day(make_day(7, hours=24))

`make soak` runs one seed after the other. It is not part of the wheel; docs/testing.md describes what a day checks.
"""

from .conversation import Speech, Talk
from .day import Day, make_day
from .run import Report, run_day

__all__ = ["Day", "Report", "Speech", "Talk", "make_day", "run_day"]
