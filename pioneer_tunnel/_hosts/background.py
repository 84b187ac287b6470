"""What the Trio thread does for a tunnel of another face: it keeps the tunnel open, and serves its visitors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NoReturn, TypeAlias, Unpack, final

import attrs
import trio

from .._model.addresses import LocalAddress, RelayAddress
from .._model.errors import TunnelError
from .._model.keys import RelayKey
from .._model.log_fields import about
from .._net.tls.certificate import Certificate
from ..access.rules import Access
from ..gateway.remote_access import RemoteAccess
from ..transports.tunnel_stream import Handler
from ..tunnel.accepting import accept_visitors, forward_visitors
from ..tunnel.forward import ForwardedHeaders, LocalServers, ProxyProtocol, RequestIds, first_local
from ..tunnel.options import TunnelOptions
from ..tunnel.tunnel import Tunnel, open_tunnel
from ..tunnel.visitor_tls import with_certificate

__all__ = ["Forwards", "Serves", "run_remote_access", "run_tunnel"]

_log: Final = logging.getLogger("pioneer_tunnel.tunnel")


Serves: TypeAlias = Callable[[Tunnel], Handler]
"""Makes the handler of a tunnel's visitors."""


@final
@attrs.frozen
class Forwards:
    """Forwards visitors to a local server, or to that of the service that they want."""

    local: str | LocalAddress | LocalServers
    proxy_protocol: ProxyProtocol | None
    forwarded_headers: ForwardedHeaders | None
    host_header: str | None
    request_id: RequestIds | None
    raw_services: Collection[str]
    access: Access | Mapping[str, Access | None] | None


async def run_tunnel(
    started: Callable[[Tunnel], object],
    relay: str | RelayAddress | Sequence[str | RelayAddress],
    serves: Serves | Forwards | None,
    *,
    key: RelayKey,
    certificate: Certificate | None,
    **options: Unpack[TunnelOptions],
) -> NoReturn:
    """Keep a tunnel open until cancelled, and serve its visitors if `serves` says how.

    When the tunnel fails for good, this goes on: the status says why.
    """
    local, proxy_protocol = (serves.local, serves.proxy_protocol) if isinstance(serves, Forwards) else (None, None)
    if isinstance(local, Mapping):
        options.setdefault("services", local)
    async with (
        open_tunnel(relay, key=key, local=first_local(local), proxy_protocol=proxy_protocol, **options) as tunnel,
        trio.open_nursery() as nursery,
    ):
        started(tunnel)
        if serves is not None:
            try:
                if isinstance(serves, Forwards):
                    await forward_visitors(
                        tunnel,
                        serves.local,
                        nursery,
                        proxy_protocol=proxy_protocol,
                        forwarded_headers=serves.forwarded_headers,
                        host_header=serves.host_header,
                        request_id=serves.request_id,
                        raw_services=serves.raw_services,
                        access=serves.access,
                        certificate=certificate,
                    )
                else:
                    await accept_visitors(
                        tunnel, with_certificate(serves(tunnel), certificate or tunnel.certificates), nursery
                    )
            except TunnelError as error:
                _log.error("the tunnel has failed for good: %s", error, extra=about("tunnel_failed", reason=error))
        await trio.sleep_forever()
    raise AssertionError("it ends only by being cancelled")


async def run_remote_access(started: Callable[[], object], remote_access: RemoteAccess) -> NoReturn:
    """Run `remote_access` until cancelled. Calls `started` after its first status. Goes on when it was stopped."""
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        started()
    await trio.sleep_forever()
    raise AssertionError("it ends only by being cancelled")
