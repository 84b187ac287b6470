"""On what this runs, and what else runs on it."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = ["busy", "machine"]

PACKAGES: Final = ("pioneer-tunnel", "trio", "websockets", "trio-websocket", "snitun", "asyncssh")


def machine() -> str:
    """On what this runs; figures of different machines cannot be compared."""
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} {platform.machine()} cores, shared by origin, tunnel and visitors; Linux {platform.release()},"
        f" Python {platform.python_version()}, {', '.join(_packages())}"
    )


def _packages() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def busy(seconds: float) -> float:
    """How much of the machine is in use, from 0 to 1, for the next `seconds`. While we do nothing, that is others."""
    before = _cpu_times()
    time.sleep(seconds)
    everything, idle = (after - was for after, was in zip(_cpu_times(), before, strict=True))
    return 1 - idle / everything if everything else 0.0  # the kernel counts in ticks, and none has passed


def _cpu_times() -> tuple[int, int]:
    times = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(times), times[3] + times[4]  # idle, and waiting for a disk
