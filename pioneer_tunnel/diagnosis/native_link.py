"""The way to a relay of transport `websocket` above TCP and TLS: the upgrade, the proof, and large packets.

A running gateway with the same key keeps its tunnel: a session counts from the first byte of yamux that a gateway sends
after the welcome, and none is sent here.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import trio

from .._model.addresses import RelayAddress
from .._model.errors import RelayConnectError
from .._model.exception_groups import lone_error_bare
from .._wire.handshake import AGENT, SUBPROTOCOL
from ..transports.native import authenticate
from ..transports.native_failures import failures_named
from ..transports.service_offer import ServiceOffer
from ..websocket import Engine, Opening, WebSocket, WebSocketRefused, load_engine
from .certificates import Facts
from .checks import Checks, Finding, Name
from .path import Reached, say_time, small_packets_arrive
from .subject import Subject

__all__ = ["check_native_link"]

LARGEST_SKEW: Final = 60.0
"""Seconds that clocks may differ. A `Date` header has whole seconds, and was on the way for a while."""

PADDING: Final = json.dumps({"type": "padding", "padding": "." * (15 * 1024)})
"""A text of a type that no relay knows, so that it ignores it. It fills ten packets of an Ethernet."""

ACKNOWLEDGED_WITHIN: Final = 5.0
"""Seconds for the padding to be acknowledged. TCP sends a lost packet again several times in it."""

_CLOSE_TIMEOUT: Final = 2.0
_PAUSE: Final = 0.02

_SIGN_IN: Final = (
    "Open any page in a browser on this network. If a sign-in page comes, sign in. If none comes, the address is not a"
    " relay's."
)


async def check_native_link(
    checks: Checks, subject: Subject, stream: trio.abc.Stream, reached: Reached, certificate: Facts | None
) -> None:
    """Check the upgrade and what follows, and close `stream`.

    Args:
        subject: what is diagnosed.
        stream: the connection, inside its TLS.
        reached: the connection below it.
        certificate: the relay's, which TLS has verified; None without TLS.
    """
    with lone_error_bare():
        async with trio.open_nursery() as nursery:
            websocket = await _check_upgrade(checks, subject, nursery, stream, certificate)
            if await _check_proof(checks, websocket, subject):
                await _check_large_packets(checks, websocket, reached)
            else:
                checks.skip(Name.MTU, "large packets are sent only after the relay's welcome")
            with trio.move_on_after(_CLOSE_TIMEOUT):
                await websocket.close(1000)
            nursery.cancel_scope.cancel()


async def _check_upgrade(
    checks: Checks, subject: Subject, nursery: trio.Nursery, stream: trio.abc.Stream, certificate: Facts | None
) -> WebSocket:
    """Open the WebSocket, which then lives as long as `nursery`. Its answer tells of a captive portal and the clock."""
    started = trio.current_time()
    opened = await _open(subject, nursery, stream)
    refusal = opened.__cause__ if isinstance(opened, RelayConnectError) else None
    with checks.check(Name.CAPTIVE_PORTAL, _SIGN_IN, started=started) as finding:
        _check_captive_portal(finding, opened, certificate)
    try:
        with checks.check(Name.UPGRADE, started=started) as finding:
            if isinstance(opened, RelayConnectError):
                raise opened
            if opened.subprotocol != SUBPROTOCOL:
                raise RelayConnectError(
                    f"{subject.address} answers as a WebSocket, but not as a relay: it did not take {SUBPROTOCOL}"
                )
            finding.ok(f"a relay answers ({SUBPROTOCOL})")
            return opened
    finally:
        date = refusal.date if isinstance(refusal, WebSocketRefused) else getattr(opened, "date", None)
        with checks.check(Name.CLOCK) as finding:
            _check_clock(finding, date, certificate, subject.wall_clock())


async def _open(subject: Subject, nursery: trio.Nursery, stream: trio.abc.Stream) -> WebSocket | RelayConnectError:
    """The open WebSocket, or why that failed."""
    engine, address, timeout = load_engine(subject.engine), subject.address, subject.timeout
    with trio.move_on_after(timeout):
        opened: WebSocket | RelayConnectError = await nursery.start(_hold_open, engine, stream, address)
        return opened
    return RelayConnectError(f"{address} did not answer the request for a WebSocket within {timeout:g} seconds")


async def _hold_open(
    engine: Engine,
    stream: trio.abc.Stream,
    address: RelayAddress,
    *,
    task_status: trio.TaskStatus[WebSocket | RelayConnectError],
) -> None:
    try:
        with failures_named(address), lone_error_bare():
            async with engine.connect(
                stream, Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT)
            ) as websocket:
                task_status.started(websocket)
                await trio.sleep_forever()  # the caller cancels it
    except RelayConnectError as error:
        task_status.started(error)


def _check_captive_portal(finding: Finding, opened: WebSocket | RelayConnectError, certificate: Facts | None) -> None:
    if isinstance(opened, WebSocket):
        finding.ok("a WebSocket answers, and no sign-in page")
        return
    status = opened.__cause__.status if isinstance(opened.__cause__, WebSocketRefused) else None
    if status is None:
        finding.skipped("no HTTP answer came")
    elif not 200 <= status < 400:
        finding.ok(f"the answer is no sign-in page (HTTP status {status})")
    elif certificate is not None:
        finding.ok(f"the certificate proves that the answer (HTTP status {status}) comes from the relay's name")
    else:
        raise opened


def _check_clock(finding: Finding, date: str | None, certificate: Facts | None, now: float) -> None:
    clock, said = datetime.fromtimestamp(now, UTC), None
    with suppress(ValueError):
        said = None if date is None else parsedate_to_datetime(date).astimezone(UTC)
    if said is None:
        if certificate is None:
            finding.skipped("the answer has no date")
        else:
            finding.ok("it lies within the validity of the relay's certificate; the answer has no date")
        return
    skew = (clock - said).total_seconds()
    if abs(skew) <= LARGEST_SKEW:
        finding.ok(f"it differs from the relay's by {abs(skew):.0f} s")
    else:
        finding.warning(
            f"this host's clock says {say_time(clock)}, the relay's {say_time(said)}",
            "If it is this one that is wrong, set it: certificates are checked against it.",
        )


async def _check_proof(checks: Checks, websocket: WebSocket, subject: Subject) -> bool:
    """Do the handshake, and no more. False if it was not done, or the relay is too busy to say welcome."""
    address, timeout, target = subject.address, subject.timeout, subject.target
    if target is None:
        checks.skip(Name.PROOF, "no key was given")
        return False
    with checks.check(Name.PROOF) as finding:
        try:
            with failures_named(address):
                with trio.move_on_after(timeout):
                    welcome, _ = await authenticate(websocket, target, subject.relay_identity, ServiceOffer(None))
                    pinned = "" if subject.relay_identity is None else ", and has the pinned identity"
                    finding.ok(f"the relay accepts the key{pinned}; visitors come in at {welcome.public_url}")
                    return True
                raise RelayConnectError(f"{address} did not finish the handshake within {timeout:g} seconds")
        except RelayConnectError as error:
            if error.retry_after is None:
                raise
            finding.warning(str(error), "Another gateway has the tunnel, or the relay is overloaded. Try again later.")
    return False


async def _check_large_packets(checks: Checks, websocket: WebSocket, reached: Reached) -> None:
    """See whether TCP at the other end acknowledges packets of full size."""
    cure = (
        "A gateway tries smaller packets by itself when it has lost its link. Better give the network interface a lower"
        " MTU, such as 1280, or have the router or the VPN clamp the MSS."
    )
    with checks.check(Name.MTU, cure) as finding:
        watched = reached.stream
        before = watched.delivery()
        if before is None:
            finding.skipped("this system does not tell which packets have arrived")
            return
        try:
            await websocket.send([PADDING])
        except trio.BrokenResourceError as error:
            raise RelayConnectError(f"the relay ended the connection: {error}") from error
        with trio.move_on_after(ACKNOWLEDGED_WITHIN):
            while (delivery := watched.delivery()) is not None and delivery.waits:
                await trio.sleep(_PAUSE)
            finding.ok(f"packets of {before.segment} bytes reach the other end of the connection")
            return
        if delivery is None or delivery.acknowledged > before.written:
            finding.warning(f"{len(PADDING)} bytes did not arrive within {ACKNOWLEDGED_WITHIN:g} s: a slow network")
        elif await small_packets_arrive(reached, timeout=ACKNOWLEDGED_WITHIN):
            raise RelayConnectError(f"packets of {before.segment} bytes get lost on the way, and small ones arrive")
        else:
            raise RelayConnectError("nothing arrives any more, whatever its size")
