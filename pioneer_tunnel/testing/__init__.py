"""A test kit for gateways and servers that use this library; docs/testing.md is the guide.

`MemoryRelay` is a relay in memory that follows a `FaultPlan`; with `virtual_time` a simulated day takes seconds.
`StatusRecorder` checks the statuses that a gateway shows: against the contract (`StatusContract`), and against whether
a visitor would get through. `ScriptedTransport` makes a tunnel connect, fail and reconnect without a relay.
`ScriptedPioneerRelay` is a relay for the transports `tcp` and `tls` that fails at chosen moments.

This module needs no test framework. `pioneer_tunnel.testing.strategies` needs Hypothesis. pytest loads the fixtures by
itself. The extra `testing` installs both.
"""

from .._model.public_names import publish as _publish
from .faults import (
    BadTls,
    BlackHole,
    CaptivePortal,
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
    Drain,
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
    "ChangeNetwork",
    "Connect",
    "ContractBroken",
    "Crash",
    "CutAfter",
    "CutAtWelcome",
    "Dial",
    "Drain",
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

_publish(globals())
