"""What of a relay's configuration each worker gets.

It gets its share of the limits, its address for other nodes of a fleet, and no site of the operator.

The operator writes limits of the relay. A limit of everything is divided. A limit of an address is divided, too, but
each worker gets a little more than its part: the kernel spreads connections at random, so a worker may get more of one
address than another. Limits of a tunnel or a session are not divided: a gateway's session is at one worker, which gets
the visitors of its tunnel.
"""

from __future__ import annotations

import math
from typing import Any, Final

import attrs

from ..._model.errors import Problem
from ..._model.text import shown
from ..._storage.validation import refusal
from ..config import RelayConfig
from ..fleet.config import FleetConfig
from ..limits import RelayLimits

__all__ = ["DIVIDED", "DIVIDED_BY_ADDRESS", "share_of"]

DIVIDED: Final = (
    "connections",
    "reserved_for_gateways",
    "pending",
    "handshakes_per_second",
    "unsent_bytes",
    "suspended_sessions",
    "suspended_bytes",
)
DIVIDED_BY_ADDRESS: Final = ("connections_per_address", "pending_per_address", "connects_per_second_per_address")
LEAST_CONNECTIONS: Final = 16
_SPREAD: Final = 3
"""Standard deviations by which a worker may have more connections of an address than the average one."""

_LEAST: Final = {"connections": LEAST_CONNECTIONS, "unsent_bytes": 1024 * 1024, "suspended_bytes": 1024 * 1024}


def share_of(config: RelayConfig, workers: int, index: int = 0) -> RelayConfig:
    """The configuration of one worker of a relay.

    Args:
        config: the relay's.
        workers: how many there are.
        index: which of them it is, from 0 (default).

    Raises:
        InvalidSettingsError: a limit is too small to be divided; or the other nodes of its fleet do not reach so many.
    """
    fleet = None if config.fleet is None else _share_of_fleet(config.fleet, workers, index)
    limits = _share_of_limits(config.limits, workers)
    return attrs.evolve(config, limits=limits, fleet=fleet, dashboard=None, metrics=None)


def _share_of_fleet(fleet: FleetConfig, workers: int, index: int) -> FleetConfig:
    for place, node in enumerate(fleet.nodes):
        if node.name == fleet.node and node.workers < workers:
            text = f"is less than the {workers} of --workers; write as many into the files of all nodes"
            raise refusal([Problem(key=f"relay.fleet.nodes[{place}].workers", value=str(node.workers), message=text)])
    try:
        fleet.of_worker(workers - 1)
        return fleet.of_worker(index)
    except ValueError:
        text = f"there are no {workers} ports from it on, one for each worker"
        key = "relay.fleet.listen"
        raise refusal([Problem(key=key, value=shown(key, str(fleet.listen)), message=text)]) from None


def _share_of_limits(limits: RelayLimits, workers: int) -> RelayLimits:
    if limits.connections < LEAST_CONNECTIONS * workers:
        text = f"is less than {LEAST_CONNECTIONS} for each of {workers} workers"
        raise refusal([Problem(key="relay.limits.connections", value=str(limits.connections), message=text)])
    divided: dict[str, Any] = {name: _part(name, getattr(limits, name), workers) for name in DIVIDED}
    by_address: dict[str, Any] = {name: _part_of_address(getattr(limits, name), workers) for name in DIVIDED_BY_ADDRESS}
    return attrs.evolve(limits, **divided, **by_address)


def _part(name: str, limit: int | None, workers: int) -> int | None:
    """A share of a limit. None and 0 stay what they are: the default, none, or no limit."""
    return max(limit // workers, _LEAST.get(name, 1)) if limit else limit


def _part_of_address(limit: int, workers: int) -> int:
    part = limit / workers
    return min(limit, math.ceil(part + _SPREAD * math.sqrt(part))) if workers > 1 else limit
