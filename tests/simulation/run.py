"""A deterministic simulation: gateway, relay and visitors in one run in virtual time, through all that a `Day` has.

    report = run_day(make_day(7, hours=24))
    print(report)                       # what it was, what was found, and how to have it again
    assert report.failure is None

The gateway is a real `RemoteAccess`, the relay has the doors of a real one, and between them are real WebSocket and
yamux bytes over memory. What has to hold, whatever happens:

    bytes       each end of each conversation hears all there was, or is told that it broke (`conversation`)
    visitors    who comes while nothing goes wrong gets through; who is broken off learns of it in time
    statuses    they keep the contract, and are true (`StatusRecorder`); a failure is final only with a reason
    restraint   after a final failure nobody dials until the settings are applied again
    recovery    when things stop going wrong, all is well again within a bound
    memory      sessions stay within their limits, and when all is quiet nothing is left (`accounts`, `task_leak`)

The same day gives the same trace. What is secret (nonces, masks, instances) differs from run to run, and is not in it.
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
"""Seconds between looks at statuses and dials. What they see was kept for them."""

LOOK: Final = 1800.0
"""Seconds between looks at memory: going through all that is alive takes its time."""

_GROWTH: Final = 8
"""How many more of a class may be alive at the end of a day than at its beginning."""

_KEPT: Final = frozenset({"pioneer_tunnel.Status", "pioneer_tunnel._net.streams.OneAtATime"})
"""What is kept on purpose: a history of statuses, which has a bound; and by the kit, the connection of every dial."""


@final
@attrs.frozen(kw_only=True)
class Report:
    """What came of a day.

    Attributes:
        day: the day.
        failure: the first thing that was wrong, in words; None when nothing was.
        digest: of the trace; two runs of one day have the same.
        seconds: how long the day was in the end.
        counts: of what there was how much.
        trace: what happened, and when.
    """

    day: Day
    failure: str | None
    digest: str
    seconds: float
    counts: dict[str, int]
    trace: tuple[str, ...] = attrs.field(repr=False)

    @property
    def replay(self) -> str:
        """The command that has it happen again."""
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
    """Live through a day. It takes over the process: threads stand still, and log messages are looked at.

    Args:
        day: what happens.

    Returns:
        What came of it. Whatever goes wrong is in the report, and is not raised.
    """
    trace = Trace()
    seconds = 0.0

    async def live(folder: Path) -> None:
        nonlocal seconds
        try:
            await _live(day, trace, folder)
        finally:
            seconds = trio.current_time()

    # A day may be longer than it says: what happens takes its time, and hosts sleep.
    limit = day.end + 3600.0 * (24 + 9 * len(day.acts))
    with tempfile.TemporaryDirectory() as folder, without_threads(), only_new_objects(), _errors_told(trace):
        try:
            run_virtually(lambda: live(Path(folder)), seed=day.seed, limit=limit)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what the day has found
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
    """Until the day is over, or the first thing is wrong."""
    async with open_memory_relay(heartbeat=day.heartbeat) as relay:
        async with open_status_recorder(relay) as recorder, trio.open_nursery() as nursery:
            world = World(day, relay, trace, folder)
            gateway = await world.start(nursery)
            recorder.watch(world.remote_access)
            nursery.start_soon(_stop_at_complaint, trace, nursery.cancel_scope)
            nursery.start_soon(_glance, world, recorder, trace)
            nursery.start_soon(_look, trace)
            await world.do(Lull(3, 100_000))  # the first of everything is made, and stays
            before, tasks = count_objects(), count_tasks(gateway)
            await world.live()
            _check_quiet(trace)
            for name, number in (count_tasks(gateway) - tasks).items():
                trace.complain(f"a task is left behind: {number} of {name}")
            for more in grown(before, count_objects(), by=_GROWTH):
                if more.rpartition(" ")[2] not in _KEPT:
                    trace.complain(f"memory grows: at the end of the day there are {more}")
            nursery.cancel_scope.cancel()
        for seen in recorder.seen:
            trace.status(seen)


async def _stop_at_complaint(trace: Trace, everything: trio.CancelScope) -> None:
    await trace.complained.wait()  # no deadline: most days there is nothing to complain of
    everything.cancel()


async def _glance(world: World, recorder: StatusRecorder, trace: Trace) -> None:
    while True:
        await trio.sleep(GLANCE)
        try:
            recorder.check()
        except AssertionError as error:
            trace.complain(_in_words(error))
        for dial in world.relay.dials_after_final:
            trace.complain(f"it dialled when what had become of a dial before was final: {dial}")


async def _look(trace: Trace) -> None:
    while True:
        for problem in overdrafts():
            trace.complain(f"a session is over its budget: {problem}")
        await trio.sleep(LOOK)


def _check_quiet(trace: Trace) -> None:
    for problem in unfinished():
        trace.complain(f"all is quiet, and a session is not: {problem}")


@contextmanager
def _errors_told(trace: Trace) -> Iterator[None]:
    """Complain of what the library logs as an error: whatever the network does, that is for bugs."""

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
        first = str(leaf).partition("\n")[0]  # the trace tells the rest
        told.append(f"{type(leaf).__name__}: {first}{where}")
    return "; ".join(told)
