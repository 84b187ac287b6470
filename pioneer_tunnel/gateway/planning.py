"""Decides what the next generation of remote access is, or why there can be none. No I/O.

The checks have the order of the gateway contract: transport, address, key.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import attrs

from .._model.addresses import Address, RelayAddress
from .._model.errors import InvalidSettingsError, Problem, TunnelError, UnsupportedTransportError
from .._model.keys import RelayKey
from .._model.services import FIRST_SERVICE
from .._model.session_limits import Limits
from .._model.text import redact_reason
from .._net.dialing import Dialer, dial_tcp
from .._net.tls.certificate import Certificate
from .._net.tls.client import client_tls
from .._storage.validation import refusal
from ..transports.built_in import TRANSPORTS, configured_transport
from ..transports.interface import Serve, Target, usable_key
from ..transports.process.config import TunnelProgram
from ..transports.services import Services
from ..tunnel.restart_policy import RestartPolicy
from .config import RemoteAccessConfig
from .settings import Settings, SettingsUpdate
from .transport import Transport

if TYPE_CHECKING:
    from ..certificates.keeper import AcmeCertificates

__all__ = ["Plan", "effective_config", "make_plan", "restart_policy", "settle_config", "why_refused"]


@final
@attrs.frozen(kw_only=True)
class Plan:
    """What a generation is made of.

    Attributes:
        config: the effective configuration.
        serve: the transport, with its options.
        target: what the transport connects to.
        certificate: ends visitors' TLS; None where this library does not end it.
        automatic: the same, where `acme` orders it.
    """

    config: RemoteAccessConfig
    serve: Serve
    target: Target
    certificate: Certificate | None = None
    automatic: AcmeCertificates | None = None


def effective_config(config: RemoteAccessConfig, settings: Settings) -> RemoteAccessConfig:
    """`config` with the user's settings applied, as far as the operator allows that.

    Raises:
        UnsupportedTransportError: the settings name an unknown transport.
        InvalidSettingsError: the settings cannot be used, or contradict `config`.
    """
    changes: dict[str, Any] = {}
    if settings.transport is not None:
        changes["transport"] = Transport.parse(settings.transport)
    if settings.service_name is not None:
        changes["service_name"] = settings.service_name
    if settings.server is not None and config.allow_server_override:
        try:
            changes |= {"relay_addr": RelayAddress.parse(settings.server), "relay_addrs": ()}
        except ValueError as error:
            message = redact_reason(str(error), settings.server)
        else:
            message = ""
        if message:
            raise refusal([Problem(key="server", message=message)])
    return attrs.evolve(config, **changes) if changes else config


def settle_config(
    config: RemoteAccessConfig, settings: Settings, transports: Mapping[str, Serve]
) -> tuple[RemoteAccessConfig, Serve]:
    """The effective configuration and its transport.

    Raises:
        UnsupportedTransportError: the transport is unknown, or this installation lacks it.
        InvalidSettingsError: the settings cannot be used, or contradict `config`.
    """
    named = config.transport if settings.transport is None else Transport.parse(settings.transport)
    if named is not None:
        _choose_transport(named, transports)  # reported before problems of the address
    effective = effective_config(config, settings)
    return effective, _choose_transport(effective.effective_transport, transports)


def why_refused(
    update: SettingsUpdate,
    before: Settings,
    stored: RelayKey | None,
    config: RemoteAccessConfig,
    transports: Mapping[str, Serve],
) -> TunnelError | None:
    """Why `update` would make the tunnel fail, as far as that shows without dialling; None when nothing shows.

    A problem that existed before the update and is not its subject is no reason. The status reports it.

    Args:
        update: the update.
        before: the settings before it.
        stored: the stored key, when it is known.
        config: the operator's configuration.
        transports: the transports of this installation.
    """
    was = _try_to_settle(config, before, transports)
    after = _try_to_settle(config, update.apply_to(before), transports)
    if isinstance(after, TunnelError) and not (isinstance(was, TunnelError) and str(was) == str(after)):
        return after
    native = _is_native(after)
    key = update.key
    if native and not _is_native(was) and not update.deletes_key:
        key = key or stored  # a new address moves the stored key to another transport
    problem = None if key is None else key.why_unusable(native=native)
    return None if problem is None else InvalidSettingsError(problem)


def _is_native(config: RemoteAccessConfig | TunnelError) -> bool:
    return not isinstance(config, TunnelError) and config.effective_transport is Transport.WEBSOCKET


def _try_to_settle(
    config: RemoteAccessConfig, settings: Settings, transports: Mapping[str, Serve]
) -> RemoteAccessConfig | TunnelError:
    try:
        return settle_config(config, settings, transports)[0]
    except TunnelError as error:
        return error


def _choose_transport(name: Transport, transports: Mapping[str, Serve]) -> Serve:
    """The transport of that name.

    Raises:
        UnsupportedTransportError: this installation lacks it.
    """
    serve = transports.get(name)
    if serve is None:
        raise UnsupportedTransportError(
            f"the transport {str(name)!r} is not offered by this installation; it has {', '.join(sorted(transports))}"
        )
    return serve


def make_plan(
    config: RemoteAccessConfig,
    serve: Serve,
    key: RelayKey | None,
    *,
    instance: str,
    dial: Dialer,
    limits: Limits,
    services: Services | None,
) -> Plan:
    """The plan of a generation, without its certificate.

    Args:
        config: the effective configuration.
        serve: the transport, as `settle_config` returns it. A transport of the host's own that stands in for a built-in
            one is called as it is. The options and the key have to be usable for the built-in one all the same.
        key: the relay key; None where none is stored.
        instance: tells this gateway from another one with the same key.
        dial: makes TCP connections. With one of the host's own, the environment's proxy is not used.
        limits: what a session may cost.
        services: what the host offers in place of the configuration's services; None to offer these.

    Raises:
        MissingKeyError: there is no key.
        InvalidSettingsError: it is a public key or too short for the transport, or the transport is `process` and no
            program is configured, or the environment's proxy cannot be used.
        UnsupportedTransportError: the transport is `process`, and programs cannot be guarded on this system.
    """
    name = config.effective_transport
    built_in = configured_transport(
        name,
        relay_identity=config.relay_identity,
        key_mode=config.key_mode,
        limits=limits,
        heartbeat=None if config.heartbeat_ms is None else config.heartbeat_ms / 1000,
        resume_timeout=config.resume_timeout_ms / 1000,
        program=TunnelProgram(
            config.process, local=config.local_addr, runtime_folder=config.runtime_path, folder=config.base_dir
        )
        if config.process is not None and isinstance(config.local_addr, Address)
        else None,
    )
    proxy = config.proxy_choice.for_dialer(own=dial is not dial_tcp)
    if name is not Transport.PROCESS:
        for relay in config.effective_relay_addrs:
            proxy.proxy_for(relay.host, relay.port)
    checked = usable_key(key, native=False) if built_in is None else built_in.check(key)
    target = Target(
        address=config.effective_relay_addr,
        key=checked,
        service=config.service_name,
        instance=instance,
        make_tls=functools.partial(client_tls, config.ca_path, system_trust=config.system_trust),
        connect_timeout=config.connect_timeout_ms / 1000,
        dial=dial,
        services=_offered(config) if services is None else services,
        proxy=proxy,
    )
    if built_in is not None and serve is TRANSPORTS[name]:
        serve = built_in
    return Plan(config=config, serve=serve, target=target)


def _offered(config: RemoteAccessConfig) -> Services | None:
    return Services({FIRST_SERVICE: config.local, **config.services}) if config.services else None


def restart_policy(config: RemoteAccessConfig) -> RestartPolicy:
    """The configuration's restart policy, in seconds."""
    return RestartPolicy(
        initial=config.restart_initial_ms / 1000,
        maximum=config.restart_max_ms / 1000,
        jitter=config.restart_jitter_percent / 100,
        max_restarts=config.max_restarts,
        stable=config.restart_stable_ms / 1000,
    )
