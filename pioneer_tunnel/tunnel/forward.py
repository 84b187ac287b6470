"""Connects a visitor's stream to the local gateway: dials it, and pumps the bytes.

On request it tells the gateway who visits: by a PROXY header, or by headers in each HTTP request.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, final

import attrs
import trio

from .._async_library import need_trio
from .._model.addresses import HttpsAddress, LocalAddress, local_address
from .._model.callbacks import nothing
from .._model.errors import LocalGatewayError
from .._model.log_fields import about
from .._model.services import FIRST_SERVICE
from .._net.closing import abandon
from .._net.dialing import Attempt, Dialer, begin_dial_local, dial_local, dial_tcp, secure_local
from .._net.log_limiter import LogLimiter
from .._net.streams import ByteStream
from .._net.tcp import TcpStream
from .._wire.proxy_v2 import ProxyHeader
from ..access.rules import Access
from ..access_log.writer import AccessLog
from ..exchange.carrier import Carrier
from ..exchange.pump import Pump, pump
from ..transports.interface import LocalDialFailed, LocalDialOk, Report, VisitorRefused
from ..transports.tunnel_stream import TunnelStream

if TYPE_CHECKING:
    from .requests import Requests

__all__ = [
    "ForwardedHeaders",
    "Forwarder",
    "LocalServers",
    "ProxyProtocol",
    "RequestIds",
    "first_local",
    "forward",
    "needs_no_task",
    "probe_local",
]

ProxyProtocol: TypeAlias = Literal["v2"]
ForwardedHeaders: TypeAlias = Literal["set"]
RequestIds: TypeAlias = Literal["set", "keep"]
LocalServers: TypeAlias = Mapping[str, str | LocalAddress]
"""The local server of each service, by name."""

LOCAL_TIMEOUT: Final = 10.0

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.forward"))


async def probe_local(
    local: LocalAddress, *, dial: Dialer = dial_tcp, proxy_protocol: ProxyProtocol | None = None
) -> None:
    """Connect to the gateway at `local` as for a visitor, and close the connection at once.

    Args:
        local: where the gateway listens.
        dial: makes the connection.
        proxy_protocol: what `forward` is called with. A gateway with TLS gets a PROXY header before it, too.

    Raises:
        LocalGatewayError: it does not answer within 10 seconds, or its TLS fails, or `dial` fails in any other way.
    """
    header = b""
    if proxy_protocol == "v2" and isinstance(local, HttpsAddress):
        header = ProxyHeader(visitor=None).encode()
    try:
        connection = await _connect(local, header, dial)
    except LocalGatewayError:
        raise
    except Exception as error:
        # A host's own `dial` may raise anything. A probe must never end the tunnel.
        raise LocalGatewayError(f"the local gateway at {local} cannot be dialled: {type(error).__name__}") from error
    await connection.aclose()


async def forward(
    stream: TunnelStream,
    local: str | LocalAddress | LocalServers,
    *,
    proxy_protocol: ProxyProtocol | None = None,
    forwarded_headers: ForwardedHeaders | None = None,
    host_header: str | None = None,
    request_id: RequestIds | None = None,
    raw_services: Collection[str] = (),
    access: Access | Mapping[str, Access | None] | None = None,
    access_log: AccessLog | None = None,
    report: Report = nothing,
    dial: Dialer = dial_tcp,
) -> None:
    """Connect `stream` to the gateway at `local` and carry bytes both ways until both have ended.

    To the gateway the connection looks local: it comes from this host. With `proxy_protocol="v2"` it begins with a
    PROXY protocol v2 header that names the visitor. The gateway has to expect that header.

    With `forwarded_headers`, `host_header` or `request_id`, visitors have to speak HTTP/1, in clear at this point, and
    each request reaches the gateway with changed headers. A request that cannot be followed is answered with 400 or
    431, and not passed on. After the 101 of a WebSocket the bytes pass unchanged; other upgrades are not offered to the
    gateway.

    When the gateway does not answer within 10 seconds, the visitor is reset. Returns when the visitor's connection is
    over, whether it went well or not. When cancelled, it resets both ends.

    Args:
        stream: the visitor's stream.
        local: where the gateway listens: an address, or the text of one: `host:port`, `unix:/path/to/socket`, or
            `https://host:port` for TLS, whose certificate is verified. If this process is killed, the kernel resets
            its TCP connections; a Unix socket cannot be reset, so the gateway sees EOF instead. Or a mapping from the
            names of services to such addresses: a `Services`, for example. A stream whose `service` is None goes to the
            address of the empty name, or else to the first one. The visitor of a service that is not in it is reset.
        proxy_protocol: `"v2"` for a PROXY header; None for none (default). It comes before TLS.
        forwarded_headers: `"set"` sets X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, X-Real-IP and Forwarded
            from what the relay says of the visitor, and removes the visitor's own. What the relay does not say is not
            set. None (default) passes the visitor's own.
        host_header: the Host that the gateway gets, such as `localhost:3000`; None (default) for the visitor's.
        request_id: `"set"` gives each request a new `X-Request-ID`, in place of the visitor's. `"keep"` keeps the
            visitor's, if it has at most 128 letters, digits and `._:+=/-`: where a proxy in front of the relay sets it.
            None (default) passes it on.
        raw_services: the names of services that are not HTTP. Their bytes pass unchanged.
        access: who may reach the gateway. Nothing of a request reaches it before it is let through, each request of a
            connection by itself; others are answered here. Of a visitor in another protocol, the address alone is
            checked. Or a mapping from the names of services to such rules, and from `*` to those of all others; the
            visitor of a service that it does not have is reset. None (default) admits everybody.
        access_log: gets a line for each request, or for each stream in which no request is found. None (default) for
            none. Its `kept` has to be entered.
        report: gets an event that says whether the gateway answered; of several services, only about the one to which
            streams without a name go.
        dial: makes the connection, unless `local` is a Unix socket.

    Raises:
        ValueError: `local` is the text of no address, or `host_header` is no host, or `access` wants a password or a
            token from the visitors of a service that is not HTTP.
    """
    need_trio("pioneer_tunnel.forward", "pioneer_tunnel.aio.open_tunnel(..., forward_to=...)")
    forwarding = _Forwarding(local, proxy_protocol, report, dial)
    server, name = forwarding.server_for(stream), forwarding.service_of(stream)
    requests: Requests | str | None = "unknown_service"
    if server is not None:
        requests = None
        if any(each is not None for each in (forwarded_headers, host_header, request_id, access, access_log)):
            from .requests import requests_of  # noqa: PLC0415  # it imports much, and most visitors do not need it

            requests = requests_of(
                stream,
                name,
                forwarded_headers=forwarded_headers,
                host_header=host_header,
                request_id=request_id,
                raw=name in raw_services,
                only_service=not forwarding.serves_several,
                access=access,
                access_log=access_log,
                report=report,
            )
    if server is None or isinstance(requests, str):
        report(VisitorRefused(str(requests)))
        stream.reset()
    else:
        await forwarding.run(stream, server, requests=requests)


_Server: TypeAlias = tuple[LocalAddress, Report]
"""A local server, and what to report on it to."""


@final
class _Forwarding:
    """How visitors are forwarded. See `forward`."""

    __slots__ = ("_sends_header", "_server", "_services", "dial", "report")

    def __init__(
        self,
        local: str | LocalAddress | LocalServers,
        proxy_protocol: ProxyProtocol | None,
        report: Report,
        dial: Dialer,
    ) -> None:
        self._services: Final[LocalServers] = local if isinstance(local, Mapping) else {}
        self._server: Final = None if isinstance(local, Mapping) else (local_address(local), report)
        self.report: Final = report
        self._sends_header: Final = proxy_protocol == "v2"
        self.dial: Final = dial

    @property
    def serves_several(self) -> bool:
        """Whether it has a server for each service."""
        return self._server is None

    def service_of(self, stream: TunnelStream) -> str:
        """The name of the service that a visitor wants."""
        return stream.service or _first_service(self._services)

    def server_for(self, stream: TunnelStream) -> _Server | None:
        """Where a visitor goes, and what reports on that server; None, and a line in the log, if there is no server."""
        if self._server is not None:
            return self._server
        services, name = self._services, self.service_of(stream)
        if name in services:
            return local_address(services[name]), self.report if name == _first_service(services) else nothing
        line = f"there is no local server for the service {name!r}"
        _log_limiter.log(("service", name), line, about=about("unknown_service", service=name))
        return None

    def header(self, stream: TunnelStream) -> bytes:
        """The PROXY header for a visitor; b"" where there is none."""
        if not self._sends_header:
            return b""
        # The name of a service is between the relay and this gateway.
        return attrs.evolve(stream.proxy_header, service=None).encode()

    async def run(
        self,
        stream: TunnelStream,
        server: _Server,
        attempt: Attempt | None = None,
        *,
        requests: Requests | None = None,
    ) -> None:
        """Forward `stream` to its end.

        Args:
            server: from `server_for`.
            attempt: the connection to it, if that has begun.
            requests: carries it, if more is done than to pass its bytes on.
        """
        connect = partial(self._connect, stream, server, attempt)
        try:
            if requests is not None:
                await requests.carry(connect)
            elif (connection := await connect()) is not None:
                await pump(stream, connection)
        except Exception as error:  # noqa: BLE001  # it must not affect other visitors
            _log_unforeseen(error)
        finally:
            stream.reset()  # does nothing after a graceful end

    async def _connect(self, stream: TunnelStream, server: _Server, attempt: Attempt | None) -> ByteStream | None:
        local, report = server
        try:
            connection = await _connect(local, self.header(stream), self.dial, attempt)
        except LocalGatewayError as error:
            fields = about("local_unavailable", service=stream.service, peer=local, reason=error)
            _log_limiter.log(local, f"{error}; a visitor was turned away", about=fields)
            report(LocalDialFailed(str(error)))
            if report is not self.report:  # else that says it
                self.report(VisitorRefused("local_unavailable"))
            return None
        report(LocalDialOk())
        return connection


def needs_no_task(
    *,
    certificate: object,
    forwarded_headers: ForwardedHeaders | None = None,
    host_header: str | None = None,
    request_id: RequestIds | None = None,
    access: Access | Mapping[str, Access | None] | None = None,
    access_log: AccessLog | None = None,
) -> bool:
    """Whether a `Forwarder` does all that is to be done for visitors: their bytes pass unchanged and unread.

    Args:
        certificate: what ends visitors' TLS; None where nothing does.
        forwarded_headers, host_header, request_id, access, access_log: see `forward`.
    """
    rules = access.values() if isinstance(access, Mapping) else (access,)
    changes = (forwarded_headers, host_header, request_id, access_log, *rules)
    return certificate is None and all(each is None for each in changes)


@final
class Forwarder:
    """Forwards visitors as `forward` does, but without a task for those that need none.

    Args:
        tasks: a nursery for what takes time. When it is cancelled, both ends of all visitors are reset.
        local, proxy_protocol, report, dial: see `forward`.
    """

    def __init__(
        self,
        tasks: trio.Nursery,
        local: str | LocalAddress | LocalServers,
        *,
        proxy_protocol: ProxyProtocol | None,
        report: Report,
        dial: Dialer = dial_tcp,
    ) -> None:
        self._tasks: Final = tasks
        self._context: Final = copy_context()  # visitors may come in a task of another session
        self._forwarding: Final = _Forwarding(local, proxy_protocol, report, dial)
        self._carrier: Final = Carrier(_log_unforeseen)
        self._carrying: Final = trio.CancelScope()
        self._visitors = 0
        self._no_visitors: Final = trio.lowlevel.ParkingLot()
        tasks.start_soon(self._carry)

    async def _carry(self) -> None:
        with self._carrying:
            await self._carrier.run()

    async def end(self) -> None:
        """Wait until no visitor is left, and leave no task in the nursery. The caller has the deadline."""
        while self._visitors:
            await self._no_visitors.park()
        self._carrying.cancel()

    def begin(self, stream: TunnelStream, after: Callable[[TunnelStream], object] = nothing) -> None:
        """Forward `stream`, and call `after` with it when that is over. It does not wait."""
        over = _End(self, stream, after).come
        self._visitors += 1
        try:
            server = self._forwarding.server_for(stream)
            if server is None:
                self._forwarding.report(VisitorRefused("unknown_service"))
                over()
            else:
                self._begin(stream, server, over)
        except Exception as error:  # noqa: BLE001  # as above
            _log_unforeseen(error)
            over()

    def note_left(self) -> None:
        """Count a visitor who has left. For `_End`."""
        self._visitors -= 1
        if not self._visitors and self._no_visitors:
            self._no_visitors.unpark_all()

    def _begin(self, stream: TunnelStream, server: _Server, over: Callable[[], object]) -> None:
        forwarding, (local, report) = self._forwarding, server
        header = forwarding.header(stream)
        attempt = None
        if self._carrier.running and not isinstance(local, HttpsAddress):
            attempt = begin_dial_local(local, dial=forwarding.dial)
        connected = None if attempt is None else attempt.at_once()
        if connected is None:
            self._start(self._run, stream, server, attempt, over)
            return
        connection = TcpStream(connected, resets=True)
        try:
            report(LocalDialOk())
        except BaseException:
            connection.reset()
            raise
        pump = Pump(connection, stream, preface=header)
        if self._carrier.takes(pump):
            self._carrier.carry(pump, over)
        else:
            self._start(self._pump, pump, over)

    def _start(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._context.run(self._tasks.start_soon, task, *arguments)

    async def _run(
        self, stream: TunnelStream, server: _Server, attempt: Attempt | None, over: Callable[[], object]
    ) -> None:
        try:
            await self._forwarding.run(stream, server, attempt)
        finally:
            over()

    async def _pump(self, pump: Pump, over: Callable[[], object]) -> None:
        try:
            await pump.run()
        except Exception as error:  # noqa: BLE001  # as above
            _log_unforeseen(error)
        finally:
            over()


@final
class _End:
    """What a `Forwarder` does when a visitor is gone. A closure would take twice the memory, for each visitor."""

    __slots__ = ("_after", "_forwarder", "_stream")

    def __init__(self, forwarder: Forwarder, stream: TunnelStream, after: Callable[[TunnelStream], object]) -> None:
        self._forwarder: Final = forwarder
        self._stream: Final = stream
        self._after: Final = after

    def come(self) -> None:
        self._stream.reset()  # does nothing after a graceful end
        self._forwarder.note_left()
        self._after(self._stream)


def first_local(local: str | LocalAddress | LocalServers | None) -> str | LocalAddress | None:
    """The local server that gets streams without a service; None when there is none."""
    return local.get(_first_service(local)) if isinstance(local, Mapping) else local


def _first_service(services: LocalServers) -> str:
    return FIRST_SERVICE if FIRST_SERVICE in services else next(iter(services), FIRST_SERVICE)


def _log_unforeseen(error: Exception) -> None:
    fields = about("unforeseen", reason=type(error).__name__)
    line = "a visitor could not be forwarded"
    _log_limiter.log("unforeseen", line, level=logging.ERROR, error=error, about=fields)


async def _connect(local: LocalAddress, header: bytes, dial: Dialer, attempt: Attempt | None = None) -> ByteStream:
    connection = await dial_local(local, dial=dial, timeout=LOCAL_TIMEOUT, attempt=attempt)
    if header:
        try:
            await connection.send_all(header)
        except trio.BrokenResourceError:
            pass  # the pump, or the TLS handshake, gets the same error and handles it
        except BaseException:
            await abandon(connection)
            raise
    if isinstance(local, HttpsAddress):
        return await secure_local(connection, local, timeout=LOCAL_TIMEOUT)
    return connection
