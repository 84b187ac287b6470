"""Run a simulated day: gateway, relay and visitors in virtual time, deterministically.

    report = run_day(make_day(7, hours=24))
    print(report)                       # the day, the first fault, and the command that repeats it
    assert report.failure is None

The gateway is a real `RemoteAccess`. The relay is a `MemoryRelay`, with the real code for gateways and visitors.
WebSocket and yamux bytes between them are real. Checked throughout:

    bytes       each end of each conversation receives everything, or an error (`conversation`)
    visitors    a visitor gets through while nothing is wrong; after a break both ends get an error in time
    statuses    they keep the contract and are true (`StatusRecorder`); a failure is final only with a reason
    restraint   after a final failure the gateway does not dial until its settings are applied again
    recovery    when faults stop, the gateway is connected again within a bound
    memory      sessions stay within their limits; without visitors nothing is left (`accounts`, `task_leak`)

The same day gives the same trace. Random values (nonces, masks, instances) differ between runs and are not in it.
"""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from pioneer_tunnel._model.exception_groups import leaves
from pioneer_tunnel.testing.memory_relay import open_memory_relay
from pioneer_tunnel.testing.status_recorder import StatusRecorder, open_status_recorder
from pioneer_tunnel.testing.task_leak import count_tasks
from pioneer_tunnel.testing.virtual_time import run_virtually, without_threads

from .accounts import count_objects, grown, only_new_objects, overdrafts, unfinished
from .day import Day, Lull
from .trace import Trace
from .world import World

__all__ = ["Report", "run_day"]

GLANCE: Final = 60.0
"""Seconds between checks of statuses and dials, which are recorded in between."""

LOOK: Final = 1800.0
"""Seconds between checks of memory, which are slow: they go through all live objects."""

_GROWTH: Final = 8
"""How many more objects of a class may be alive at the end of a day than at its start."""

_KEPT: Final = frozenset({"pioneer_tunnel.Status", "pioneer_tunnel._net.streams.OneAtATime"})
"""Classes whose objects are kept on purpose: the bounded status history; and in the kit, each dial's connection."""


@final
@attrs.frozen(kw_only=True)
class Report:
    """The result of a day.

    Attributes:
        day: the day.
        failure: the first fault, as text; None if there was none.
        digest: hash of the trace; the same for each run of a day.
        seconds: length of the run in virtual time.
        counts: the number of events by kind.
        trace: the events with their times.
    """

    day: Day
    failure: str | None
    digest: str
    seconds: float
    counts: dict[str, int]
    trace: tuple[str, ...] = attrs.field(repr=False)

    @property
    def replay(self) -> str:
        """The command that repeats the day."""
        return f"PYTHONPATH=tests python -m simulation --seed {self.day.seed} --hours {self.day.hours:g}"

    def __str__(self) -> str:
        day = self.day
        kind = "forwards to a local gateway" if day.forwards else "takes visitors itself"
        lines = [
            f"seed {day.seed}: {self.seconds / 3600:.1f} hours, {kind}, heartbeat {day.heartbeat:g} s",
            *(f"{number:>10}  {name}" for name, number in self.counts.items()),
            f"trace of {len(self.trace)} events: {self.digest}",
        ]
        if self.failure is None:
            return "\n".join([*lines, "all was as it has to be"])
        last = [f"    {line}" for line in self.trace[-12:]]
        return "\n".join([*lines, "the last of it:", *last, f"FAILED: {self.failure}", f"again: {self.replay}"])


def run_day(day: Day) -> Report:
    """Run a day. It affects the whole process: `trio.to_thread` runs functions in the event loop, and logs are checked.

    Args:
        day: the day.

    Returns:
        The report. Faults are in the report and not raised.
    """
    trace = Trace()
    seconds = 0.0

    async def live(folder: Path) -> None:
        nonlocal seconds
        try:
            await _live(day, trace, folder)
        finally:
            seconds = trio.current_time()

    # A run may be longer than the day: acts take time, and hosts sleep.
    limit = day.end + 3600.0 * (24 + 9 * len(day.acts))
    with tempfile.TemporaryDirectory() as folder, without_threads(), only_new_objects(), _errors_told(trace):
        try:
            run_virtually(lambda: live(Path(folder)), seed=day.seed, limit=limit)
        except Exception as error:  # noqa: BLE001  # any exception is a fault that the day has found
            trace.complain(_in_words(error))
    return Report(
        day=day,
        failure=trace.complaint,
        digest=trace.digest,
        seconds=seconds,
        counts=dict(sorted(trace.counts.items())),
        trace=tuple(trace.lines),
    )


async def _live(day: Day, trace: Trace, folder: Path) -> None:
    """Run until the day is over, or until the first fault."""
    async with open_memory_relay(heartbeat=day.heartbeat, resume_timeout=day.resume_timeout) as relay:
        async with open_status_recorder(relay) as recorder, trio.open_nursery() as nursery:
            world = World(day, relay, trace, folder)
            gateway = await world.start(nursery)
            recorder.watch(world.remote_access)
            nursery.start_soon(_stop_at_complaint, trace, nursery.cancel_scope)
            nursery.start_soon(_check_often, world, recorder, trace)
            nursery.start_soon(_check_memory, trace)
            await world.do(Lull(3, 100_000))  # objects that are made once and kept exist after this
            before, tasks = count_objects(), count_tasks(gateway)
            await world.live()
            _check_quiet(trace)
            tasks["pioneer_tunnel.transports.resuming.Resuming._hold"] += 1  # instead of `_hold_first`, after a resume
            for name, number in (count_tasks(gateway) - tasks).items():
                trace.complain(f"a task is left behind: {number} of {name}")
            for more in grown(before, count_objects(), by=_GROWTH):
                if more.rpartition(" ")[2] not in _KEPT:
                    trace.complain(f"memory grows: at the end of the day there are {more}")
            nursery.cancel_scope.cancel()
        for seen in recorder.seen:
            trace.status(seen)


async def _stop_at_complaint(trace: Trace, everything: trio.CancelScope) -> None:
    await trace.complained.wait()  # no deadline: most days have no fault
    everything.cancel()


async def _check_often(world: World, recorder: StatusRecorder, trace: Trace) -> None:
    while True:
        await trio.sleep(GLANCE)
        try:
            recorder.check()
        except AssertionError as error:
            trace.complain(_in_words(error))
        for dial in world.relay.dials_after_final:
            trace.complain(f"it dialled when what had become of a dial before was final: {dial}")


async def _check_memory(trace: Trace) -> None:
    while True:
        for problem in overdrafts():
            trace.complain(f"a session is over its budget: {problem}")
        await trio.sleep(LOOK)


def _check_quiet(trace: Trace) -> None:
    for problem in unfinished():
        trace.complain(f"all is quiet, and a session is not: {problem}")


@contextmanager
def _errors_told(trace: Trace) -> Iterator[None]:
    """Report what the library logs as an error: network faults never are, bugs are."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told = record.getMessage()
            if record.exc_info and record.exc_info[1]:
                told += f"\n{_in_words(record.exc_info[1])}"
            trace.complain(f"the log of {record.name} has an error: {told}")

    logger, listener = logging.getLogger("pioneer_tunnel"), Listener(logging.ERROR)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)


def _in_words(error: BaseException) -> str:
    told = []
    for leaf in leaves(error):
        place = traceback.extract_tb(leaf.__traceback__)[-1:]
        where = f" ({Path(place[0].filename).name}, line {place[0].lineno})" if place else ""
        first = str(leaf).partition("\n")[0]  # the trace has the rest
        told.append(f"{type(leaf).__name__}: {first}{where}")
    return "; ".join(told)
