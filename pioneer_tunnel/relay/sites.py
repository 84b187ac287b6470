"""What a relay serves its operator: the page, metrics and health checks, at one address or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, final

import trio

from .._model.addresses import UnixAddress, is_loopback
from .._model.certificate_status import CertificateStatus
from .._model.errors import InvalidSettingsError
from ..monitoring.address import SiteAddress, bound, listen, name_of_socket, remove_socket
from ..monitoring.site import Page, Refresh, Site, health
from .config import RelayConfig
from .dashboard.site import Dashboard
from .inherited import Inherited
from .stats import RelayStats

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["Sites", "Told"]


class Told(Protocol):
    """What a relay tells."""

    @property
    def certificates(self) -> Mapping[str, CertificateStatus]:
        """The status of each certificate that it orders, by host."""

    def stats(self) -> RelayStats:
        """What it has done and holds."""


@final
class Sites:
    """The sites of a relay.

    Args:
        relay: whose statistics and certificates they tell.
        config: returns the configuration of now. Its addresses are those of the first one.
        ready: whether the relay takes visitors.
        wall_clock: seconds since 1970.
        refresh: is awaited before the statistics are read, if that takes time; by default they are there.

    Raises:
        InvalidSettingsError: it has metrics, and the package prometheus-client is not installed.
    """

    def __init__(
        self,
        relay: Told,
        config: Callable[[], RelayConfig],
        *,
        ready: Callable[[], bool],
        wall_clock: Callable[[], float],
        refresh: Refresh | None = None,
    ) -> None:
        now = config()
        self._dashboard: Final = None if now.dashboard is None else Dashboard(config, relay.stats, wall_clock, refresh)
        self._pages: Final[dict[SiteAddress, dict[bytes, Page]]] = {}
        self._running: Final = trio.CancelScope()
        self.listeners: Final[dict[str, list[trio.SocketListener]]] = {}
        """The sockets, by the name under which a process inherits them."""
        for address in (now.dashboard, now.metrics):
            if address is not None:
                self._pages[address] = health(ready, otherwise="the relay drains")
        if now.dashboard is not None and self._dashboard is not None:
            self._pages[now.dashboard].update(self._dashboard.pages())
        if now.metrics is not None:
            self._pages[now.metrics][b"/metrics"] = _metrics(relay, refresh)

    async def open(self, inherited: Inherited) -> dict[SiteAddress, SiteAddress]:
        """Listen. Returns where, for each address of the configuration.

        Raises:
            OSError: the system refused; the message names the address.
        """
        found: dict[SiteAddress, SiteAddress] = {}
        try:
            for address in self._pages:
                name = name_of_socket(address)
                self.listeners[name] = await listen(address, inherited.take(name))
                found[address] = bound(address, self.listeners[name])
        except BaseException:
            for address in found:
                for listener in self.listeners[name_of_socket(address)]:
                    listener.socket.close()
                remove_socket(address)
            raise
        return found

    async def serve(self, handed_over: Callable[[], bool]) -> None:
        """Serve, also while the relay drains, until `stop` or until cancelled.

        Args:
            handed_over: whether the files of Unix sockets are a successor's now.
        """
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    if self._dashboard is not None:
                        nursery.start_soon(self._dashboard.take_samples)
                    for address, pages in self._pages.items():
                        site = Site(pages, local=isinstance(address, UnixAddress) or is_loopback(address.host))
                        nursery.start_soon(site.serve, self.listeners[name_of_socket(address)])
        finally:
            if not handed_over():
                for address in self._pages:
                    remove_socket(address)

    def stop(self) -> None:
        """Stop: a successor answers at the same sockets."""
        self._running.cancel()


def _metrics(relay: Told, refresh: Refresh | None) -> Page:
    try:
        from ..monitoring.exposition import metrics_page  # noqa: PLC0415  # an extra
        from .metrics import relay_families  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise InvalidSettingsError(
            "relay.metrics needs the package prometheus-client: pip install 'pioneer-tunnel[metrics]'"
        ) from error

    def collect() -> Callable[[], Iterable[Metric]]:
        return partial(relay_families, relay.stats(), relay.certificates)

    return metrics_page(collect, refresh)
