"""The native transport: one WebSocket to the relay, with yamux inside. The key is proved, and never sent.

It dials, opens TLS and the WebSocket, does the handshake and waits for the first round trip. Each step has a deadline.
Then yamux carries visitors until the connection ends. All errors become a `TunnelError` here.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.addresses import RelayAddress, is_loopback
from .._model.errors import InvalidSettingsError, LinkLostError, RelayConnectError, RemoteProtocolError, ReplacedError
from .._model.exception_groups import lone_error_bare
from .._model.keys import PublicKey, RelayKey
from .._model.retry_after import retry_after_seconds
from .._model.text import clean_message, cut
from .._net.dialing import dial_relay
from .._net.log_limiter import LogLimiter
from .._net.tls.client import client_tls, why_alerted
from .._net.tls.stream import TlsStream
from .._wire import messages as wire
from .._wire.certificate import CERTIFICATE, choose_certificate
from .._wire.handshake import (
    AGENT,
    MAX_HEARTBEAT_MS,
    MIN_HEARTBEAT_MS,
    SUBPROTOCOL,
    Choose,
    GatewayHandshake,
    Welcome,
)
from .._wire.heartbeat import HEARTBEAT, choose_heartbeat
from .._wire.proxy_v2 import MAX_LENGTH, ProxyHeader
from ..websocket import (
    EngineName,
    Message,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketLink,
    WebSocketRefused,
    load_engine,
)
from ..yamux import Limits, Role, YamuxConnection, YamuxStream
from .interface import (
    IN_CLEAR,
    Deliver,
    Draining,
    Replaced,
    Report,
    RoundTrip,
    ServicesMoved,
    Session,
    SpreadTold,
    Target,
    usable_key,
)
from .service_offer import ServiceOffer
from .tunnel_stream import TunnelStream

__all__ = ["NativeTransport", "authenticate", "failures_named", "take_spread"]

COUNTED_TIMEOUT: Final = 2.0
"""Seconds to wait, after the welcome, for the pong or the visitor that shows that the relay counts the session.

The relay finds the session for visitors when its first byte has come: our ping. After this wait the tunnel counts as
up without that sign, and the heartbeat decides whether the link is dead.
"""

HEADER_TIMEOUT: Final = 5.0
"""Seconds that a stream's PROXY header may take."""

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
    """

    relay_identity: PublicKey | None = None
    limits: Limits = attrs.field(factory=Limits)
    engine: EngineName | None = None
    heartbeat: float | None = None

    def check(self, key: RelayKey | None) -> RelayKey:
        """See `BuiltInTransport`. Here the key is 20 characters or longer, and the engine is installed."""
        if self.heartbeat is not None and not MIN_HEARTBEAT_MS <= self.heartbeat * 1000 <= MAX_HEARTBEAT_MS:
            raise InvalidSettingsError(f"the heartbeat is {self.heartbeat:g} seconds; allowed are 1 to 60")
        usable = usable_key(key, native=True)
        load_engine(self.engine)
        return usable

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """See `Serve`."""
        self.check(target.key)
        engine = load_engine(self.engine)
        address, timeout, make_tls = target.address, target.connect_timeout, target.make_tls or client_tls
        via = await target.redial.via(target.proxy, make_tls, address, timeout=timeout)
        tls = None
        if address.secure:
            tls = await target.redial.tls(make_tls, address, timeout=timeout)
        dial = target.redial.dialer(target.dial, timeout=timeout)
        stream, watched = await dial_relay(address, dial=dial, tls=tls, timeout=timeout, via=via)
        opening = Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT)
        with failures_named(address), lone_error_bare():
            deadline = trio.CancelScope(deadline=trio.current_time() + timeout)
            with deadline:
                async with engine.connect(stream, opening) as websocket:
                    if websocket.subprotocol != SUBPROTOCOL:
                        raise RelayConnectError(
                            f"{address} answers as a WebSocket, but not as a relay: it did not take {SUBPROTOCOL}"
                        )
                    deadline.deadline = trio.current_time() + timeout
                    offer, wanted = ServiceOffer(target.services), target.redial.heartbeat(self.heartbeat)
                    # With a ws:// address it is TLS with a proxy.
                    certificates = stream.peer_certificates if address.secure and isinstance(stream, TlsStream) else []
                    seen = hashlib.sha256(certificates[0]).digest() if certificates else None
                    choices = {
                        HEARTBEAT: choose_heartbeat(wanted),
                        CERTIFICATE: choose_certificate(seen, lambda: self._tls_is_opened(address)),
                    }
                    welcome, early = await authenticate(websocket, target, self.relay_identity, offer, choices)
                    deadline.deadline = float("inf")
                    take_spread(welcome, report)
                    link = WebSocketLink(
                        websocket, watched, lambda text: _take_text(text, target, report, offer), early
                    )
                    await _carry(
                        link,
                        websocket,
                        welcome,
                        target,
                        offer=offer,
                        heartbeat=min(welcome.heartbeat, wanted or welcome.heartbeat),
                        limits=self.limits,
                        deliver=deliver,
                        report=report,
                        task_status=task_status,
                    )
            raise RelayConnectError(f"{address} did not finish the opening within {timeout:g} seconds")

    def _tls_is_opened(self, address: RelayAddress) -> None:
        line = (
            f"someone between here and {address} opens TLS, such as a proxy of this network: the certificate is not the"
            " one with which the relay ends TLS. Whoever it is reads and can change what visitors send and get"
        )
        if self.relay_identity is not None:
            raise RelayConnectError(f"{line}; since relay_identity pins the relay, that is refused")
        _log_limiter.log(("opened", address), line, level=logging.WARNING)


async def authenticate(
    websocket: WebSocket,
    target: Target,
    relay_identity: PublicKey | None,
    offer: ServiceOffer,
    choices: Mapping[str, Choose] | None = None,
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
    link: WebSocketLink,
    websocket: WebSocket,
    welcome: Welcome,
    target: Target,
    *,
    offer: ServiceOffer,
    heartbeat: float,
    limits: Limits,
    deliver: Deliver,
    report: Report,
    task_status: trio.TaskStatus[Session],
) -> NoReturn:
    """Report that the tunnel is up, and carry visitors until the link ends."""
    counted = trio.Event()

    def on_stream(stream: YamuxStream) -> None:
        counted.set()
        _receive_visitor(stream, offer, deliver, nursery)

    def on_round_trip(seconds: float) -> None:
        report(RoundTrip(seconds))
        counted.set()

    def report_services() -> None:
        report(ServicesMoved(offer.addresses or {}))

    async def drain() -> None:
        connection.refuse_streams()
        await connection.streams_gone()

    async def start() -> None:
        with trio.move_on_after(COUNTED_TIMEOUT):
            await counted.wait()
        task_status.started(
            Session(id=welcome.session, public_url=welcome.public_url, services=offer.addresses, drain=drain)
        )
        if not target.address.secure and not is_loopback(target.address.host):
            _log.warning(IN_CLEAR, target.address, "a wss:// address")

    async with trio.open_nursery() as nursery:

        def on_doubt(silence: float) -> bool:
            line = f"nothing came from {target.address} for {silence:.0f} seconds"
            _log_limiter.log(("doubt", target.address), line, level=logging.INFO)
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
            nursery.start_soon(offer.keep_told, lambda text: websocket.send([text]), report_services)
        nursery.start_soon(check_when_asked)
        await _run(connection, target, heartbeat)
    raise AssertionError("a connection ends by raising")


async def _run(connection: YamuxConnection, target: Target, heartbeat: float) -> NoReturn:
    """Run yamux; what ends it becomes a `LinkLostError`."""
    address = target.address
    try:
        await connection.run()
    except WebSocketClosed as error:
        raise LinkLostError(f"the relay closed the link with code {error.code}{_quoted(error.reason)}") from error
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
                f"another gateway took the tunnel over: instance {cut(by, 64)!r}{_quoted(message)};"
                " where that is not meant, give each gateway a key of its own"
            )


def _receive_visitor(stream: YamuxStream, offer: ServiceOffer, deliver: Deliver, header_readers: trio.Nursery) -> None:
    """Deliver a visitor: now if its whole PROXY header has come, else when the rest of the header comes."""
    try:
        received = stream.receive_nowait(MAX_LENGTH) or b""
    except trio.BrokenResourceError:
        return  # the visitor has already left
    if not _deliver_if_complete(stream, received, offer, deliver):
        header_readers.start_soon(_read_header, stream, received, offer, deliver)


async def _read_header(stream: YamuxStream, received: bytes, offer: ServiceOffer, deliver: Deliver) -> None:
    """Wait for the rest of a header. `Limits.unaccepted` bounds how many wait: their streams are not accepted yet."""
    with trio.move_on_after(HEADER_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        # A complete header is never longer than MAX_LENGTH, so this never asks for 0 bytes.
        while more := await stream.receive_some(MAX_LENGTH - len(received)):
            received += more
            if _deliver_if_complete(stream, received, offer, deliver):
                return
    stream.reset()


def _deliver_if_complete(stream: YamuxStream, received: bytes, offer: ServiceOffer, deliver: Deliver) -> bool:
    """Deliver `stream`, or reset it when that fails; False when its header is not complete."""
    try:
        parsed = ProxyHeader.parse(received)
        if parsed is None:
            return False
        header, used = parsed
        if not offer.takes(header):
            raise RemoteProtocolError(f"a visitor of the service {header.service!r}, which is not offered")
        deliver(TunnelStream(stream, header, received[used:]))
    except (RemoteProtocolError, trio.WouldBlock):
        stream.reset()
    return True


@contextmanager
def failures_named(address: RelayAddress) -> Iterator[None]:
    """Turn the failure of an opening into a `TunnelError` that says what a person can do."""
    try:
        yield
    except WebSocketRefused as refusal:
        raise _refused(refusal, address) from refusal
    except WebSocketClosed as error:
        raise RelayConnectError(
            f"{address} closed the opening with code {error.code}{_quoted(error.reason)}"
        ) from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        why = why_alerted(error, address.host) or f"{error}{_hint_of_tls(address)}"
        raise RelayConnectError(f"{address} broke off the opening: {why}") from error


def _refused(refusal: WebSocketRefused, address: RelayAddress) -> RelayConnectError:
    status = refusal.status
    if status is None:
        return RelayConnectError(
            f"{address} does not answer as a WebSocket: {refusal}{_hint_of_tls(address)}; nothing secret was sent"
        )
    if 300 <= status < 400:
        where = clean_message(refusal.location or "nowhere")
        return RelayConnectError(
            f"{address} answered with a redirect to {where!r}, which is not followed; is this network behind a sign-in"
            " page (a captive portal)? Nothing secret was sent"
        )
    if 200 <= status < 300:
        return RelayConnectError(
            f"{address} answered with a web page (HTTP status {status}) instead of a WebSocket; is this network behind"
            " a sign-in page (a captive portal), or the address not a relay's? Nothing secret was sent"
        )
    hint = ""
    if status == 404:
        hint = "; is this where the relay takes gateways (its control_addr), and not visitors?"
    elif status == 400:
        hint = _hint_of_tls(address)
    return RelayConnectError(
        f"{address} refused the WebSocket with HTTP status {status}{hint}",
        retry_after=retry_after_seconds(refusal.retry_after),
    )


def _hint_of_tls(address: RelayAddress) -> str:
    return "" if address.secure else "; if it speaks TLS, its address begins with wss://"


def _quoted(text: str) -> str:
    return f": {clean_message(text)!r}" if text else ""
