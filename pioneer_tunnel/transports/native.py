"""The native transport: one WebSocket to the relay, with yamux inside. The key is proved, and never sent.

It dials, opens TLS and the WebSocket, does the handshake and waits for the first round trip. Each step has a deadline.
Then yamux carries visitors until the connection ends. All errors become a `TunnelError` here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.addresses import RelayAddress, is_loopback
from .._model.errors import InvalidSettingsError, LinkLostError, RelayConnectError, RemoteProtocolError, ReplacedError
from .._model.exception_groups import lone_error_bare
from .._model.keys import PublicKey, RelayKey
from .._model.log_fields import about
from .._model.stats import SessionStats
from .._model.text import cut
from .._net.dialing import dial_relay
from .._net.log_limiter import LogLimiter
from .._net.tls.client import client_tls
from .._net.tls.stream import TlsStream
from .._wire import messages as wire
from .._wire.certificate import CERTIFICATE, choose_certificate
from .._wire.handshake import AGENT, SUBPROTOCOL, GatewayHandshake, Welcome
from .._wire.heartbeat import HEARTBEAT, MAX_HEARTBEAT_MS, MIN_HEARTBEAT_MS, choose_heartbeat
from .._wire.links import LINKS, choose_links
from .._wire.node import NODE, NODE_HEADER, node_told
from .._wire.resumption import RESUME, Confirmation, GatewayResumption
from ..resume import DEFAULT_WINDOW, ResumableLink
from ..websocket import (
    ENGINES,
    EngineName,
    Message,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketLink,
    load_engine,
)
from ..yamux import Limits, Role, YamuxConnection, YamuxStream
from .interface import (
    IN_CLEAR,
    TLS_OF_NATIVE,
    Deliver,
    Draining,
    Event,
    LinkRestored,
    Replaced,
    Report,
    RoundTrip,
    ServicesMoved,
    Session,
    SessionRenewed,
    SpreadTold,
    Target,
    usable_key,
)
from .native_failures import failures_named, quoted
from .native_visitors import receive_visitor
from .redial import DEFAULT_RESUME_TIMEOUT
from .resuming import Opened, Redials, Resuming
from .service_offer import ServiceOffer

__all__ = ["NativeTransport", "authenticate", "take_spread"]

LONGEST_RESUME_TIMEOUT: Final = 3600.0

COUNTED_TIMEOUT: Final = 2.0
"""Seconds to wait, after the welcome, for the pong or the visitor that shows that the relay counts the session.

The relay finds the session for visitors when its first byte has come: our ping. After this wait the tunnel counts as
up without that sign, and the heartbeat decides whether the link is dead.
"""

_log: Final = logging.getLogger("pioneer_tunnel.transports.native")
_log_limiter: Final = LogLimiter(_log)


@final
@attrs.frozen(kw_only=True)
class NativeTransport:
    """The transport `websocket`.

    Attributes:
        relay_identity: the public key of the only relay to accept. None accepts any relay that TLS accepts.
        limits: what a session may cost in memory.
        engine: the WebSocket engine; None for the fastest that is installed.
        heartbeat: seconds of silence after which to ping, 1 to 60, if the relay's heartbeat is longer; None for the
            relay's.
        resume_timeout: seconds that the session survives without a link, where the relay allows it; 0 for not at all.
    """

    relay_identity: PublicKey | None = None
    limits: Limits = attrs.field(factory=Limits)
    engine: EngineName | None = None
    heartbeat: float | None = None
    resume_timeout: float = DEFAULT_RESUME_TIMEOUT

    def check(self, key: RelayKey | None) -> RelayKey:
        """See `BuiltInTransport`. Here the key is 20 characters or longer, and the engine is installed."""
        if self.heartbeat is not None and not MIN_HEARTBEAT_MS <= self.heartbeat * 1000 <= MAX_HEARTBEAT_MS:
            raise InvalidSettingsError(f"the heartbeat is {self.heartbeat:g} seconds; allowed are 1 to 60")
        usable = usable_key(key, native=True)
        load_engine(self.engine)
        if not 0 <= self.resume_timeout <= LONGEST_RESUME_TIMEOUT:
            raise InvalidSettingsError(
                f"resume_timeout is {self.resume_timeout}; allowed is 0 to {LONGEST_RESUME_TIMEOUT:g} seconds"
            )
        return usable

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """See `Serve`."""
        self.check(target.key)
        offer = ServiceOffer(target.services)
        redials = Redials()
        started: Callable[[Session], None] = task_status.started
        with lone_error_bare():
            async with trio.open_nursery() as connections:
                opened = await connections.start(self._hold_first, target, offer, report)
                while True:
                    opened = await self._carry(
                        opened,
                        connections,
                        target,
                        offer,
                        redials=redials,
                        deliver=deliver,
                        report=report,
                        started=started,
                    )
                    started = functools.partial(_renewed, report)

    async def _hold_first(
        self, target: Target, offer: ServiceOffer, report: Report, *, task_status: trio.TaskStatus[Opened]
    ) -> None:
        """Open the first session's first WebSocket, and close it when it carries no more."""
        async with self._open(target, offer, report, self._resumption()) as opened:
            task_status.started(opened)
            await trio.lowlevel.checkpoint_if_cancelled()  # the last chance, if `start` was cancelled
            await opened.hold()

    def _tls_is_opened(self, address: RelayAddress) -> None:
        line = (
            f"someone between here and {address} opens TLS, such as a proxy of this network: the certificate is not the"
            " one with which the relay ends TLS. Whoever it is reads and can change what visitors send and get"
        )
        if self.relay_identity is not None:
            raise RelayConnectError(f"{line}; since relay_identity pins the relay, that is refused")
        _log_limiter.log(("opened", address), line, about=about("tls_intercepted", peer=address))

    def _resumption(self) -> GatewayResumption | None:
        if not self.resume_timeout:
            return None
        return GatewayResumption(timeout=self.resume_timeout, window=DEFAULT_WINDOW)

    @asynccontextmanager
    async def _open(
        self, target: Target, offer: ServiceOffer, report: Report, resumption: GatewayResumption | None
    ) -> AsyncIterator[Opened]:
        """Dial, and do the handshake. At the end the WebSocket is closed."""
        engine = load_engine(self.engine)
        address, timeout, make_tls = target.address, target.connect_timeout, target.make_tls or client_tls
        via = await target.redial.via(target.proxy, make_tls, address, timeout=timeout)
        tls = None
        if address.secure:
            tls = await target.redial.tls(make_tls, address, timeout=timeout)
        dial = target.redial.dialer(target.dial, timeout=timeout)
        stream, watched = await dial_relay(
            address, dial=dial, tls=tls, timeout=timeout, via=via, resumption=target.redial.resumption
        )
        node = None if resumption is None else resumption.node
        headers = {} if node is None else {NODE_HEADER: node}
        opening = Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT, headers=headers)
        with failures_named(address), lone_error_bare():
            deadline = trio.CancelScope(deadline=trio.current_time() + timeout)
            with deadline:
                async with engine.connect(stream, opening) as websocket:
                    if websocket.subprotocol != SUBPROTOCOL:
                        raise RelayConnectError(
                            f"{address} answers as a WebSocket, but not as a relay: it did not take {SUBPROTOCOL}"
                        )
                    deadline.deadline = trio.current_time() + timeout
                    wanted = target.redial.heartbeat(self.heartbeat)
                    # With a ws:// address it is TLS with a proxy.
                    certificates = stream.peer_certificates if address.secure and isinstance(stream, TlsStream) else []
                    seen = hashlib.sha256(certificates[0]).digest() if certificates else None
                    choices = {
                        HEARTBEAT: choose_heartbeat(wanted),
                        CERTIFICATE: choose_certificate(seen, lambda: self._tls_is_opened(address)),
                    }
                    if target.place is not None:
                        choices[LINKS] = choose_links(target.place)
                    if resumption is not None:
                        choices[RESUME] = resumption.choose
                        choices[NODE] = lambda _: {}
                    welcome, early = await authenticate(websocket, target, self.relay_identity, offer, choices)
                    deadline.deadline = float("inf")
                    take_spread(welcome, report)
                    yield Opened(
                        websocket=websocket,
                        watched=watched,
                        welcome=welcome,
                        early=early,
                        heartbeat=min(welcome.heartbeat, wanted or welcome.heartbeat),
                        confirmation=_confirmation(welcome, resumption),
                        node=_node(welcome),
                    )
            if deadline.cancelled_caught:
                raise RelayConnectError(f"{address} did not finish the opening within {timeout:g} seconds")

    async def _carry(
        self,
        opened: Opened,
        connections: trio.Nursery,
        target: Target,
        offer: ServiceOffer,
        *,
        redials: Redials,
        deliver: Deliver,
        report: Report,
        started: Callable[[Session], None],
    ) -> Opened:
        """Carry one session until it fails. Returns what carries the next one, if the relay has granted one already."""
        drains = False
        resuming: Resuming | None = None

        def note(event: Event) -> None:
            nonlocal drains
            drains = drains or isinstance(event, Draining)
            report(event)

        def on_text(text: str) -> None:
            _take_text(text, target, note, offer)

        def on_restored() -> None:
            report(LinkRestored())
            if offer.addresses is not None:
                report(ServicesMoved(offer.addresses))

        carry = functools.partial(
            _carry,
            opened.welcome,
            target,
            offer=offer,
            heartbeat=opened.heartbeat,
            limits=self.limits,
            engine=self.engine or ENGINES[0],
            deliver=deliver,
            report=report,
            started=started,
        )
        try:
            if opened.confirmation is None:
                carrier = opened.carrier()
                carrier.link.on_text = on_text
                await carry(carrier.link)
            resuming = Resuming(
                opened,
                opened.confirmation,
                target,
                redials,
                timeout=self.resume_timeout,
                report=report,
                on_text=on_text,
                on_restored=on_restored,
                reopen=functools.partial(self._open, target, offer, report),
                may_renew=lambda: not drains,  # otherwise the session would take the tunnel from its successor
            )
            with lone_error_bare():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(carry, resuming.link)
                    await resuming.run(connections)
                    nursery.cancel_scope.cancel()  # before the link ends, so that its end is no failure
                    resuming.link.end(trio.BrokenResourceError("the relay has granted another session"))
        except BaseException:
            if resuming is not None and resuming.granted is not None:
                resuming.granted.over.set()
            raise
        finally:
            opened.over.set()
        assert resuming.granted is not None
        return resuming.granted


def _renewed(report: Report, session: Session) -> None:
    report(SessionRenewed(session))


def _confirmation(welcome: Welcome, resumption: GatewayResumption | None) -> Confirmation | None:
    if resumption is None:
        return None
    try:
        return resumption.confirmed(welcome.session, welcome.extensions.get(RESUME))
    except RemoteProtocolError as error:
        raise RelayConnectError(f"the relay's 'welcome' is not valid: {error}") from error


def _node(welcome: Welcome) -> str | None:
    try:
        return node_told(welcome.extensions)
    except RemoteProtocolError as error:
        raise RelayConnectError(f"the relay's 'welcome' is not valid: {error}") from error


async def authenticate(
    websocket: WebSocket,
    target: Target,
    relay_identity: PublicKey | None,
    offer: ServiceOffer,
    choices: Mapping[str, wire.Choose] | None = None,
) -> tuple[Welcome, list[Message]]:
    """The handshake; returns the welcome, and the messages that came with it: visitors may be waiting already."""
    opening = GatewayHandshake(
        target.key.identity(),
        audience=target.address.audience,
        service=target.service,
        instance=target.instance,
        pinned_relay=relay_identity,
        choices={wire.DRAINING: lambda _: {}, wire.SPREAD: lambda _: {}, **offer.choices, **(choices or {})},
    )
    while True:
        messages = await websocket.receive()
        for position, message in enumerate(messages, start=1):
            if not isinstance(message, str):
                await websocket.close(1002, "binary before the welcome")
                raise RelayConnectError(f"{target.address} sent bytes before it said welcome: this is not a relay")
            reply = opening.receive(message)
            if isinstance(reply, Welcome):
                offer.accepted(reply)
                return reply, messages[position:]
            if reply is not None:
                await websocket.send([reply])


async def _carry(
    welcome: Welcome,
    target: Target,
    link: WebSocketLink | ResumableLink,
    *,
    offer: ServiceOffer,
    heartbeat: float,
    limits: Limits,
    engine: EngineName,
    deliver: Deliver,
    report: Report,
    started: Callable[[Session], None],
) -> NoReturn:
    """Report that the tunnel is up, and carry visitors until the link ends."""
    counted = trio.Event()

    def on_stream(stream: YamuxStream) -> None:
        counted.set()
        receive_visitor(stream, offer, target.counts, deliver, nursery)

    def on_round_trip(seconds: float) -> None:
        report(RoundTrip(seconds))
        counted.set()

    def report_services() -> None:
        report(ServicesMoved(offer.addresses or {}))

    async def drain() -> None:
        connection.refuse_streams()
        await connection.streams_gone()

    def stats() -> SessionStats:
        peer = link.peer
        return connection.stats(
            id=welcome.session,
            peer=None if peer is None else str(peer),
            instance=target.instance,
            engine=engine,
            extensions=tuple(sorted(welcome.extensions)),
            resumes_total=link.resumes,
        )

    async def start() -> None:
        with trio.move_on_after(COUNTED_TIMEOUT):
            await counted.wait()
        started(
            Session(
                id=welcome.session,
                public_url=welcome.public_url,
                services=offer.addresses,
                drain=drain,
                stats=stats,
                beside_others=LINKS in welcome.extensions,
            )
        )
        if not target.address.secure and not is_loopback(target.address.host):
            fields = about("in_clear", peer=target.address)
            _log.warning(IN_CLEAR, target.address, TLS_OF_NATIVE, extra=fields)

    async with trio.open_nursery() as nursery:

        def on_doubt(silence: float) -> bool:
            line = f"nothing came from {target.address} for {silence:.0f} seconds"
            fields = about("link_in_doubt", session=welcome.session, peer=target.address)
            _log_limiter.log(("doubt", target.address), line, level=logging.INFO, about=fields)
            return link.restore()

        async def check_when_asked() -> NoReturn:
            while True:
                await target.checks.asked()
                connection.check()
                if link.address_is_gone:
                    connection.give_up("this system does not have its address any more")

        connection = YamuxConnection(
            link,
            Role.SERVER,
            heartbeat=heartbeat,
            limits=limits,
            on_stream=on_stream,
            on_round_trip=on_round_trip,
            on_doubt=on_doubt,
        )
        nursery.start_soon(start)
        if offer.addresses is not None:
            nursery.start_soon(offer.keep_told, link.send_text, report_services)
        nursery.start_soon(check_when_asked)
        await _run(connection, target, heartbeat)
    raise AssertionError("a connection ends by raising")


async def _run(connection: YamuxConnection, target: Target, heartbeat: float) -> NoReturn:
    """Run yamux; what ends it becomes a `LinkLostError`."""
    address = target.address
    try:
        await connection.run()
    except WebSocketClosed as error:
        raise LinkLostError(f"the relay closed the link with code {error.code}{quoted(error.reason)}") from error
    except trio.BrokenResourceError as error:
        if connection.stuck or not connection.failed_check:  # a check that fails is no sign of small packets
            target.redial.note_lost(stuck=connection.stuck, silence=connection.silence, heartbeat=heartbeat)
        raise LinkLostError(f"the link to {address} is lost: {error}", retry_at_once=connection.failed_check) from error
    except trio.ClosedResourceError as error:
        raise LinkLostError(f"the link to {address} was closed at this end") from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"the relay broke a rule of the protocol: {error}") from error


def _take_text(text: str, target: Target, report: Report, offer: ServiceOffer) -> None:
    if offer.take(text):
        report(ServicesMoved(offer.addresses or {}))
    else:
        _take_notice(text, target, report)


def take_spread(welcome: Welcome, report: Report) -> None:
    told = welcome.extensions.get(wire.SPREAD)
    if told is not None:
        try:
            report(SpreadTold(wire.Spread.parse(told)))
        except RemoteProtocolError as error:
            raise RelayConnectError(f"the relay's 'welcome' is not valid: {error}") from error


def _take_notice(text: str, target: Target, report: Report) -> None:
    match wire.parse_notice(text):
        case wire.Draining(reconnect_within=seconds):
            report(Draining(seconds))
        case wire.Spread() as spread:
            report(SpreadTold(spread))
        case wire.Replaced(by=by, message=message):
            report(Replaced(by))
            if target.instance and by == target.instance:
                raise LinkLostError("a newer session of this gateway took the tunnel over")
            raise ReplacedError(
                f"another gateway took the tunnel over: instance {cut(by, 64)!r}{quoted(message)};"
                " where that is not meant, give each gateway a key of its own"
            )
