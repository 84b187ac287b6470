"""Makes a node of a fleet where the extra `fleet` is installed. A relay without a fleet does not load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..._model.errors import InvalidSettingsError
from ..config import RelayConfig
from ..gateways.expected import Expected
from ..inherited import Inherited

if TYPE_CHECKING:
    from .neighbours import Neighbours
    from .node import FleetNode

__all__ = ["node_of_fleet"]


def node_of_fleet(
    config: RelayConfig,
    *,
    reserved: frozenset[str],
    inherited: Inherited,
    expected: Expected,
    neighbours: Neighbours | None,
    wall_clock: Callable[[], float],
) -> FleetNode:
    """The node that a configuration with `fleet` describes. Arguments and errors: see `FleetNode`.

    Raises:
        InvalidSettingsError: also if the extra is not installed.
    """
    try:
        from .node import FleetNode  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise InvalidSettingsError(
            "relay.fleet needs the package coredis: pip install 'pioneer-tunnel[fleet]'"
        ) from error
    return FleetNode(
        config, reserved=reserved, inherited=inherited, expected=expected, neighbours=neighbours, wall_clock=wall_clock
    )
