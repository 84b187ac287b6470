"""The extension `heartbeat`: the gateway asks for a shorter heartbeat than the relay's.

    relay    {"min_ms": N, "max_ms": N}    what a gateway may ask for; `max_ms` is the relay's own heartbeat
    gateway  {"ms": N}
    relay    {}                            `heartbeat_ms` of the welcome is what the gateway asked for

Without it both ends use `heartbeat_ms` of the welcome. A gateway may still ping more often on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .messages import Choose, Message

__all__ = ["HEARTBEAT", "agreed_heartbeat", "choose_heartbeat", "offer_heartbeat"]

HEARTBEAT: Final = "heartbeat"
"""Its name."""

DEFAULT_HEARTBEAT_MS: Final = 15_000
MIN_HEARTBEAT_MS: Final = 1_000
MAX_HEARTBEAT_MS: Final = 60_000


def offer_heartbeat(heartbeat_ms: int) -> Mapping[str, Any]:
    """What a relay says in the challenge.

    Args:
        heartbeat_ms: the relay's own.
    """
    return {"min_ms": MIN_HEARTBEAT_MS, "max_ms": heartbeat_ms}


def choose_heartbeat(heartbeat: float | None) -> Choose:
    """How a gateway chooses.

    Args:
        heartbeat: what it wants, in seconds; None for the relay's own.
    """

    def choose(offered: Message) -> Mapping[str, Any] | None:
        least, most = offered.number("min_ms"), offered.number("max_ms")
        wanted = None if heartbeat is None else round(max(heartbeat * 1000, least))
        return None if wanted is None or wanted >= most else {"ms": wanted}

    return choose


def agreed_heartbeat(chosen: Mapping[str, Message], heartbeat_ms: int) -> int:
    """The heartbeat of the session, in milliseconds: what the gateway asks for, within what was offered.

    Args:
        chosen: the extensions that the gateway chooses.
        heartbeat_ms: the relay's own.

    Raises:
        RemoteProtocolError: the gateway's words are malformed.
    """
    if HEARTBEAT not in chosen:
        return heartbeat_ms
    return min(max(round(chosen[HEARTBEAT].number("ms")), MIN_HEARTBEAT_MS), heartbeat_ms)
