"""What bytes, round trips and connections cost, in counts: `make bench-check`. They repeat where times do not.

Relay and gateway are the programs that users run, each in a process of its own with counters (counted.py); this process
is the visitor. A figure is the sum of both processes:

    task steps        of Trio
    I/O waits         of Trio: how often it asks the kernel for events
    function calls    Python's own and built-in ones; each resumption of a coroutine is one
    system calls      of those, the ones that read, write, accept or poll. Others (to open and close) are not counted
    copied bytes      in user space, for each byte of payload: see copied.c, which takes a C compiler. What a gateway
                      sends is masked and unmasked as well, which is one more pass at each end

A round trip is one byte there and back on one connection. A new connection is opened, sends a request head and a byte,
gets the byte back, and is closed in order from both sides.

A kept request is an HTTP request of one of 100 visitors, each on a connection that has answered before. All ask while
both processes are stopped, and again when all have their answers. How many of them a process takes in one step is still
a matter of timing, so steps and waits are not compared there.

An end that is still busy when the next bytes come takes them in the same step, and that is a matter of timing. So
origin and visitor wait a little before they send, and a figure is the median of several rounds. It is the difference
between many and twice as many, so what a measurement itself costs is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, Literal, TypeAlias

from .connections import Endpoint
from .origin import LATE
from .peers import ours
from .processes import stopped
from .race import start_origin
from .visitors import KeptConnections, dial_echo, throughput
from .way import Way

__all__ = ["TOLERANCE", "Counts", "counted", "excesses", "versions"]

RECORD: Final = Path(__file__).with_name("counts.json")
COPIED: Final = Path(__file__).with_name("copied.c")
COPIES: Final = "copied bytes"
TOLERANCE: Final = 0.05
ROUNDS: Final = 5
MANY: Final = 100
VISITORS: Final = 100
MANY_TIMES: Final = 10
BULK: Final = 64 * 1024 * 1024
STREAMS: Final = 8
SETTLE: Final = 0.3
"""Seconds for both processes to finish what they do."""
PATIENCE: Final = 20.0

Counts: TypeAlias = dict[str, float]


def versions() -> str:
    """What the figures depend on, besides our own code."""
    python = ".".join(platform.python_version_tuple()[:2])
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        python += " free-threaded"
    return f"Python {python}, trio {version('trio')}, websockets {version('websockets')}"


def excesses(measured: Mapping[str, Counts], recorded: Mapping[str, Counts]) -> list[str]:
    """A line for each figure that is more than 5 % above the recorded one. One that only one has is left out."""
    return [
        f"{what}: {count:,g} {name}, {limit:,g} recorded ({count / limit - 1:+.0%})"
        for what, limits in recorded.items()
        for name, limit in limits.items()
        if (count := measured.get(what, {}).get(name, 0)) > limit * (1 + TOLERANCE)
    ]


def measure() -> dict[str, Counts]:
    """All figures, by what is done and what is counted."""
    with TemporaryDirectory() as name, start_origin() as origin:
        folder = Path(name)
        counter = _build_counter(folder)
        with ours.counted(origin, folder, preload=counter) as way:
            counts = {
                "round trip": _per_one(way, folder, lambda count: _round_trips(way.endpoint, count)),
                "new connection": _per_one(way, folder, lambda count: _connections(way.endpoint, count)),
                "kept request": _kept_requests(way, folder),
            }
            if counter is not None:
                counts |= {"download": _copies(way, folder, "down"), "upload": _copies(way, folder, "up")}
        return counts


def _build_counter(folder: Path) -> Path | None:
    """The library that counts copied bytes. None if it cannot be built; a line says so."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("bench-check: there is no C compiler, so copied bytes are not counted")
        return None
    library = folder / "copied.so"
    subprocess.run((compiler, "-O2", "-fPIC", "-shared", "-fno-builtin", "-o", library, COPIED), check=True)
    return library


def _copies(way: Way, folder: Path, direction: Literal["down", "up"]) -> Counts:
    """Bytes that are copied for each byte of payload."""
    throughput(way.endpoint, direction, streams=STREAMS, total=BULK)  # what is done the first time only
    copied = _costs(way, folder, lambda: throughput(way.endpoint, direction, streams=STREAMS, total=BULK))[COPIES]
    return {COPIES: round(copied / BULK, 2)}


def _kept_requests(way: Way, folder: Path) -> Counts:
    with KeptConnections(way.endpoint, VISITORS) as visitors:

        def ask(count: int) -> None:
            for _ in range(count // VISITORS):
                with stopped(process.pid for process in way.processes.values()):
                    visitors.ask_at_once()
                visitors.await_answers()

        counts = _per_one(way, folder, ask, many=VISITORS * MANY_TIMES)
    return {name: counts[name] for name in ("function calls", "system calls")}


def _per_one(way: Way, folder: Path, work: Callable[[int], None], *, many: int = MANY) -> Counts:
    work(many)  # what is done the first time only
    once, twice = (
        _median([_costs(way, folder, lambda: work(count)) for _ in range(ROUNDS)])  # noqa: B023  # called at once
        for count in (many, 2 * many)
    )
    return {name: round((twice[name] - once[name]) / many, 1) for name in once if name != COPIES}


def _median(rounds: list[Counts]) -> Counts:
    return {name: median(counts[name] for counts in rounds) for name in rounds[0]}


def _costs(way: Way, folder: Path, work: Callable[[], object]) -> Counts:
    before = _counts(way, folder)
    work()
    after = _counts(way, folder)
    return {name: after[name] - before[name] for name in after}


def _counts(way: Way, folder: Path) -> Counts:
    """What both processes have done so far."""
    time.sleep(SETTLE)
    return counted([process.pid for process in way.processes.values()], folder)


def counted(pids: Iterable[int], folder: Path) -> Counts:
    """What counted processes that write to `folder` have done so far, together."""
    total: Counts = {}
    for pid in pids:
        written = folder / f"{pid}.json"
        written.unlink(missing_ok=True)
        os.kill(pid, signal.SIGRTMIN)
        deadline = time.monotonic() + PATIENCE
        while not written.exists():
            if time.monotonic() > deadline:
                raise SystemExit("a counted process does not answer")
            time.sleep(0.01)
        for name, count in json.loads(written.read_text()).items():
            total[name] = total.get(name, 0) + count
    return total


def _round_trips(endpoint: Endpoint, count: int) -> None:
    with dial_echo(endpoint, "/late") as sock:
        for _ in range(count):
            time.sleep(LATE)
            sock.send(b"!")
            if not sock.recv(1):
                raise SystemExit("the echo ended")


def _connections(endpoint: Endpoint, count: int) -> None:
    for _ in range(count):
        time.sleep(LATE)
        with dial_echo(endpoint, "/late") as sock:
            time.sleep(LATE)
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise SystemExit("the echo does not end")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description="Compare counts with the record.")
    parser.add_argument("--record", action="store_true", help=f"write what was measured to {RECORD.name}")
    arguments = parser.parse_args()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    installed = versions()
    if installed not in recorded and not arguments.record:
        print(f"bench-check: nothing is recorded for {installed}; python -m benchmarks.counts --record does that")
        return
    measured = measure()
    print(installed)
    for what, counts in measured.items():
        print(f"    {what}: {', '.join(f'{count:,g} {name}' for name, count in counts.items())}")
    if arguments.record:
        RECORD.write_text(json.dumps(recorded | {installed: measured}, indent=2, sort_keys=True) + "\n")
    elif lines := excesses(measured, recorded[installed]):
        sys.exit(
            "\n".join(["bench-check: more than 5 % above the record:", *lines])
            + "\nIf that is the price of something wanted, record it: python -m benchmarks.counts --record"
        )


if __name__ == "__main__":
    main()
