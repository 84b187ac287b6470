"""The ways to the origin that can be compared. Each module has those of one project, and `find` knows all of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

from ..way import Contestant, Programs, Way
from . import asyncssh, chisel, gotun, nginx, ours, rathole, snitun, ssh

__all__ = ["BASELINE", "find"]

BASELINE: Final = "direct"


def find(programs: Programs) -> list[Contestant]:
    """All that there are, also those that cannot run here. The first is the one that others are compared with."""
    direct = Contestant(
        name=BASELINE,
        about="no tunnel: visitors connect to the origin",
        open=lambda origin: nullcontext(Way(endpoint=origin)),
    )
    modules = (ours, rathole, gotun, chisel, ssh, snitun, asyncssh, nginx)
    return [direct, *(contestant for module in modules for contestant in module.contestants(programs))]
