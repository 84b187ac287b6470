"""Metrics and health checks of a gateway: at an address of their own, or in the host's own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Protocol

import trio

from .._async_library import need_trio
from .._model.addresses import Address, UnixAddress, is_loopback
from .._model.errors import InvalidSettingsError
from .._model.stats import TunnelStats
from .._model.status import State, Status
from .address import bound, listen, remove_socket, site_address
from .site import Site, health

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["Source", "collect_metrics", "serve_metrics"]


class Source(Protocol):
    """What has metrics: a `Tunnel`, or a `RemoteAccess`."""

    @property
    def status(self) -> Status:
        """Where it stands now."""

    def stats(self) -> TunnelStats:
        """What it has done and holds."""


async def serve_metrics(
    source: Source,
    address: str | Address | UnixAddress,
    *,
    task_status: trio.TaskStatus[Address | UnixAddress] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve metrics and health checks of a gateway over HTTP, until cancelled. For `nursery.start`.

    `/metrics` has the metrics, and those of this process. `/-/healthy` says 200. `/-/ready` says 200 while the tunnel
    is connected, and 503 otherwise. There is no login. At a loopback address, `/metrics` answers to loopback names
    alone.

    Args:
        source: the tunnel or the remote access.
        address: `host:port`, where port 0 is any free one, or `unix:/path`.
        task_status: reports where it listens.

    Raises:
        ValueError: `address` is none.
        InvalidSettingsError: the package prometheus-client is not installed.
        OSError: it cannot listen there.
        RuntimeError: asyncio is running.
    """
    need_trio("pioneer_tunnel.monitoring.serve_metrics", "collect_metrics, in a registry of your own")
    where = site_address(address)
    families = _gateway_families()
    from .exposition import metrics_page  # noqa: PLC0415  # an extra

    def collect() -> Callable[[], Iterable[Metric]]:
        return partial(families, source.status, source.stats())

    pages = health(lambda: source.status.state is State.CONNECTED, otherwise="the tunnel is not connected")
    pages[b"/metrics"] = metrics_page(collect)
    listeners = await listen(where)
    try:
        task_status.started(bound(where, listeners))
        await Site(pages, local=isinstance(where, UnixAddress) or is_loopback(where.host)).serve(listeners)
    finally:
        remove_socket(where)


def collect_metrics(source: Source) -> Iterable[Metric]:
    """The metric families of a gateway, for the `collect` of a collector in a registry of your own.

    Call it in the thread that runs the tunnel.

    Args:
        source: the tunnel or the remote access.

    Raises:
        InvalidSettingsError: the package prometheus-client is not installed.
    """
    return _gateway_families()(source.status, source.stats())


def _gateway_families() -> Callable[[Status, TunnelStats], Iterable[Metric]]:
    try:
        from .gateway_metrics import gateway_families  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise InvalidSettingsError(
            "metrics need the package prometheus-client: pip install 'pioneer-tunnel[metrics]'"
        ) from error
    return gateway_families
