"""A tunnel for programs without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Final, Self, Unpack, final

import trio

from .._hosts.background import Forwards, run_tunnel
from .._hosts.trio_thread import Stopped, at_once
from .._model.addresses import LocalAddress, RelayAddress
from .._model.keys import RelayKey
from .._model.stats import TunnelStats
from .._model.status import Status
from .._net.tls.certificate import Certificate
from ..access.rules import Access
from ..tunnel import tunnel as trio_face
from ..tunnel.forward import ForwardedHeaders, LocalServers, ProxyProtocol, RequestIds
from ..tunnel.options import TunnelOptions
from .runner import OnStatus, Runner

__all__ = ["Tunnel", "open_tunnel"]


@final
class Tunnel:
    """A tunnel that runs in a thread of its own, until `close`. Made by `open_tunnel`."""

    def __init__(self, opened: list[trio_face.Tunnel]) -> None:
        self._runner: Final = Runner(lambda: opened[0]._feed)
        self._opened: Final = opened

    @property
    def _tunnel(self) -> trio_face.Tunnel:
        return self._opened[0]

    @property
    def status(self) -> Status:
        """Where the tunnel stands now."""
        return self._tunnel.status

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._tunnel.history

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._tunnel.history_dropped

    @property
    def public_url(self) -> str | None:
        """The URL for visitors, as the relay reports it; None before the first connect."""
        return self._tunnel.public_url

    def watch(self) -> Iterator[Status]:
        """The status now, then the newest after each change; ends after `close`. Slow watchers skip, never block."""
        return self._runner.watch()

    def wait_connected(self, timeout: float | None = None) -> Status:
        """Wait until the tunnel is up.

        Args:
            timeout: seconds; None (default) waits for as long as it takes.

        Raises:
            TunnelError: the tunnel has failed for good.
            TimeoutError: it is not up in time. It goes on trying.
            RuntimeError: it was closed.
        """
        try:
            return self._runner.call(self._tunnel.wait_connected, timeout)
        except trio.ClosedResourceError as error:
            raise Stopped(str(error)) from None

    def stats(self) -> TunnelStats:
        """What it has done and holds, as of now; see `pioneer_tunnel.Tunnel.stats`."""
        return self._runner.call(partial(at_once, self._tunnel.stats))

    def drain(self, grace: float = trio_face.STOP_GRACE) -> None:
        """Stop in order: take no more visitors, wait until those who are there have gone, and disconnect.

        See `pioneer_tunnel.Tunnel.drain`. `close` ends the thread.

        Args:
            grace: seconds that visitors have (default 5).
        """
        self._runner.call(partial(self._tunnel.drain, grace))

    def retry_now(self) -> None:
        """Retry now, if the tunnel waits before a retry; if it is up, check the link. See `pioneer_tunnel.Tunnel`."""
        self._runner.soon(self._tunnel.retry_now)

    def close(self) -> None:
        """Close it: say goodbye to the relay, for a second at most, and end the thread. Closing twice is closing once.

        What a bug in the tunnel's own task has raised comes out.
        """
        self._runner.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._tunnel)


def open_tunnel(
    relay: str | RelayAddress | Sequence[str | RelayAddress],
    *,
    key: RelayKey,
    forward_to: str | LocalAddress | LocalServers | None,
    proxy_protocol: ProxyProtocol | None = None,
    forwarded_headers: ForwardedHeaders | None = None,
    host_header: str | None = None,
    request_id: RequestIds | None = None,
    raw_services: Collection[str] = (),
    access: Access | Mapping[str, Access | None] | None = None,
    certificate: Certificate | None = None,
    on_status: OnStatus | None = None,
    **options: Unpack[TunnelOptions],
) -> Tunnel:
    """Open a tunnel to `relay`, in a thread of its own. Close it by `Tunnel.close`, or use it in a `with`.

    It returns without waiting for the relay (`Tunnel.wait_connected` waits). When the tunnel fails for good, the thread
    goes on: `Tunnel.status` says why, and `Tunnel.wait_connected` raises. A tunnel that is never closed does not keep
    the process: it is closed when the interpreter exits.

    After a fork it belongs to the parent process. A server that forks its workers opens it in one of them.

    Args:
        relay: as for `pioneer_tunnel.open_tunnel`.
        key: as there.
        forward_to: the local server, which gets the visitors' connections: `host:port`, `unix:/path/to/socket`,
            `https://host:port`, or an address; or a mapping of services to such, for example a `Services`. It is also
            what the status reports on, as `local` and `services` are there. None serves no visitors: they wait.
        proxy_protocol: `"v2"` for a PROXY header before each of these connections; None for none (default).
        forwarded_headers: `"set"` for headers that name the visitor in each HTTP request, as for
            `pioneer_tunnel.forward`; None for none (default).
        host_header: the Host that the local server gets; None (default) for the visitor's.
        request_id: `"set"` or `"keep"` for an X-Request-ID in each HTTP request, as for `forward`; None (default) for
            none.
        raw_services: the names of services that are not HTTP, whose bytes pass unchanged.
        access: who may reach the local server, as for `pioneer_tunnel.forward`; None (default) admits everybody.
        certificate: ends visitors' TLS, where the relay passes it through; None (default) where the relay ends it.
        on_status: gets the status at the start, and the newest after each change, in a thread of its own; a function,
            or the `put` of a queue. What it raises is logged.
        **options: as for `pioneer_tunnel.open_tunnel`. Functions among them are called in the Trio thread.

    Raises:
        InvalidSettingsError: an address, identity, key or file that cannot be used.
        UnsupportedTransportError: there is no transport of that name, or the WebSocket engine is not installed.
    """
    opened: list[trio_face.Tunnel] = []
    tunnel = Tunnel(opened)
    serves = (
        None
        if forward_to is None
        else Forwards(forward_to, proxy_protocol, forwarded_headers, host_header, request_id, raw_services, access)
    )

    async def run(started: Callable[[], None]) -> None:
        def note(trio_tunnel: trio_face.Tunnel) -> None:
            opened.append(trio_tunnel)
            started()

        await run_tunnel(note, relay, serves, key=key, certificate=certificate, **options)

    tunnel._runner.start(run, on_status)
    return tunnel
