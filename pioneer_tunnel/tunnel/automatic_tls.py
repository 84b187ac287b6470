"""Certificates that a gateway orders for the hosts of its tunnel, where the relay passes TLS through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import trio

from .._model.addresses import PublicUrl, is_ip_address
from .._model.services import MOST_SERVICES
from .._model.status import State, Status
from .status_feed import StatusFeed

if TYPE_CHECKING:
    from ..certificates.keeper import AcmeCertificates

__all__ = ["keep_certificates"]


async def keep_certificates(certificates: AcmeCertificates, feed: StatusFeed) -> NoReturn:
    """Order and renew certificates for the hosts that the statuses name, and publish how that goes, until cancelled.

    While the tunnel is down, nothing is ordered: the authority would not find us.
    """

    def publish() -> None:
        feed.note_certificates(certificates.status)

    certificates.on_change = publish
    try:
        async with trio.open_nursery() as nursery:
            certificates.set_reachable(False)
            nursery.start_soon(certificates.run)
            async for status in feed.watch():
                certificates.set_reachable(status.state is State.CONNECTED)
                if status.public_url is not None:
                    certificates.want([*_hosts(status)][:MOST_SERVICES])
            # No deadline: the caller cancels it.
            await trio.sleep_forever()
    finally:
        feed.note_certificates(None)
    raise AssertionError("it ends only by being cancelled")


def _hosts(status: Status) -> Iterator[str]:
    """The hosts whose visitors come with TLS. What the relay says is not trusted to be well-formed."""
    of_links = [link.public_url for link in status.links or () if link.public_url is not None]
    for text in [*status.services.values()] if status.services else [status.public_url or "", *of_links]:
        try:
            url = PublicUrl.parse(text)
        except ValueError:
            continue
        if url.scheme == "https" and not url.wildcard and not is_ip_address(url.host):
            yield url.host
