"""What is diagnosed: the options of a gateway that its way to the relay depends on."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

import attrs

from .._model.addresses import RelayAddress
from .._model.keys import PublicKey
from .._net.proxies.entering import Via
from .._net.tls.client import SystemTrust
from ..transports.interface import Target
from ..websocket import EngineName

__all__ = ["Subject", "Trust"]


@final
@attrs.frozen(kw_only=True)
class Trust:
    """Whom TLS to the relay trusts.

    Attributes:
        make_context: makes the context. Blocks.
        ca_file: the configured authorities.
        system_trust: see `RemoteAccessConfig`.
    """

    make_context: Callable[[], ssl.SSLContext]
    ca_file: Path | None = None
    system_trust: SystemTrust = "openssl"


@final
@attrs.frozen(kw_only=True)
class Subject:
    """What is diagnosed.

    Attributes:
        address: the relay.
        timeout: seconds for each step.
        via: the proxy on the way; None for none.
        trust: for TLS; None without TLS.
        target: the relay with the key; None where there is no key.
        relay_identity, engine: see `NativeTransport`.
        wall_clock: this host's clock, in seconds since 1970.
    """

    address: RelayAddress
    timeout: float = 10.0
    via: Via | None = None
    trust: Trust | None = None
    target: Target | None = None
    relay_identity: PublicKey | None = None
    engine: EngineName | None = None
    wall_clock: Callable[[], float] = time.time
