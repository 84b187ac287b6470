"""Serves connections that other processes have accepted: visitors of another worker, gateways of another node."""

from __future__ import annotations

import os
import socket
from contextvars import Context
from functools import partial
from typing import Final, final

import trio

from .._net.adopted import watch
from .._net.closing import abandon
from .._net.streams import ByteStream
from .._net.tcp import TcpStream
from .._net.turn import Turn
from .accept_loop import admit
from .addresses import Listening
from .admission import Admission, OverLimit
from .connection import Connection
from .gateways.endpoint import GatewayEndpoint
from .gateways.other_nodes import PassedGateway
from .routing import Router
from .visitors.passing import Passed, Stage

__all__ = ["PassedConnections"]


@final
class PassedConnections:
    """They are under the limits of this process. The other one counts them as accepted.

    Args:
        admission: counts them.
        listening: knows the routes with an address of their own.
        router: serves visitors, and gateways that are passed with their socket.
        gateways: serves gateways whose bytes another node carries.
    """

    def __init__(self, admission: Admission, listening: Listening, router: Router, gateways: GatewayEndpoint) -> None:
        self._admission: Final = admission
        self._listening: Final = listening
        self._router: Final = router
        self._gateways: Final = gateways

    def take(self, connections: trio.Nursery, context: Context, turn: Turn, passed: Passed) -> None:
        """Serve a connection whose socket another process has passed. Does not wait.

        Args:
            connections: the nursery of connections.
            context: of its task.
            turn: knows the time.
            passed: the connection. It is closed if this raises.

        Raises:
            OSError: its descriptor is no socket's.
        """
        try:
            # Said, since otherwise the kernel is asked for both.
            accepted = socket.socket(type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, fileno=passed.descriptor)
        except OSError:
            os.close(passed.descriptor)
            raise
        try:
            accepted.setblocking(False)
            now = turn.started or turn.now()
            connection = Connection(accepted, passed.peer, passed.local, connections, context)
            connection.begin(TcpStream(accepted, resets=True, now=now))
            connection.may_pass = False
            bound, gateway = passed.stage is Stage.BOUND, passed.stage is Stage.GATEWAY
            route = self._listening.route_of(passed.tunnel, passed.service or None) if bound else None
            handler = partial(self._router.begin_passed, passed, route)
            admit(connection, self._admission, handler, now, only_visitors=not gateway, passed=True)
        except BaseException:
            accepted.close()
            raise

    async def serve_gateway(self, stream: ByteStream, passed: PassedGateway) -> None:
        """Serve a gateway's connection that came to another node."""
        watched, peer = watch(stream), passed.peer
        with trio.CancelScope() as scope:
            try:
                host = None if peer is None else peer.host
                arrival = self._admission.arrive(host, trio.current_time(), scope.cancel, passed=True)
            except OverLimit as reason:
                self._admission.counts.refused(reason.reason)
                await abandon(stream)
                return
            try:
                await self._gateways.serve_request(
                    watched, watched, arrival, certificate=passed.certificate, peer=passed.peer
                )
            finally:
                arrival.leave()
                await abandon(stream)
