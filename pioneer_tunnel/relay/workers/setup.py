"""What a worker gets before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import attrs
import cattrs

from ..config import RelayConfig, config_of
from .shares import share_of

__all__ = ["PROTOCOL", "REPLACED", "Setup"]

PROTOCOL: Final = 1
"""Of the channel. A worker may be of a newer version than its parent, but only if this number is the same."""


REPLACED: Final = "replaced"
"""With the message `drain`: a successor has the place of the worker."""


@final
@attrs.frozen(kw_only=True)
class Setup:
    """What a worker gets before it begins. It holds no secret: a relay's file names files, and has public keys.

    Attributes:
        index: which worker it is, from 0.
        workers: how many there are.
        base: the relay's file when the worker before it was started, or when this one is: its keys are in force.
        tunnels: the relay's file whose tunnels are in force.
        process: tells this process from the one before it and the one after it.
        folder: where the workers reach each other. It is private.
        connected: the ids of the tunnels whose gateways are expected.
    """

    index: int
    workers: int
    base: str
    tunnels: str
    process: str
    folder: str
    connected: Sequence[str] = ()

    def to_wire(self) -> dict[str, Any]:
        """As an object of JSON."""
        return attrs.asdict(self) | {"protocol": PROTOCOL}

    @classmethod
    def from_wire(cls, wire: Any) -> Setup:
        """Read what `to_wire` has made."""
        return cattrs.structure(wire, cls)

    def config(self, file: Path) -> RelayConfig:
        """The configuration of the worker. Blocks.

        Args:
            file: the relay's file.

        Raises:
            InvalidSettingsError: it is not valid.
        """
        base = config_of(self.base.encode(), file)
        tunnels = base if self.tunnels == self.base else config_of(self.tunnels.encode(), file)
        return share_of(attrs.evolve(base, tunnels=tunnels.tunnels), self.workers, self.index)
