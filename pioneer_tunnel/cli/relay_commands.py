"""The commands of the group `relay` about a relay's file and the relay that runs with it."""

from __future__ import annotations

from typing import Final

from .relay_check import check
from .relay_fleet import fleet
from .relay_init import init
from .relay_status import status
from .relay_tunnels import add, list_, remove

__all__ = ["RELAY_COMMANDS"]

RELAY_COMMANDS: Final = (init, add, remove, list_, check, status, fleet)
