"""The native transport: one WebSocket to the relay, yamux inside, a proof instead of a key.

The way up is dial, TLS, WebSocket, handshake, first round trip, each step under a deadline; from then on the yamux
connection carries visitors until it ends, and what it ended of is translated into a `TunnelError` here and nowhere
else.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

import trio

from .._model.addresses import RelayAddress
from .._model.errors import LinkLostError, RelayConnectError, RemoteProtocolError, ReplacedError
from .._model.exception_groups import lone_error_bare
from .._model.text import clean_message, cut
from .._net.dialing import dial_relay
from .._net.tls.client import client_tls
from .._wire import messages as wire
from .._wire.handshake import AGENT, SUBPROTOCOL, GatewayHandshake, Welcome
from .._wire.proxy_v2 import MAX_LENGTH, ProxyHeader
from ..websocket import Message, Opening, WebSocket, WebSocketClosed, WebSocketLink, WebSocketRefused, load_engine
from ..yamux import Role, YamuxConnection, YamuxStream
from .interface import Deliver, Draining, Replaced, Report, RoundTrip, Session, Target, refuse_unusable_key
from .tunnel_stream import TunnelStream

__all__ = ["serve"]

COUNTED_TIMEOUT: Final = 2.0
"""Seconds to wait, after the welcome, for the pong or the visitor that shows that the relay counts the session.

The relay finds the session for visitors when its first byte has come: our ping. After this wait the tunnel counts as
up without that sign, and the heartbeat decides whether the link is dead.
"""

HEADER_TIMEOUT: Final = 5.0
"""Seconds that a stream's PROXY header may take."""


async def serve(target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]) -> NoReturn:
    """See `Serve`."""
    refuse_unusable_key(target.key, native=True)
    engine = load_engine(target.websocket_engine)
    address = target.address
    timeout = target.connect_timeout
    tls = await target.redial.tls(target.make_tls or client_tls, address, timeout=timeout) if address.secure else None
    dial = target.redial.dialer(target.dial, timeout=timeout)
    stream, watched = await dial_relay(address, dial=dial, tls=tls, timeout=timeout)
    opening = Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT)
    with _failures_named(address), lone_error_bare():
        deadline = trio.CancelScope(deadline=trio.current_time() + target.connect_timeout)
        with deadline:
            async with engine.connect(stream, opening) as websocket:
                if websocket.subprotocol != SUBPROTOCOL:
                    raise RelayConnectError(
                        f"{address} answers as a WebSocket, but not as a relay: it did not take {SUBPROTOCOL}"
                    )
                deadline.deadline = trio.current_time() + target.connect_timeout
                welcome, behind = await _authenticate(websocket, target)
                deadline.deadline = float("inf")
                link = WebSocketLink(websocket, watched, lambda text: _take_notice(text, target, report), behind)
                counted = trio.Event()

                def on_stream(stream: YamuxStream) -> None:
                    counted.set()
                    _receive_visitor(stream, deliver, nursery)

                def on_round_trip(seconds: float) -> None:
                    report(RoundTrip(seconds))
                    counted.set()

                async def start() -> None:
                    with trio.move_on_after(COUNTED_TIMEOUT):
                        await counted.wait()
                    task_status.started(Session(id=welcome.session, public_url=welcome.public_url))

                async with trio.open_nursery() as nursery:
                    connection = YamuxConnection(
                        link,
                        Role.SERVER,
                        heartbeat=welcome.heartbeat,
                        limits=target.limits,
                        on_stream=on_stream,
                        on_round_trip=on_round_trip,
                    )
                    nursery.start_soon(start)
                    await _carry(connection, address)
        raise RelayConnectError(f"{address} did not finish the opening within {target.connect_timeout:g} seconds")


async def _authenticate(websocket: WebSocket, target: Target) -> tuple[Welcome, list[Message]]:
    """The opening; returns the welcome, and what came right behind it: visitors may be waiting already."""
    opening = GatewayHandshake(
        target.key.identity(),
        audience=target.address.audience,
        service=target.service,
        instance=target.instance,
        pinned_relay=target.relay_identity,
    )
    while True:
        messages = await websocket.receive()
        for position, message in enumerate(messages, start=1):
            if not isinstance(message, str):
                await websocket.close(1002, "binary before the welcome")
                raise RelayConnectError(f"{target.address} sent bytes before it said welcome: this is not a relay")
            reply = opening.receive(message)
            if isinstance(reply, Welcome):
                return reply, messages[position:]
            if reply is not None:
                await websocket.send([reply])


async def _carry(connection: YamuxConnection, address: RelayAddress) -> NoReturn:
    try:
        await connection.run()
    except WebSocketClosed as error:
        raise LinkLostError(f"the relay closed the link with code {error.code}{_quoted(error.reason)}") from error
    except trio.BrokenResourceError as error:
        raise LinkLostError(f"the link to {address} is lost: {error}") from error
    except trio.ClosedResourceError as error:
        raise LinkLostError(f"the link to {address} was closed at this end") from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"the relay broke a rule of the protocol: {error}") from error


def _take_notice(text: str, target: Target, report: Report) -> None:
    match wire.parse_notice(text):
        case wire.Draining(reconnect_within=seconds):
            report(Draining(seconds))
        case wire.Replaced(by=by, message=message):
            report(Replaced(by))
            if target.instance and by == target.instance:
                raise LinkLostError("a newer session of this gateway took the tunnel over")
            raise ReplacedError(
                f"another gateway took the tunnel over: instance {cut(by, 64)!r}{_quoted(message)};"
                " where that is not meant, give each gateway a key of its own"
            )


def _receive_visitor(stream: YamuxStream, deliver: Deliver, header_readers: trio.Nursery) -> None:
    """Hand a visitor on, at once when its PROXY header came together with the stream."""
    try:
        received = stream.receive_nowait(MAX_LENGTH) or b""
    except trio.BrokenResourceError:
        return  # it came and went in one breath
    if not _deliver_if_complete(stream, received, deliver):
        header_readers.start_soon(_read_header, stream, received, deliver)


async def _read_header(stream: YamuxStream, received: bytes, deliver: Deliver) -> None:
    """Wait for the rest of a header. How many do so is bounded: their streams are not accepted yet."""
    with trio.move_on_after(HEADER_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        # A header that is complete is never longer than the limit, so there is always something left to ask for.
        while more := await stream.receive_some(MAX_LENGTH - len(received)):
            received += more
            if _deliver_if_complete(stream, received, deliver):
                return
    stream.reset()


def _deliver_if_complete(stream: YamuxStream, received: bytes, deliver: Deliver) -> bool:
    """True when `stream` is taken care of: delivered, or reset because it cannot be."""
    try:
        parsed = ProxyHeader.parse(received)
        if parsed is None:
            return False
        header, used = parsed
        deliver(TunnelStream(stream, header, received[used:]))
    except (RemoteProtocolError, trio.WouldBlock):
        stream.reset()
    return True


@contextmanager
def _failures_named(address: RelayAddress) -> Iterator[None]:
    """Tell what an opening failed of, in terms of what a person can do about it."""
    try:
        yield
    except WebSocketRefused as refusal:
        raise _refused(refusal, address) from refusal
    except WebSocketClosed as error:
        raise RelayConnectError(
            f"{address} closed the opening with code {error.code}{_quoted(error.reason)}"
        ) from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        raise RelayConnectError(f"{address} broke off the opening: {error}") from error


def _refused(refusal: WebSocketRefused, address: RelayAddress) -> RelayConnectError:
    status = refusal.status
    if status is None:
        return RelayConnectError(f"{address} does not answer as a WebSocket: {refusal}; nothing secret was sent")
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
    hint = "; is this where the relay takes gateways (its control_addr), and not visitors?" if status == 404 else ""
    return RelayConnectError(
        f"{address} refused the WebSocket with HTTP status {status}{hint}", retry_after=_seconds(refusal.retry_after)
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; its other form, a date, is not worth trusting a foreign clock for."""
    if retry_after is None or not retry_after.isascii() or not retry_after.isdigit() or len(retry_after) > 9:
        return None
    return float(retry_after)


def _quoted(text: str) -> str:
    return f": {clean_message(text)!r}" if text else ""
