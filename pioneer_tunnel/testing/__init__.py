"""The test kit: what this library's own tests use, for the tests of those who build on it.

`ScriptedTransport` makes a tunnel come up, fail and come back as a script has it, without a relay. `StatusContract`
says whether a sequence of statuses keeps the gateway contract. Nothing here needs a test framework.
"""

from .scripted import Attempt, Connect, Crash, Fail, Return, ScriptedTransport, Stall, Step
from .status_contract import ContractBroken, StatusContract

__all__ = [
    "Attempt",
    "Connect",
    "ContractBroken",
    "Crash",
    "Fail",
    "Return",
    "ScriptedTransport",
    "Stall",
    "StatusContract",
    "Step",
]
