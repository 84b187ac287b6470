"""Opens a visitor's stream to its gateway: counts the visit, finds the tunnel's session, and waits for one that comes.

The PROXY header that the stream begins with is made here as well, since what it says depends on the session.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple, final

import trio

from ..._model.counters import StreamCounter
from ..._model.services import FIRST_SERVICE
from ..._net.closing import abandon
from ..._net.streams import ByteStream
from ..._wire.proxy_v2 import ProxyHeader
from ..admission import Admission, OverLimit
from ..gateways.expected import Expected
from ..gateways.registry import Directory, GatewayAway, Holder
from ..request_head import Refusal
from ..tunnels import Route
from .visit import Visit

__all__ = ["OPEN_TIMEOUT", "TAKES_NO_VISITORS", "Opened", "StreamOpener"]

OPEN_TIMEOUT: Final = 10.0
"""Seconds for opening a stream to the gateway."""

TAKES_NO_VISITORS: Final = "the gateway takes no visitors at the moment"
_AWAY: Final = "the gateway has lost its connection; try again in a moment"


class Opened(NamedTuple):
    """A stream to a gateway.

    Attributes:
        route: where it leads.
        stream: the stream.
        header: the PROXY header that it begins with.
        counter: counts the streams of its service.
    """

    route: Route
    stream: ByteStream
    header: bytes
    counter: StreamCounter


@final
class StreamOpener:
    """Opens visitors' streams.

    Args:
        directory: the session of each tunnel.
        admission: counts the visits of each tunnel.
        expected: visitors of these tunnels wait.

    Attributes:
        opening: visitors whose tunnel is known, and that have no stream to its gateway yet.
    """

    def __init__(self, directory: Directory, admission: Admission, expected: Expected) -> None:
        self._directory: Final = directory
        self._admission: Final = admission
        self._expected: Final = expected
        self.opening: int = 0

    async def open(self, visit: Visit, route: Route, source: str | None = None) -> Opened:
        """Count the visitor, and open a stream for it. The tunnel's visit has to be ended after that.

        Args:
            visit: whose.
            route: where to.
            source: counts as a connection of that address; None if the connection is counted already.

        Raises:
            Refusal: the gateway is not connected, does not serve this service, or takes no stream within
                `OPEN_TIMEOUT`; or a limit is exceeded.
        """
        try:
            visit.settle()
            self._admission.begin_visit(route.entry.id, trio.current_time(), source=source)
        except OverLimit as over:
            raise Refusal(503, str(over), reason=over.reason) from None
        try:
            return await self._open(visit, route)
        except BaseException:
            self._admission.end_visit(route.entry.id, source=source)
            raise

    def open_nowait(self, visit: Visit, route: Route) -> Opened | None:
        """Like `open`; None if that is not possible at once, or not at all."""
        try:
            session = self._directory.find_nowait(route.entry.id)
            if session is None:
                return None
            header = _proxy_header(visit, _name_for(route, session.services))
            visit.settle()
            self._admission.begin_visit(route.entry.id, trio.current_time())
        except (trio.WouldBlock, OverLimit, Refusal):
            return None
        try:
            return Opened(route, session.open_stream_nowait(), header, self._admission.counts.streams_of(route))
        except (trio.WouldBlock, trio.BrokenResourceError):
            self._admission.cancel_visit(route.entry.id)  # `open` counts the visitor again
            return None

    async def _find(self, tunnel_id: str) -> Holder | None:
        """The holder of a tunnel; waits for it where it is expected, also if it is lost at this moment."""
        if not await self._expected.wait(tunnel_id):
            found = await self._directory.find(tunnel_id)
            if found is not None or not await self._expected.wait(tunnel_id):
                return found
        return await self._directory.find(tunnel_id)

    async def _open(self, visit: Visit, route: Route) -> Opened:
        tried: list[Holder] = []
        self.opening += 1
        try:
            with trio.move_on_after(OPEN_TIMEOUT):
                while (session := await self._find(route.entry.id)) is not None and session not in tried:
                    try:
                        stream = await session.open_stream()
                    except GatewayAway as away:
                        retry_after = ("Retry-After", str(away.retry_after))
                        raise Refusal(503, _AWAY, headers=[retry_after], reason="gateway_away") from None
                    except trio.BrokenResourceError:
                        tried.append(session)  # it just ended or was retired: look for another one
                        continue
                    try:
                        # Not earlier: a gateway that comes back may offer other services.
                        header = _proxy_header(visit, _name_for(route, session.services))
                        return Opened(route, stream, header, self._admission.counts.streams_of(route))
                    except Refusal:
                        await abandon(stream)
                        raise
                raise Refusal(503, "the gateway is not connected", reason="gateway_away")
            raise Refusal(504, TAKES_NO_VISITORS, reason="gateway_timeout")
        finally:
            self.opening -= 1


def _name_for(route: Route, served: Collection[str] | None) -> str | None:
    """The name of the route's service in a header for a gateway that takes visitors of `served`; None for no name.

    Raises:
        Refusal: the gateway takes no visitors of it. An older gateway would hand them all to the same local server.
    """
    if served is not None and route.service in served:
        return route.service
    if route.first and (served is None or FIRST_SERVICE in served):
        return None
    raise Refusal(503, "the gateway does not serve this service", reason="service_away")


def _proxy_header(visit: Visit, service: str | None) -> bytes:
    return ProxyHeader(visitor=visit.visitor, local=visit.local, tls=visit.tls, service=service).encode()
