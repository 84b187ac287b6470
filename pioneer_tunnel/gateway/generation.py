"""One generation of remote access: runs a `Plan` with a supervisor, and takes care of its visitors.

A generation begins with each change of the settings that asks for one. Its visitors go to the local gateway, or to a
handler of the host.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from random import Random
from typing import Final, final

import trio

from .._model.addresses import LocalAddress
from .._model.errors import TunnelError
from .._model.log_fields import about
from .._model.stats import SessionStats
from .._net.dialing import Dialer
from .._net.log_limiter import LogLimiter
from .._net.network_changes import WatchNetwork
from ..access_log.writer import AccessLog
from ..transports.tunnel_stream import Handler, TunnelStream
from ..tunnel.automatic_tls import keep_certificates
from ..tunnel.forward import Forwarder, LocalServers, forward, needs_no_task, probe_local
from ..tunnel.network import chosen_watch, follow_network
from ..tunnel.status_feed import StatusFeed
from ..tunnel.supervisor import Supervisor
from ..tunnel.visitor_tls import with_certificate
from .planning import Plan, restart_policy

__all__ = ["Generation"]

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.generation"))


@final
class Generation:
    """A running generation.

    Args:
        plan: what it is made of.
        feed: gets the statuses.
        access_log: gets the requests of visitors that are forwarded; None for none.
        handler: takes visitors in this process; None forwards them to the local gateway.
        host_tasks: a nursery for the host's handlers. They may outlive the generation, with broken streams. Forwarding
            does not outlive it.
        dial: makes connections to the local gateway.
        watch_network: notices changes of the network; see `chosen_watch`.
        random: the source of jitter.
        wall_clock: seconds since 1970, for the `*_unix` fields of statuses.
    """

    def __init__(
        self,
        plan: Plan,
        feed: StatusFeed,
        *,
        access_log: AccessLog | None,
        handler: Handler | None,
        host_tasks: trio.Nursery,
        dial: Dialer,
        watch_network: WatchNetwork | None,
        random: Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._plan: Final = plan
        self._feed: Final = feed
        self._access_log: Final = access_log
        self._access: Final = plan.config.access_rules
        take = self._forward if handler is None else handler
        self._handler: Final = with_certificate(take, plan.certificate or plan.automatic)
        self._forwards: Final = handler is None
        self._forwarder: Forwarder | None = None  # if nothing else is done for a visitor
        self._dial: Final = dial
        self._watch_network: Final = chosen_watch(watch_network, dial)
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
            relays=plan.config.effective_relay_addrs,
            links=plan.config.effective_links,
            probe=functools.partial(
                probe_local, plan.config.local, dial=dial, proxy_protocol=plan.config.proxy_protocol
            )
            if handler is None
            else None,
        )

    async def run(self) -> None:
        """Keep the tunnel up until a final failure, which is published, or until cancelled.

        The first status is published before the first checkpoint. At the end all streams are reset.
        """
        plan = self._plan
        try:
            async with trio.open_nursery() as nursery:
                if self._forwards:
                    self._tasks = nursery
                    if needs_no_task(
                        certificate=plan.certificate or plan.automatic,
                        forwarded_headers=plan.config.forwarded_headers,
                        host_header=plan.config.host_header,
                        request_id=plan.config.request_id,
                        access=self._access,
                        access_log=self._access_log,
                    ):
                        self._forwarder = self._make_forwarder(nursery)
                if plan.automatic is not None:
                    nursery.start_soon(keep_certificates, plan.automatic, self._feed)
                nursery.start_soon(follow_network, self._watch_network, self._supervisor, plan.target)
                try:
                    await self._supervisor.run()
                except TunnelError:
                    nursery.cancel_scope.cancel()
        finally:
            self.refuse_visitors()
            for stream in self._visitors:
                stream.reset()

    def refuse_visitors(self) -> None:
        """Reset visitors that come from now on."""
        self._refusing = True

    async def drain(self) -> None:
        """Ask the relay for no more visitors, and wait until those who are there have gone. Has no deadline."""
        self.refuse_visitors()
        await self._supervisor.drain()
        await self.visitors_gone()

    async def visitors_gone(self) -> None:
        """Wait until no visitor has an open stream. No deadline: the caller has one."""
        while any(stream.usable for stream in self._visitors):
            await self._visitor_left.wait()

    @property
    def sessions(self) -> list[SessionStats]:
        """See `Supervisor.sessions`."""
        return self._supervisor.sessions

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
        if self._forwarder is None:
            self._tasks.start_soon(self._handle, stream)
        else:
            self._forwarder.begin(stream, self._note_left)

    async def _handle(self, stream: TunnelStream) -> None:
        try:
            await self._handler(stream)
        except Exception as error:  # noqa: BLE001  # one visitor must not end the tunnel
            line = "a handler failed; its visitor's connection is reset"
            fields = about("handler_failed", service=stream.service, reason=type(error).__name__)
            _log_limiter.log("handler", line, level=logging.ERROR, error=error, about=fields)
        finally:
            stream.reset()  # does nothing after a graceful end
            self._note_left(stream)

    def _note_left(self, stream: TunnelStream) -> None:
        self._visitors.remove(stream)
        if self._visitor_left.statistics().tasks_waiting:
            self._visitor_left.set()
            self._visitor_left = trio.Event()

    def _make_forwarder(self, tasks: trio.Nursery) -> Forwarder:
        return Forwarder(
            tasks,
            self._local_servers,
            proxy_protocol=self._plan.config.proxy_protocol,
            report=self._supervisor.report,
            dial=self._dial,
        )

    @property
    def _local_servers(self) -> LocalAddress | LocalServers:
        plan = self._plan
        return plan.config.local if plan.target.services is None else plan.target.services

    async def _forward(self, stream: TunnelStream) -> None:
        config = self._plan.config
        await forward(
            stream,
            self._local_servers,
            proxy_protocol=config.proxy_protocol,
            forwarded_headers=config.forwarded_headers,
            host_header=config.host_header,
            request_id=config.request_id,
            raw_services=config.raw_services,
            access=self._access,
            access_log=self._access_log,
            report=self._supervisor.report,
            dial=self._dial,
        )
