"""The test kit: what this library's own tests use, for the tests of those who build on it.

`ScriptedTransport` makes a tunnel come up, fail and come back as a script has it, without a relay. `StatusContract`
says whether a sequence of statuses keeps the gateway contract. `ScriptedPioneerRelay` is a
relay for the transports `tcp` and `tls` that goes wrong as it is told. Nothing here needs a test framework.
"""

from .memory_stream import MemoryConnection, MemoryStream
from .pioneer_relay import Moment, ScriptedPioneerRelay, Trouble, Way, open_pioneer_relay
from .scripted import Attempt, Connect, Crash, Fail, Return, ScriptedTransport, Stall, Step
from .status_contract import ContractBroken, StatusContract
from .virtual_time import virtual_time, wall_clock

__all__ = [
    "Attempt",
    "Connect",
    "ContractBroken",
    "Crash",
    "Fail",
    "MemoryConnection",
    "MemoryStream",
    "Moment",
    "Return",
    "ScriptedPioneerRelay",
    "ScriptedTransport",
    "Stall",
    "StatusContract",
    "Step",
    "Trouble",
    "Way",
    "open_pioneer_relay",
    "virtual_time",
    "wall_clock",
]
