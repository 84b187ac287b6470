"""Timelines of statuses."""

from __future__ import annotations

from collections.abc import Iterable

from pioneer_tunnel._model.status import State, Status
from pioneer_tunnel.testing import StatusContract


def states_of(statuses: Iterable[Status]) -> list[State]:
    """The states, each once while it lasts."""
    states: list[State] = []
    for status in statuses:
        if not states or states[-1] is not status.state:
            states.append(status.state)
    return states


def check_contract(statuses: Iterable[Status]) -> None:
    """Raise `ContractBroken` unless the gateway contract allows these statuses in this order."""
    contract = StatusContract()
    for status in statuses:
        contract.see(status)
