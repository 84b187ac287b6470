"""A relay process starts its successor, and hands its listening sockets over: a restart that refuses no connection.

    process     starts the same command again. The child inherits the listening sockets, and one end of a socket pair,
                whose descriptor the environment names
    process     sends a line of JSON: which descriptor listens where, and which tunnels are connected
    successor   listens, and answers with a line
    process     drains: it closes its copies of the sockets, which changes nothing for the successor

If the successor fails before it answers, the process goes on as before.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final, final

import attrs
import trio

from .._model.log_fields import about
from .inherited import Inherited
from .spawning import end_child, own_command, spawn

__all__ = ["Handover", "NoSuccessor", "Predecessor", "start_successor"]

VARIABLE: Final = "PIONEER_TUNNEL_HANDOVER"
"""The environment variable with the descriptor of the successor's end of the socket pair."""

START_TIMEOUT: Final = 60.0
"""Seconds that a successor has to start and listen."""

READ_TIMEOUT: Final = 10.0
"""Seconds that it waits for the line, which is there already."""

END_TIMEOUT: Final = 1.0
"""Seconds that a successor that does not listen has to end by itself, so that its exit status says why."""

_READY: Final = b"listening\n"
_log: Final = logging.getLogger("pioneer_tunnel.relay.handover")


@final
class NoSuccessor(Exception):
    """The successor does not listen; the text says why."""


@final
@attrs.frozen(kw_only=True)
class Handover:
    """What a successor needs.

    Attributes:
        descriptors: of the listening sockets, by the name of their address.
        connected: the ids of the tunnels that are connected.
    """

    descriptors: Mapping[str, Sequence[int]]
    connected: Sequence[str]


async def start_successor(handover: Handover, command: Sequence[str] | None = None) -> None:
    """Start a successor and wait until it listens. When cancelled before that, end it.

    Args:
        handover: what it gets.
        command: how to start it; by default as this process was started.

    Raises:
        NoSuccessor: it has not started, has ended, or does not listen in time.
    """
    ours, theirs = socket.socketpair()
    channel = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    async with channel:
        with theirs:
            inherited = [theirs.fileno(), *itertools.chain.from_iterable(handover.descriptors.values())]
            environment = {**os.environ, VARIABLE: str(theirs.fileno())}
            try:
                pid = spawn(command or own_command(), environment, inherited)
            except OSError as error:
                raise NoSuccessor(f"it does not start: {error}") from error
        line = json.dumps({"descriptors": dict(handover.descriptors), "connected": [*handover.connected]})
        listens = False
        try:
            with trio.move_on_after(START_TIMEOUT):
                await channel.send_all(line.encode() + b"\n")
                listens = await channel.receive_some(len(_READY)) == _READY
        except trio.BrokenResourceError:
            pass  # it has ended
        finally:
            status = None if listens else await end_child(pid, END_TIMEOUT)
    if not listens:
        raise NoSuccessor(f"it does not listen, and has ended with status {status}")
    _log.info("the successor, process %d, listens", pid, extra=about("successor_listens"))


@final
class Predecessor:
    """The process that has started this one, seen from here.

    Args:
        channel: our end of the socket pair.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel: Final = channel
        channel.settimeout(READ_TIMEOUT)
        with channel.makefile("rb") as lines:
            message = json.loads(lines.readline())
        self.inherited: Final = Inherited(
            {
                name: [_inherited(descriptor) for descriptor in descriptors]
                for name, descriptors in message["descriptors"].items()
            },
            connected=message["connected"],
        )

    def we_listen(self) -> None:
        """Tell it that this process listens. It drains then."""
        with self._channel:
            try:
                self._channel.sendall(_READY)
            except OSError:
                _log.warning("the process that has started this one is gone", extra=about("predecessor_gone"))

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Predecessor | None:
        """The process that has started this one as its successor; None if there is none. Its variable is removed."""
        descriptor = environment.pop(VARIABLE, None)
        return None if descriptor is None else cls(_inherited(int(descriptor)))


def _inherited(descriptor: int) -> socket.socket:
    inherited = socket.socket(fileno=descriptor)
    inherited.set_inheritable(False)
    return inherited
