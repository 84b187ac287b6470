"""Listening sockets that this process did not open: they come from the relay process before it, or from systemd.

Such a socket was never closed in between. So no connection was refused meanwhile, and none in its accept queue is lost.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Final, final

from .._model.addresses import Address
from .._model.log_fields import about

__all__ = ["Inherited", "from_systemd"]

FIRST_DESCRIPTOR: Final = 3
"""The first one that systemd passes, see sd_listen_fds(3)."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.inherited")


@final
class Inherited:
    """The sockets, by the addresses that they listen at, as the configuration writes them. See `listeners.name_of`.

    Args:
        sockets: the sockets.
        connected: the ids of the tunnels that were connected to the process before.
    """

    def __init__(
        self, sockets: Mapping[str, Sequence[socket.socket]] | None = None, *, connected: Collection[str] = ()
    ) -> None:
        self.connected: Final = frozenset(connected)
        self._sockets: Final = dict(sockets or {})

    def add(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Have these for an address, too."""
        self._sockets[name] = sockets

    def take(self, name: str) -> Sequence[socket.socket]:
        """The sockets for an address, which the caller closes; empty when there are none."""
        return self._sockets.pop(name, ())

    def close_rest(self) -> None:
        """Close the sockets that were not taken: the configuration has changed."""
        for name, sockets in self._sockets.items():
            fields = about("socket_unused", peer=name)
            _log.warning("nothing listens at %s any more: the configuration does not name it", name, extra=fields)
            for left in sockets:
                left.close()
        self._sockets.clear()


def from_systemd(environment: MutableMapping[str, str] = os.environ) -> Inherited:
    """The sockets of a systemd `.socket` unit, see sd_listen_fds(3). Their variables are removed."""
    for_us = environment.pop("LISTEN_PID", "") == str(os.getpid())
    amount = environment.pop("LISTEN_FDS", "0")
    environment.pop("LISTEN_FDNAMES", None)
    sockets: dict[str, list[socket.socket]] = {}
    if for_us and amount.isdecimal():
        for descriptor in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(amount)):
            listening = socket.socket(fileno=descriptor)
            listening.set_inheritable(False)
            bound = listening.getsockname()
            name = str(Address.of_socket(bound) if isinstance(bound, tuple) else bound)  # a Unix socket has a path
            sockets.setdefault(name, []).append(listening)
    return Inherited(sockets)
