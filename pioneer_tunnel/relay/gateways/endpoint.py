"""Where gateways connect: accept the WebSocket, verify the proof, and run the session.

first request   must upgrade to our WebSocket subprotocol
opening         challenge, claim and proof as text messages (`opening`)
admission       the directory decides whether the gateway may have the tunnel
welcome         after it, yamux; the session gets the tunnel with the gateway's first byte
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any, Final, NoReturn, final

import attrs
import trio

from ..._http.head import RequestHead, wants_upgrade
from ..._model.addresses import Address
from ..._model.callbacks import nothing
from ..._model.errors import ProtocolError, RemoteProtocolError
from ..._model.exception_groups import leaves
from ..._model.keys import SigningIdentity
from ..._model.log_fields import about
from ..._model.services import FIRST_SERVICE
from ..._model.stats import SessionStats
from ..._net.adopted import Watched
from ..._net.log_limiter import LogLimiter
from ..._net.prefixed_stream import PrefixedStream
from ..._wire import services
from ..._wire.certificate import CERTIFICATE
from ..._wire.handshake import SUBPROTOCOL, Rejection
from ..._wire.heartbeat import HEARTBEAT
from ..._wire.links import LINKS, LinkPlace
from ..._wire.messages import DRAINING, SPREAD
from ..._wire.node import NODE
from ..._wire.resumption import RESUME, ResumeChoice
from ..._wire.services import Located
from ...resume import DEFAULT_WINDOW, Carrier, ResumableLink, Tail
from ...websocket import (
    ENGINES,
    EngineName,
    Opening,
    WebSocketLink,
    WebSocketRefused,
    load_engine,
)
from ...yamux import Limits, SendBudget
from ..admission import Arrival
from ..config import RelayConfig
from ..connection import contain_errors
from ..counts import RelayCounts
from ..request_head import Refusal, read_head, refuse
from ..tunnels import Route
from .expected import Expected
from .offered_services import OfferedServices
from .opening import OPENING_ALLOWANCE, OPENING_TIMEOUT, GatewayOpening, Proved, break_off, reject
from .registry import Directory, Registry, RegistryAway, TunnelTaken
from .resuming import Kept, ResumableSessions, hold
from .session import GatewaySession
from .spreading import Spreading

__all__ = ["GatewayEndpoint", "wants_gateway"]

MOST_RECONNECT_WITHIN: Final = 3.0
"""Seconds over which gateways reconnect, at the most, when the relay stops. The next one holds visitors for longer."""

_REGISTRY_AWAY: Final = "the relay cannot look it up at the moment"

BUSY_RETRY_MS: Final = 5_000
"""Milliseconds that a gateway is asked to wait when another one has its tunnel."""

LEAST_UNREAD: Final = 1024 * 1024
"""Bytes that a session may hold unread, however many links its gateway has."""

TELL_INTERVAL: Final = 5.0
"""Seconds between two times at which gateways are told how to come back, if that has changed much."""

TELL_PAUSE: Final = 0.01
"""Seconds between two gateways that are told, so that telling all of them does not disturb visitors."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.control")
_log_limiter: Final = LogLimiter(_log)


@final
class GatewayEndpoint:
    """Accepts gateways and runs their sessions.

    Args:
        config: its id, public names, heartbeat, grace and limits are used.
        registry: the tunnels and their keys.
        directory: the session of each tunnel.
        expected: gets the tunnels whose gateways have come.
        counts: counts sessions and refusals; by default new ones.
        identity: proves the relay to gateways that pin it.
        limits: of each yamux session; by default they follow from `config.limits`.
        engine: the WebSocket engine; None chooses the fastest that is installed.
        address_of: where visitors reach a route; by default its URL.
        node: the name of this relay in its fleet; None if there is none.
        wall_clock: seconds since 1970, for the time in messages to a rejected gateway.
    """

    def __init__(
        self,
        config: RelayConfig,
        registry: Registry,
        directory: Directory,
        *,
        expected: Expected | None = None,
        counts: RelayCounts | None = None,
        identity: SigningIdentity | None = None,
        limits: Limits | None = None,
        engine: EngineName | None = None,
        address_of: Callable[[Route], str] = lambda route: str(route.url),
        node: str | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config: Final = config
        self._registry: Final = registry
        self._directory: Final = directory
        self._expected: Final = expected or Expected()
        self._counts: Final = counts or RelayCounts()
        self._engine: Final = load_engine(engine)
        self._engine_name: Final = engine or ENGINES[0]
        # Only the relay opens streams: a SYN from a gateway is reset.
        self._limits: Final = limits or Limits(
            unaccepted=0,
            unread=config.limits.buffered_bytes_per_tunnel,
            unsent=config.limits.unsent_bytes_per_tunnel,
        )
        self._window: Final = min(DEFAULT_WINDOW, self._limits.unsent // 2)
        self._sending: Final = SendBudget(config.limits.unsent_bytes)
        self._address_of: Final = address_of
        self._node: Final = node
        self._wall_clock: Final = wall_clock
        self._sessions: Final[set[GatewaySession]] = set()
        self._spreading: Final = Spreading(config.limits.handshakes_per_second)
        self._opening: Final = GatewayOpening(
            config, registry, self._counts, self._spreading, identity=identity, node=node, window=self._window
        )
        self._sessions_changed = trio.Event()
        self._reconnect_within: float | None = None  # once the relay stops
        self._resumable: Final = ResumableSessions(config.limits)
        self._session_tasks: trio.Nursery | None = None

    def let_sessions_resume(self, tasks: trio.Nursery) -> None:
        """Keep sessions that lose their connection, if the configuration says so. Their tasks run in `tasks`.

        Sessions of gateways that cannot resume run in the task of their connection.
        """
        if self._config.resume_timeout_ms:
            self._session_tasks = tasks
            tasks.start_soon(self._resumable.limit_bytes)

    async def serve(
        self,
        stream: trio.abc.Stream,
        watched: Watched,
        arrival: Arrival | None = None,
        *,
        certificate: bytes | None = None,
    ) -> None:
        """Serve a connection from its first byte until it ends. For the arguments see `serve_request`."""
        request = await self.read_request(stream)
        if request is not None:
            prefixed = PrefixedStream(stream, request[1])
            del request  # it takes memory for as long as the session lives
            await self.serve_request(prefixed, watched, arrival, certificate=certificate)

    async def read_request(self, stream: trio.abc.Stream) -> tuple[RequestHead, bytes] | None:
        """Read the request of a connection at an address for gateways alone. Any request but ours gets a 404.

        Returns:
            The head of the request, and all that was read; None if it was refused, or none came.
        """
        try:
            head, received = await read_head(stream)
            if head is None:
                return None
            if not wants_gateway(head):
                text = f"this address is for gateways, which upgrade to the WebSocket subprotocol {SUBPROTOCOL}"
                raise Refusal(404, text, omit_body=head.omit_body)
        except Refusal as refusal:
            await refuse(stream, refusal)
            return None
        return head, received

    async def serve_request(
        self,
        stream: trio.abc.Stream,
        watched: Watched,
        arrival: Arrival | None = None,
        *,
        certificate: bytes | None = None,
        peer: Address | None = None,
    ) -> None:
        """Serve a connection from its WebSocket request until it ends, then close `stream`.

        Args:
            stream: the connection, in clear. Its next bytes are the request.
            watched: the same stream, or the one below its TLS.
            arrival: the connection's entry in the limits; it is settled when the session has the tunnel, and it delays
                the answer to a wrong proof. None applies no limits.
            certificate: the SHA-256 of the certificate that the gateway has to see; None if it cannot be compared.
            peer: the gateway's address; None to ask the socket.
        """
        deadline = trio.CancelScope(deadline=trio.current_time() + OPENING_TIMEOUT)
        with deadline:
            try:
                wanted = Opening(subprotocol=SUBPROTOCOL, allowance=OPENING_ALLOWANCE)
                async with self._engine.accept(stream, wanted) as websocket:
                    resumable = self._session_tasks is not None
                    proved = await self._opening.prove(websocket, arrival, certificate, resumable=resumable)
                    if proved is not None:
                        websocket.trust()
                        link = WebSocketLink(websocket, watched, peer=peer)
                        if proved.choice is None:
                            await self._carry(link, proved, arrival=arrival, deadline=deadline)
                        else:
                            deadline.deadline = float("inf")
                            await self._carry_resumable(Carrier(link), proved, proved.choice, arrival)
            except* (WebSocketRefused, trio.BrokenResourceError, trio.ClosedResourceError) as group:
                _log.debug(
                    "a gateway connection ended in its opening: %s",
                    leaves(group)[0],
                    extra=about("gateway_opening_ended", reason=leaves(group)[0]),
                )
        if deadline.cancelled_caught:
            _log_too_slow()

    @property
    def connected(self) -> frozenset[str]:
        """The ids of the tunnels whose gateway is connected, or is expected."""
        return frozenset(session.tunnel_id for session in self._sessions if session.entered).union(
            self._expected.missing
        )

    def sessions(self) -> dict[str, list[SessionStats]]:
        """The sessions that have got their tunnel, by its id, the newest one last."""
        found: dict[str, list[SessionStats]] = {}
        for session in sorted(self._sessions, key=lambda session: session.since):
            if session.entered:
                found.setdefault(session.tunnel_id, []).append(session.stats())
        return found

    def holds(self) -> Mapping[str, Any]:
        """The fields of `RelayStats` about all sessions."""
        return {
            "sessions_open": len(self._sessions),
            "suspended_sessions": self._resumable.suspended,
            "suspended_sessions_limit": self._config.limits.suspended_sessions,
            "unsent_bytes": self._sending.held,
            "unsent_limit_bytes": self._config.limits.unsent_bytes,
        }

    def drain(self) -> None:
        """Ask each gateway for another session, also those that connect from now on. Streams may still be opened."""
        self._reconnect_within = min(self._spreading.advice(len(self._sessions)).span, MOST_RECONNECT_WITHIN)
        for session in self._sessions:
            session.drain(self._reconnect_within)

    def finish(self) -> None:
        """After `drain`, when no gateway can connect any more: open no more streams.

        A session ends with its last one, or as soon as it has no connection.
        """
        for session in self._sessions:
            session.finish()
        self._resumable.finish()

    async def registry_changed(self, tunnel_ids: Container[str] | None = None) -> None:
        """End each session whose key no longer opens its tunnel; tell the others the addresses of their services.

        Args:
            tunnel_ids: only sessions of these tunnels; None for all.
        """
        for session in [*self._sessions]:
            if tunnel_ids is not None and session.tunnel_id not in tunnel_ids:
                continue
            try:
                entry = await self._registry.by_key_id(session.key_id)
            except RegistryAway as away:
                if away.for_long:
                    session.revoke()
                continue
            if entry is None or entry.id != session.tunnel_id:
                session.revoke()
            else:
                session.registry_changed()

    async def _locate(self, key_id: str, names: Collection[str]) -> Located:
        """Where visitors reach the services of the tunnel that a key opens, when its gateway offers `names`."""
        try:
            entry = await self._registry.by_key_id(key_id)
        except RegistryAway:
            return Located(refused=dict.fromkeys(names, _REGISTRY_AWAY))
        if entry is None:
            return Located()
        routes = {route.service or FIRST_SERVICE: route for route in entry.routes}
        created, refused = await self._registry.created(entry, sorted({*names} - routes.keys() - {FIRST_SERVICE}))
        addresses = {name: self._address_of(route) for name, route in (routes | created).items()}
        return Located(addresses=addresses, refused=refused)

    async def keep_told(self) -> NoReturn:
        """Tell gateways how to come back after a loss, whenever that has changed much since they were told last."""
        while True:
            # No deadline: without a change there is nothing to tell.
            await self._sessions_changed.wait()
            self._sessions_changed = trio.Event()
            for session in [*self._sessions]:
                advice = self._spreading.advice(len(self._sessions))
                if session.spread is not None and Spreading.is_outdated(session.spread, advice):
                    session.tell_spread(advice)
                    await trio.sleep(TELL_PAUSE)
            await trio.sleep(TELL_INTERVAL)

    def _limits_of(self, place: LinkPlace | None) -> Limits:
        """The limits of a session. The links of a gateway share what may be unread, but for 1 MiB each."""
        if place is None:
            return self._limits
        return attrs.evolve(self._limits, unread=max(self._limits.unread // place.of, LEAST_UNREAD))

    async def _carry_resumable(
        self, carrier: Carrier, proved: Proved, choice: ResumeChoice, arrival: Arrival | None
    ) -> None:
        """Carry a new session or a suspended one, until this connection is given up."""
        assert proved.resumption is not None
        assert self._session_tasks is not None
        kept = self._resumable.find(proved.resumption, choice, tunnel_id=proved.entry.id, key_id=proved.claim.key_id)
        if kept is not None:
            try:
                await self._resume(kept, carrier, proved, choice, arrival)
            except RemoteProtocolError as error:  # the gateway has gone on over the old connection meanwhile
                self._resumable.note_refused(kept, error)
                await break_off(proved.websocket, error)
            return
        deadline = trio.CancelScope(deadline=trio.current_time() + OPENING_TIMEOUT)
        tail = Tail(window=self._window, peer_window=choice.window)

        async def carry(link: ResumableLink) -> None:
            try:
                with deadline:
                    await self._carry(link, proved, arrival=arrival, deadline=deadline)
            finally:
                carrier.gone.set()  # also if the session never began
            if deadline.cancelled_caught:
                _log_too_slow()

        def end_candidate() -> None:
            if deadline.deadline < float("inf"):
                deadline.cancel()

        link = ResumableLink(carrier, tail, timeout=choice.timeout)
        self._session_tasks.start_soon(contain_errors, link, carry, link)
        await hold(carrier, end_candidate)

    async def _resume(
        self, kept: Kept, carrier: Carrier, proved: Proved, choice: ResumeChoice, arrival: Arrival | None
    ) -> None:
        """Let a suspended session go on over this connection, until it is given up.

        Raises:
            RemoteProtocolError: the gateway is elsewhere than it has said when it asked. The session stays as it is.
        """
        assert proved.resumption is not None
        kept.attempts = attempt = kept.attempts + 1
        session, link = kept.session, kept.link
        confirmed: dict[str, Mapping[str, Any]] = {}
        if proved.served is not None:
            located = await self._locate(proved.claim.key_id, proved.served)
            session.services_told(proved.served, located)
            confirmed[services.SERVICES] = services.located_fields(located)
        counters = link.pause()
        try:
            link.check(choice.counters)
            confirmed[RESUME] = proved.resumption.confirm(choice, kept.secret, session.id, counters)
            with trio.fail_after(OPENING_TIMEOUT):
                await proved.websocket.send([self._welcome(proved, session, confirmed)])
            if kept.attempts != attempt:
                return  # the gateway has asked again meanwhile
            if arrival is not None:
                arrival.settle()
            self._resumable.resumed(kept)
            self._counts.of(session.tunnel_id).resumes += 1
            self._directory.note_resumed(session.tunnel_id, session)
            await link.attach(carrier, choice.counters)
            await session.ask_for_another()
        finally:
            if kept.attempts == attempt:
                link.go_on()
        await hold(carrier, nothing)

    def _keep(self, session: GatewaySession, link: ResumableLink, proved: Proved) -> Mapping[str, Any]:
        """Let a new session be resumed; returns what the welcome says of that."""
        assert proved.resumption is not None
        assert proved.choice is not None
        secret = proved.resumption.new_secret(proved.choice)
        self._resumable.add(Kept(session, link, secret))
        link.on_lost = functools.partial(self._resumable.suspend, session.id)
        return proved.resumption.confirm(proved.choice, secret, session.id)

    def _welcome(self, proved: Proved, session: GatewaySession, confirmed: dict[str, Mapping[str, Any]]) -> str:
        if SPREAD in proved.claim.extensions:
            session.spread = self._spreading.advice(len(self._sessions))
            confirmed[SPREAD] = session.spread.fields()
        if NODE in proved.claim.extensions:
            confirmed[NODE] = {"name": self._node}
        session.extensions = [*confirmed]
        return proved.handshake.welcome(
            proved.claim,
            session=session.id,
            public_url=self._address_of(proved.entry.routes[0]),
            heartbeat_ms=proved.heartbeat_ms,
            confirmed=confirmed,
        )

    async def _carry(
        self,
        link: WebSocketLink | ResumableLink,
        proved: Proved,
        *,
        arrival: Arrival | None,
        deadline: trio.CancelScope,
    ) -> None:
        config, entry, claim, served = self._config, proved.entry, proved.claim, proved.served
        offered: OfferedServices | None = None
        confirmed: dict[str, Mapping[str, Any]] = {
            name: {} for name in (HEARTBEAT, CERTIFICATE, DRAINING, LINKS) if name in claim.extensions
        }
        if served is not None:
            locate = functools.partial(self._locate, claim.key_id)
            located = await locate(served)
            offered = OfferedServices(served, locate, located)
            confirmed[services.SERVICES] = services.located_fields(located)

        async def enter() -> None:
            """Give the tunnel to the session, when its first bytes have come.

            A gateway that pins another identity closes the connection after the welcome. So a gateway without a first
            byte must not change anything for the session that has the tunnel.
            """
            if not session.ended:
                try:
                    await self._directory.enter(entry.id, session, rules=entry.takeover_rules)
                except TunnelTaken as taken:
                    self._counts.refused("tunnel_taken", entry.id)
                    session.refuse(str(taken))
            if session.ended:
                await trio.sleep_forever()  # no deadline: the session is ending and cancels this
            session.entered = True
            self._counts.of(entry.id).sessions += 1
            self._expected.has_come(entry.id)
            if self._reconnect_within is not None:
                session.drain(self._reconnect_within)
            deadline.deadline = float("inf")
            if arrival is not None:
                arrival.settle()
            line = f"tunnel {entry.id}: session {session.id} is connected ({claim.agent})"
            fields = about("session_connected", tunnel=entry.id, session=session.id, peer=link.peer)
            _log_limiter.log(("connected", entry.id), line, level=logging.INFO, about=fields)

        session = GatewaySession(
            entry.id,
            claim,
            link,
            heartbeat=proved.heartbeat_ms / 1000,
            limits=self._limits_of(proved.place),
            sending=self._sending,
            since=self._wall_clock(),
            rotation_grace=config.rotation_grace_ms / 1000,
            services=offered,
            engine=self._engine_name,
            on_first_bytes=enter,
            place=proved.place,
        )
        # From here on `registry_changed` sees the session, also while it waits for the tunnel.
        self._sessions.add(session)
        self._sessions_changed.set()
        try:
            try:
                await self._directory.admit(entry.id, session, rules=entry.takeover_rules)
                if isinstance(link, ResumableLink):
                    confirmed[RESUME] = self._keep(session, link, proved)
                await proved.websocket.send([self._welcome(proved, session, confirmed)])
                deadline.deadline = trio.current_time() + OPENING_TIMEOUT
                await session.carry()
            except TunnelTaken as taken:
                self._counts.refused("tunnel_taken", entry.id)
                rejection = Rejection("busy", str(taken), retry_after_ms=BUSY_RETRY_MS)
                await reject(proved.websocket, claim, entry, rejection)
            finally:
                # Also after `enter` was cancelled: a directory may have carried it out.
                with trio.CancelScope(shield=True):
                    await self._directory.leave(entry.id, session)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as group:
            when = "" if session.entered else " before its gateway accepted the relay"
            why = leaves(group)[0]
            line = f"tunnel {entry.id}: session {session.id} has ended{when}: {why}"
            fields = about("session_ended", tunnel=entry.id, session=session.id, reason=why)
            _log_limiter.log(("ended", entry.id), line, level=logging.INFO, about=fields)
        finally:
            self._sessions.discard(session)
            self._sessions_changed.set()
            self._resumable.remove(session.id)


def _log_too_slow() -> None:
    line = f"a gateway connection did not finish its opening within {OPENING_TIMEOUT:g} seconds"
    _log_limiter.log("no opening", line, level=logging.INFO, about=about("gateway_too_slow"))


def wants_gateway(head: RequestHead) -> bool:
    """Whether a request is an upgrade to our WebSocket subprotocol."""
    upgrade = wants_upgrade(head)
    return upgrade is not None and upgrade.websocket and SUBPROTOCOL in upgrade.subprotocols
