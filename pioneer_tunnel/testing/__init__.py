"""The test kit: what this library's own tests use, for the tests of those who build on it; docs/testing.md is a guide.

`MemoryRelay` is a whole relay in memory, on which goes wrong what a `FaultPlan` says; with `virtual_time` a day of it
takes seconds. `StatusRecorder` holds what a gateway shows against `StatusContract`, and against what a visitor would
find. `ScriptedTransport` makes a tunnel come up, fail and come back without a relay or a byte. `ScriptedPioneerRelay`
is a relay for the transports `tcp` and `tls` that goes wrong as it is told.

Nothing here needs a test framework. What needs Hypothesis is in `pioneer_tunnel.testing.strategies`; the fixtures of
pytest come by themselves. The extra `testing` installs both.
"""

from .faults import (
    BadTls,
    BlackHole,
    CaptivePortal,
    CutAfter,
    Fault,
    FaultPlan,
    HostSleep,
    NotResolved,
    Refuse,
    Reject,
    Slow,
    Stage,
    StallAt,
    Takeover,
    Unavailable,
    Up,
)
from .faulty_dialer import Dial, FaultyDialer
from .memory_relay import MemoryRelay, open_memory_relay
from .memory_stream import MemoryConnection, MemoryStream
from .pioneer_relay import Moment, ScriptedPioneerRelay, Trouble, Way, open_pioneer_relay
from .scenario import run
from .scripted import Attempt, Connect, Crash, Fail, Return, ScriptedTransport, Stall, Step
from .status_contract import ContractBroken, StatusContract
from .status_recorder import Seen, StatusRecorder, StatusUntrue, Watched, open_status_recorder
from .task_leak import TasksLeaked, check_task_leak, count_tasks
from .virtual_time import virtual_time, wall_clock
from .visitors import Heard, Leave, Visitor, play_visitor

__all__ = [
    "Attempt",
    "BadTls",
    "BlackHole",
    "CaptivePortal",
    "Connect",
    "ContractBroken",
    "Crash",
    "CutAfter",
    "Dial",
    "Fail",
    "Fault",
    "FaultPlan",
    "FaultyDialer",
    "Heard",
    "HostSleep",
    "Leave",
    "MemoryConnection",
    "MemoryRelay",
    "MemoryStream",
    "Moment",
    "NotResolved",
    "Refuse",
    "Reject",
    "Return",
    "ScriptedPioneerRelay",
    "ScriptedTransport",
    "Seen",
    "Slow",
    "Stage",
    "Stall",
    "StallAt",
    "StatusContract",
    "StatusRecorder",
    "StatusUntrue",
    "Step",
    "Takeover",
    "TasksLeaked",
    "Trouble",
    "Unavailable",
    "Up",
    "Visitor",
    "Watched",
    "Way",
    "check_task_leak",
    "count_tasks",
    "open_memory_relay",
    "open_pioneer_relay",
    "open_status_recorder",
    "play_visitor",
    "run",
    "virtual_time",
    "wall_clock",
]
