"""A warning about a link to a relay without TLS: what visitors send passes through it in clear."""

from __future__ import annotations

import logging
from typing import Final

from .._model.addresses import RelayAddress, is_loopback

__all__ = ["warn_of_clear_link"]

_log: Final = logging.getLogger("pioneer_tunnel.transports.clear_link")


def warn_of_clear_link(address: RelayAddress, *, instead: str) -> None:
    """Log a warning, unless the relay is on this host.

    Args:
        address: the relay's, which is dialled without TLS.
        instead: what to write for a link with TLS.
    """
    if not is_loopback(address.host):
        _log.warning(
            "%s is reached in clear, without TLS: on the way, visitors' traffic and tokens can be read and changed; use %s",
            address, instead,
        )  # fmt: skip
