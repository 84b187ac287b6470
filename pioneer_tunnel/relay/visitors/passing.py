"""Passing a connection on to another process of this machine: the interface, as the relay uses it.

Several processes may listen at one port, and the kernel decides which of them accepts a connection. Once the tunnel of
a visitor is known, the connection itself is passed to the process that has the tunnel's session. Nothing has been sent
to the visitor then, and TLS has not begun.

A connection is passed on once at most. Who gets one serves it, whatever has happened meanwhile.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, NoReturn, Protocol, final

import trio

from ..._model.addresses import Address
from ..connection import Connection
from ..tunnels import Route
from .visit import Visit

__all__ = ["Passed", "Passing", "Stage", "Way"]


@final
class Stage(enum.IntEnum):
    """What was read of a connection when it is passed on."""

    REQUEST = 0
    """The first bytes of its first request, in clear: at least those that say where it goes."""
    HELLO = 1
    """Its ClientHello."""
    BOUND = 2
    """Nothing: the address that it came to belongs to one service."""
    GATEWAY = 3
    """A gateway's WebSocket request, in clear."""


@final
class Passed(NamedTuple):
    """A connection that another process has accepted.

    Attributes:
        descriptor: of the socket, as it was accepted. Whoever takes it closes it.
        stage: what was read.
        peer: whose it is: the visitor's address, also where a balancer is between; None if it is unknown.
        local: the relay's address that the visitor connected to; None if it is unknown.
        tls: as of `Visit`.
        tunnel, service: of the address, for `BOUND`. A tunnel that names no service has an empty one.
        received: what was read.
    """

    descriptor: int
    stage: Stage
    peer: Address | None
    local: Address | None
    tls: bool | None
    tunnel: str
    service: str
    received: bytes


class Way(Protocol):
    """The way to another process."""

    def send_soon(self, passed: Passed, otherwise: Callable[[Passed], object]) -> None:
        """Pass a connection on at the end of this turn, with others, and close its descriptor here.

        Args:
            passed: the connection, of which at most `READ_SIZE` bytes were read.
            otherwise: called with it if that is not possible. It must not raise or wait. The descriptor is open.
        """


class Passing(Protocol):
    """Passes connections on, and gets those of others. No method waits, but `serve`."""

    def way(self, tunnel_id: str) -> Way | None:
        """The way to the process that has the session that the next visitor of a tunnel goes to.

        None if it goes to a session of this process, or to none, or if there is no way at the moment.
        """

    def pass_visitor(
        self,
        connection: Connection,
        stage: Stage,
        route: Route,
        received: bytes = b"",
        *,
        visit: Visit | None = None,
    ) -> bool:
        """Pass a visitor on if there is a `way`.

        The first call for a connection decides: later ones return False. When it was passed on, nothing may be read
        from it or sent to it any more. The caller closes its own descriptor.

        Args:
            connection: the visitor's.
            stage: what was read.
            route: where the visitor goes.
            received: what was read, and nothing else was.
            visit: whose the connection is, if a balancer may have said that. By default it is the peer's.

        Returns:
            Whether it was passed on.
        """

    def pass_gateway(self, visit: Visit, node: str, received: bytes) -> bool:
        """Pass a gateway on to the process of a node. For the rest see `pass_visitor`."""

    async def serve(
        self, take: Callable[[Passed], object], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Call `take` for each connection that is passed to this process.

        When cancelled, take those that are on the way, and no more.
        """
