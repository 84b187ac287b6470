"""Tells a supervisor of changes of the network."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

from .._model.log_fields import about
from .._net.dialing import Dialer, dial_tcp
from .._net.log_limiter import LogLimiter
from .._net.network_changes import WatchNetwork, watch_network
from ..transports.interface import Target
from .supervisor import Supervisor

__all__ = ["chosen_watch", "follow_network"]

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.network"))


def chosen_watch(watch: WatchNetwork | None, dial: Dialer) -> WatchNetwork | None:
    """`watch`, or by default what watches this system's network, if `dial` uses it."""
    return watch_network if watch is None and dial is dial_tcp else watch


async def follow_network(watch: WatchNetwork | None, supervisor: Supervisor, target: Target) -> None:
    """Let each change of the network check the link. A `watch` that fails costs only that, and the log says so."""
    if watch is None:
        return

    def changed(what: str) -> None:
        fields = about("network_changed", reason=what)
        line = f"{what}: checking the way to the relay"
        _log_limiter.log("changed", line, level=logging.INFO, about=fields)
        supervisor.network_changed()

    def relay_addresses() -> Collection[str]:
        return target.redial.addresses

    try:
        await watch(changed, relay_addresses)
    except Exception as error:  # noqa: BLE001  # a tunnel works without it
        line = "changes of the network are not noticed any more"
        fields = about("unforeseen", reason=type(error).__name__)
        _log_limiter.log("failed", line, level=logging.ERROR, error=error, about=fields)
