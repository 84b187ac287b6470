"""The keyword arguments of `open_tunnel` that every face of it passes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import TypedDict

from .._model.addresses import LocalAddress
from .._model.engine_names import EngineName
from .._model.keys import PublicKey
from .._model.proxies import Proxy
from .._model.session_limits import Limits
from .._net.dialing import Dialer
from .._net.network_changes import WatchNetwork
from .._net.tls.client import SystemTrust
from ..certificates.config import AcmeConfig
from ..transports import Serve
from ..transports.rathole.key_mode import KeyMode
from ..transports.services import Services
from .restart_policy import RestartPolicy

__all__ = ["TunnelOptions"]


class TunnelOptions(TypedDict, total=False):
    """Optional arguments of `pioneer_tunnel.open_tunnel`, which describes them."""

    links: int | None
    service: str
    instance: str | None
    ca_file: Path | str | None
    system_trust: SystemTrust
    proxy: Proxy | str | None
    proxy_credentials_file: Path | str | None
    relay_identity: PublicKey | str | None
    restart: RestartPolicy | None
    connect_timeout: float
    heartbeat: float | None
    resume_timeout: float
    backlog: int
    limits: Limits | None
    dial: Dialer
    watch_network: WatchNetwork | None
    transport: Serve | str
    key_mode: KeyMode | str
    services: Services | Mapping[str, str | LocalAddress] | None
    websocket_engine: EngineName | None
    acme: AcmeConfig | None
    random: Random | None
    wall_clock: Callable[[], float]
