"""Runs all checks of a configuration, in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from .._model.addresses import LocalAddress
from .._model.errors import LocalGatewayError
from .._model.keys import RelayKey
from .._net.tls.client import client_tls
from ..gateway.config import RemoteAccessConfig
from ..gateway.transport import Transport
from ..transports.interface import Target
from ..transports.rathole.key_mode import KeyMode
from ..transports.redial import Redial
from ..tunnel.forward import ProxyProtocol, probe_local
from ..websocket import EngineName
from .checks import Check, CheckFailedError, Checks, Name
from .native_link import check_native_link
from .path import check_names, check_proxy, check_tcp, check_tls
from .rathole_link import check_rathole_link
from .subject import Subject, Trust

__all__ = ["diagnose"]


async def diagnose(
    config: RemoteAccessConfig,
    key: RelayKey | None,
    *,
    report: Callable[[Check], None],
    servers: Mapping[str, LocalAddress],
    instance: str | None = None,
    engine: EngineName | None = None,
) -> list[Check]:
    """Check each step from this host to the relay, and the local gateway. Each step has a deadline.

    A gateway that runs with the same key keeps its tunnel.

    Args:
        config: what the gateway runs with.
        key: the relay key; None does without the proof.
        report: gets each check when it is done, in the order of `Name`.
        servers: the local servers, by the names of their services.
        instance: the name of this gateway, see `runtime_folder`.
        engine: the WebSocket engine; None for the fastest that is installed.

    Returns:
        All checks.

    Raises:
        TunnelError: the environment's proxy, or the file with its credentials, cannot be used.
    """
    checks = Checks(report, trio.current_time)
    if config.effective_transport in {Transport.PROCESS, Transport.NOISE}:
        for name in [*Name][:-1]:
            checks.skip(name, f"with transport {config.effective_transport}, another program dials the relay")
    else:
        subject = await _subject(config, key, instance=instance, engine=engine)
        with suppress(CheckFailedError):
            native = config.effective_transport is Transport.WEBSOCKET
            await _check_way(checks, subject, None if native else config.key_mode)
    if servers:
        with suppress(CheckFailedError):
            await _check_servers(checks, servers, config.proxy_protocol)
    else:
        checks.skip(Name.LOCAL_GATEWAY, "none was given")
    return checks.done


async def _check_servers(
    checks: Checks, servers: Mapping[str, LocalAddress], proxy_protocol: ProxyProtocol | None
) -> None:
    told: list[str] = []
    failed: list[str] = []
    with checks.check(Name.LOCAL_GATEWAY, "Start the gateway, or correct its address.") as finding:
        for service, address in servers.items():
            named = f"{service}: " if service else ""
            try:
                await probe_local(address, proxy_protocol=proxy_protocol)
                told.append(f"{named}{address} answers")
            except LocalGatewayError as error:
                failed.append(f"{named}{error}")
        if failed:
            raise LocalGatewayError("; ".join([*failed, *told]))
        finding.ok("; ".join(told))


async def _subject(
    config: RemoteAccessConfig, key: RelayKey | None, *, instance: str | None, engine: EngineName | None
) -> Subject:
    address, timeout = config.effective_relay_addr, config.connect_timeout_ms / 1000
    make_tls = functools.partial(client_tls, config.ca_path, system_trust=config.system_trust)
    secure = address.secure or config.effective_transport is Transport.TLS
    return Subject(
        address=address,
        timeout=timeout,
        via=await Redial().via(config.proxy_choice, make_tls, address, timeout=timeout),
        trust=Trust(make_context=make_tls, ca_file=config.ca_path, system_trust=config.system_trust)
        if secure
        else None,
        target=None
        if key is None
        else Target(address=address, key=key, service=config.service_name, instance=instance, connect_timeout=timeout),
        relay_identity=config.relay_identity,
        engine=engine,
    )


async def _check_way(checks: Checks, subject: Subject, key_mode: KeyMode | None) -> None:
    """Check the way to the relay.

    Args:
        key_mode: of a relay of transport `tcp` or `tls`; None for `websocket`.
    """
    addresses = await check_names(checks, subject)
    reached = await check_tcp(checks, subject, addresses)
    try:
        tunnel = await check_proxy(checks, subject, reached)
        stream, certificate = await check_tls(checks, subject, reached, tunnel)
        if key_mode is None:
            await check_native_link(checks, subject, stream, reached, certificate)
        else:
            await check_rathole_link(checks, subject, stream, key_mode)
    finally:
        await trio.aclose_forcefully(reached.stream)
