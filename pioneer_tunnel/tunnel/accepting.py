"""Serves each visitor of a tunnel: starts a handler, or forwards it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import trio

from .._model.addresses import LocalAddress
from .._net.tls.certificate import Certificate
from ..access.rules import Access
from ..access_log.writer import AccessLog
from ..transports.tunnel_stream import Handler, TunnelStream
from .forward import ForwardedHeaders, Forwarder, LocalServers, ProxyProtocol, RequestIds, forward, needs_no_task
from .tunnel import Tunnel
from .visitor_tls import with_certificate

__all__ = ["accept_visitors", "forward_visitors"]


async def accept_visitors(tunnel: Tunnel, handler: Handler, nursery: trio.Nursery) -> None:
    """Start `handler` in `nursery` for each visitor, until the tunnel is closed.

    `trio.serve_listeners` does more: it resets a stream whose handler has returned. This is for handlers that close
    their streams themselves, and never raise.

    Raises:
        TunnelError: the tunnel has failed for good.
    """
    await _accept(tunnel, lambda stream: nursery.start_soon(handler, stream))


async def forward_visitors(
    tunnel: Tunnel,
    local: str | LocalAddress | LocalServers,
    nursery: trio.Nursery,
    *,
    proxy_protocol: ProxyProtocol | None,
    forwarded_headers: ForwardedHeaders | None = None,
    host_header: str | None = None,
    request_id: RequestIds | None = None,
    raw_services: Collection[str] = (),
    access: Access | Mapping[str, Access | None] | None = None,
    access_log: AccessLog | None = None,
    certificate: Certificate | None,
) -> None:
    """Forward each visitor until the tunnel is closed, in `nursery`, or without a task where that is possible.

    Args:
        local, proxy_protocol, forwarded_headers, host_header, request_id, raw_services, access, access_log: see
            `forward`.
        nursery: for what takes time.
        certificate: ends visitors' TLS; None for the tunnel's own `certificates`, or where the relay ends it.

    Raises:
        TunnelError: the tunnel has failed for good.
    """
    certificates = certificate or tunnel.certificates
    if needs_no_task(
        certificate=certificates,
        forwarded_headers=forwarded_headers,
        host_header=host_header,
        request_id=request_id,
        access=access,
        access_log=access_log,
    ):
        forwarder = Forwarder(nursery, local, proxy_protocol=proxy_protocol, report=tunnel.report)
        tunnel._divert(forwarder.begin)
        await _accept(tunnel, forwarder.begin)  # those that wait already
        await forwarder.end()
    else:
        handler = partial(
            forward,
            local=local,
            proxy_protocol=proxy_protocol,
            forwarded_headers=forwarded_headers,
            host_header=host_header,
            request_id=request_id,
            raw_services=raw_services,
            access=access,
            access_log=access_log,
            report=tunnel.report,
        )
        await accept_visitors(tunnel, with_certificate(handler, certificates), nursery)


async def _accept(tunnel: Tunnel, take: Callable[[TunnelStream], object]) -> None:
    while True:
        try:
            stream = await tunnel.accept()
        except trio.ClosedResourceError:
            return
        take(stream)
