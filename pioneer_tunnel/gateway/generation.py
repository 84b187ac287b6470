"""One generation of remote access: what it is made of, decided before it begins, and its life until it is replaced.

A generation begins with each change of the settings that asks for one. The functions here decide, without I/O,
whether there is one at all, and what a person can do when there is none; they are asked in the contract's order.
`Generation` runs a supervisor and takes its visitors, to the local gateway or to a handler of the host.

Neighbours: `RemoteAccess` plans, runs and ends generations, one at a time; `supervisor` keeps the tunnel up.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.errors import InvalidSettingsError, MissingKeyError, Problem, TunnelError, UnsupportedTransportError
from .._model.keys import RelayKey
from .._model.text import redact_reason
from .._net.dialing import Dialer
from .._net.log_limiter import Complaints
from .._net.tls.certificate import Certificate
from .._net.tls.client import client_tls
from .._storage.validation import refusal
from ..transports import Serve, Target, refuse_unusable_key
from ..transports.process.config import TunnelProgram
from ..transports.process.program import refuse_unguarded
from ..transports.tunnel_stream import Handler, TunnelStream
from ..tunnel.forward import forward, probe_local
from ..tunnel.restart_policy import RestartPolicy
from ..tunnel.status_feed import StatusFeed
from ..tunnel.supervisor import Supervisor
from ..tunnel.visitor_tls import terminate_tls
from ..yamux import Limits
from .config import RemoteAccessConfig, Transport
from .settings import Settings, SettingsUpdate

__all__ = [
    "Generation",
    "Plan",
    "effective_config",
    "load_certificate",
    "make_target",
    "restart_policy",
    "settle_config",
    "why_refused",
]

_complaints: Final = Complaints(logging.getLogger("pioneer_tunnel.generation"))


def effective_config(config: RemoteAccessConfig, settings: Settings) -> RemoteAccessConfig:
    """`config` with the user's settings laid over it, as far as the operator lets them.

    Raises:
        UnsupportedTransportError: the settings name a transport that nobody knows.
        InvalidSettingsError: what they name cannot be used.
    """
    changes: dict[str, Any] = {}
    if settings.transport is not None:
        changes["transport"] = Transport.parse(settings.transport)
    if settings.service_name is not None:
        changes["service_name"] = settings.service_name
    if settings.server is not None and config.allow_server_override:
        try:
            changes["relay_addr"] = RelayAddress.parse(settings.server)
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
        UnsupportedTransportError: nobody knows the transport, or this installation lacks it.
        InvalidSettingsError: what the settings name cannot be used.
    """
    named = config.transport if settings.transport is None else Transport.parse(settings.transport)
    if named is not None:
        _choose_transport(named, transports)  # reported before anything that is wrong with the address
    effective = effective_config(config, settings)
    return effective, _choose_transport(effective.effective_transport, transports)


def why_refused(
    update: SettingsUpdate,
    before: Settings,
    stored: RelayKey | None,
    config: RemoteAccessConfig,
    transports: Mapping[str, Serve],
) -> TunnelError | None:
    """Why `update` would make the tunnel fail, as far as that is known without dialling; None when it is not.

    What was wrong before the update and is not its subject is no reason: the status reports it.

    Args:
        update: what is asked for.
        before: the settings that it is asked of.
        stored: the stored key, when it is known.
        config: what the operator decided.
        transports: those of this installation.
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


def make_target(
    config: RemoteAccessConfig, key: RelayKey | None, *, instance: str, dial: Dialer, limits: Limits
) -> Target:
    """What the transport has to know.

    Raises:
        MissingKeyError: there is no key.
        InvalidSettingsError: it is a public key or too short for the transport, or the transport is `process` and no
            program is named.
        UnsupportedTransportError: programs cannot be guarded here.
    """
    program = _program(config) if config.effective_transport is Transport.PROCESS else None
    if key is None:
        raise MissingKeyError("no relay key is stored; save the key that the relay's operator gave you")
    refuse_unusable_key(key, native=config.effective_transport is Transport.WEBSOCKET)
    return Target(
        address=config.effective_relay_addr,
        key=key,
        service=config.service_name,
        key_mode=config.key_mode,
        instance=instance,
        relay_identity=config.relay_identity,
        make_tls=functools.partial(client_tls, config.ca_path, system_trust=config.system_trust),
        connect_timeout=config.connect_timeout_ms / 1000,
        dial=dial,
        limits=limits,
        program=program,
    )


def load_certificate(config: RemoteAccessConfig) -> Certificate | None:
    """What visitors' TLS is ended with; None when it is not for this library to end. Blocks: it reads files.

    Raises:
        InvalidSettingsError: the files cannot be used.
    """
    return None if config.tls is None else Certificate(*config.tls_paths)


def _program(config: RemoteAccessConfig) -> TunnelProgram:
    """What transport `process` runs."""
    refuse_unguarded()
    if config.process is None:
        raise InvalidSettingsError(
            "transport 'process' runs a tunnel program, and none is configured; name it as command in the table"
            " [gateway.remote_access.process]"
        )
    return TunnelProgram(
        config.process, local=config.local_addr, runtime_folder=config.runtime_path, folder=config.base_dir
    )


def restart_policy(config: RemoteAccessConfig) -> RestartPolicy:
    """The configuration's restart policy, in seconds."""
    return RestartPolicy(
        initial=config.restart_initial_ms / 1000,
        maximum=config.restart_max_ms / 1000,
        jitter=config.restart_jitter_percent / 100,
        max_restarts=config.max_restarts,
        stable=config.restart_stable_ms / 1000,
    )


@final
@attrs.frozen(kw_only=True)
class Plan:
    """What a generation is made of."""

    config: RemoteAccessConfig
    serve: Serve
    target: Target
    certificate: Certificate | None = None


@final
class Generation:
    """A running generation.

    Args:
        plan: what it is made of.
        feed: where statuses go.
        handler: takes visitors in the host's stead; None forwards them to the local gateway.
        host_tasks: where the host's handlers run. They may outlive the generation, whose streams are broken then;
            forwarding does not.
    """

    def __init__(
        self,
        plan: Plan,
        feed: StatusFeed,
        *,
        handler: Handler | None,
        host_tasks: trio.Nursery,
        dial: Dialer,
        random: Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._plan: Final = plan
        take = self._forward if handler is None else handler
        self._handler: Final = take if plan.certificate is None else terminate_tls(take, plan.certificate)
        self._forwards: Final = handler is None
        self._dial: Final = dial
        self._tasks = host_tasks
        self._refusing = False
        self._visitors: Final[set[TunnelStream]] = set()
        self._visitor_left = trio.Event()
        self._supervisor: Final = Supervisor(
            plan.serve,
            plan.target,
            self._deliver,
            feed=feed,
            policy=restart_policy(plan.config),
            random=random,
            wall_clock=wall_clock,
            probe=functools.partial(probe_local, plan.config.local_addr, dial=dial) if handler is None else None,
        )

    async def run(self) -> None:
        """Keep the tunnel up until a final failure, which the feed has then been told, or until cancelled.

        The first status is out before this waits for anything. At the end no stream is left that works.
        """
        try:
            async with trio.open_nursery() as nursery:
                if self._forwards:
                    self._tasks = nursery
                try:
                    await self._supervisor.run()
                except TunnelError:
                    nursery.cancel_scope.cancel()
        finally:
            self.refuse_visitors()
            for stream in self._visitors:
                stream.reset()

    def refuse_visitors(self) -> None:
        """Take no more visitors."""
        self._refusing = True

    async def visitors_gone(self) -> None:
        """Wait until no visitor has an open stream. No deadline: the caller has one."""
        while any(stream.usable for stream in self._visitors):
            await self._visitor_left.wait()

    def retry_now(self) -> None:
        """See `Supervisor.retry_now`."""
        self._supervisor.retry_now()

    def retry_if_rejected(self) -> None:
        """See `Supervisor.retry_if_rejected`."""
        self._supervisor.retry_if_rejected()

    def _deliver(self, stream: TunnelStream) -> None:
        if self._refusing:
            raise trio.WouldBlock
        self._visitors.add(stream)
        stream.acknowledge()
        self._tasks.start_soon(self._take_care_of, stream)

    async def _take_care_of(self, stream: TunnelStream) -> None:
        try:
            await self._handler(stream)
        except Exception as error:  # noqa: BLE001  # a visitor's trouble is not the tunnel's
            line = "a handler failed; its visitor's connection is reset"
            _complaints.tell("handler", line, level=logging.ERROR, error=error)
        finally:
            stream.reset()  # after an orderly end this changes nothing
            self._visitors.remove(stream)
            self._visitor_left.set()
            self._visitor_left = trio.Event()

    async def _forward(self, stream: TunnelStream) -> None:
        local, proxy_protocol = self._plan.config.local_addr, self._plan.config.proxy_protocol
        await forward(stream, local, proxy_protocol=proxy_protocol, report=self._supervisor.report, dial=self._dial)
