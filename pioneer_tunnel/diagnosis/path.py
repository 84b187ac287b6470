"""The way to the relay below the WebSocket: names, TCP and TLS."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, final

import attrs
import trio

from .._model.addresses import is_ip_address, is_loopback
from .._model.errors import RelayConnectError, RelayResolveError
from .._net.adopted import Watched, watch
from .._net.dialing import dial_tcp, resolve
from .._net.tls.handshake import begin_tls
from .._net.tls.stream import TlsStream
from . import certificates
from .checks import CheckFailedError, Checks, Finding, Name
from .subject import Subject, Trust

__all__ = ["Reached", "check_names", "check_proxy", "check_tcp", "check_tls", "say_time", "small_packets_arrive"]

SMALL_SEGMENT: Final = 1220
"""Bytes of data in a packet that any path of IPv6 carries."""

_PATIENCE: Final = 1.0
"""Seconds that other addresses still have when one has answered."""

_CONNECTED: Final = "connected"
_REFUSED: Final = (
    "The host answers, and nothing listens at this port. Compare the port with what the relay's operator gave you. If"
    " it is right, the relay does not run."
)
_NO_WAY: Final = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


@final
@attrs.frozen(kw_only=True)
class Reached:
    """A TCP connection to the relay, or to the proxy on the way.

    Attributes:
        stream: the connection.
        host, port: the IP address and the port at its other end.
    """

    stream: Watched
    host: str
    port: int


async def check_names(checks: Checks, subject: Subject) -> list[str]:
    """Resolve the name of the relay, or of the proxy that resolves it; returns the IP addresses."""
    via = subject.via
    host, timeout = subject.address.host if via is None else via.proxy.host, subject.timeout
    of_proxy = "" if via is None else f"{via}: "
    cure = "Compare the name with what the relay's operator gave you. Does this host resolve other names?"
    with checks.check(Name.NAMES, cure) as finding:
        if is_ip_address(host):
            finding.ok(f"{of_proxy}{host} is an IP address, not a name")
            return [host]
        try:
            addresses = await resolve(host, timeout=timeout)
        except socket.gaierror as error:
            raise RelayResolveError(f"{of_proxy}{host!r} does not resolve: {error.strerror}") from error
        v4 = ", ".join(address for address in addresses if ":" not in address)
        v6 = ", ".join(address for address in addresses if ":" in address)
        finding.ok(f"{of_proxy}IPv4: {v4 or 'none'}; IPv6: {v6 or 'none'}")
    return addresses


@final
@attrs.define
class _Attempt:
    """An attempt to connect to one address.

    Attributes:
        host, why: the address, and what came of it.
        no_way: whether this host has no way to the address at all.
        refused: whether the host at the address has refused.
        stream: the connection.
    """

    host: str
    why: str
    no_way: bool = False
    refused: bool = False
    stream: Watched | None = None

    def __str__(self) -> str:
        return f"{self.host}: {self.why}"


async def check_tcp(checks: Checks, subject: Subject, addresses: Sequence[str]) -> Reached:
    """Connect to each of `addresses`; returns the first connection."""
    port, timeout = subject.address.port if subject.via is None else subject.via.proxy.port, subject.timeout
    cure = (
        "Compare the port with what the relay's operator gave you. If it is right, the relay is down, or a firewall on"
        " the way lets nothing through."
    )
    with checks.check(Name.TCP, cure) as finding:
        attempts = await _connect_to_all(addresses, port, timeout)
        told = "; ".join(map(str, attempts))
        connected = next((attempt for attempt in attempts if attempt.stream is not None), None)
        if any(attempt.refused for attempt in attempts) and all(
            attempt.refused or attempt.no_way for attempt in attempts
        ):
            finding.cure = _REFUSED
        if connected is None or connected.stream is None:
            raise RelayConnectError(f"no connection to port {port}: {told}")
        if all(attempt.no_way or attempt.why == _CONNECTED for attempt in attempts):
            finding.ok(told)
        else:
            finding.warning(told, "A gateway tries all addresses at once, so it connects; ask the relay's operator.")
    return Reached(stream=connected.stream, host=connected.host, port=port)


async def _connect_to_all(addresses: Sequence[str], port: int, timeout: float) -> list[_Attempt]:
    """Connect to all addresses at once, and keep the first connection."""
    attempts = [_Attempt(address, "no answer") for address in addresses]

    async def connect(attempt: _Attempt) -> None:
        try:
            stream = await dial_tcp(attempt.host, port)
        except OSError as error:
            attempt.why, attempt.no_way = error.strerror or str(error), error.errno in _NO_WAY
            attempt.refused = isinstance(error, ConnectionRefusedError)
            return
        attempt.why = _CONNECTED
        if any(other.stream is not None for other in attempts):
            await trio.aclose_forcefully(stream)
        else:
            attempt.stream = watch(stream)
            deadline.deadline = min(deadline.deadline, trio.current_time() + _PATIENCE)

    try:
        with trio.move_on_after(timeout) as deadline:
            async with trio.open_nursery() as nursery:
                for attempt in attempts:
                    nursery.start_soon(connect, attempt)
    except BaseException:
        for attempt in attempts:
            if attempt.stream is not None:
                await trio.aclose_forcefully(attempt.stream)
        raise
    return attempts


async def check_proxy(checks: Checks, subject: Subject, reached: Reached) -> trio.abc.Stream:
    """Ask the proxy on the way, if there is one, for a tunnel to the relay; returns the tunnel."""
    if subject.via is None:
        checks.skip(Name.PROXY, "none is configured, and the environment names none")
        return reached.stream
    with checks.check(Name.PROXY, "Does the proxy let this host reach the relay's name and port?") as finding:
        tunnel = await _enter(subject, reached.stream)
        finding.ok(f"{subject.via} has made a tunnel")
    return tunnel


async def _enter(subject: Subject, stream: Watched) -> trio.abc.Stream:
    """`stream`, or the tunnel that it becomes through the proxy."""
    if subject.via is None:
        return stream
    return await subject.via.enter(stream, subject.address.host, subject.address.port, timeout=subject.timeout)


async def check_tls(
    checks: Checks, subject: Subject, reached: Reached, stream: trio.abc.Stream
) -> tuple[trio.abc.Stream, certificates.Facts | None]:
    """Open TLS, where the relay is dialled with it; returns the stream, and what the relay's certificate tells."""
    if subject.trust is None:
        with checks.check(Name.TLS) as finding:
            if is_loopback(subject.address.host) or (subject.via is None and is_loopback(reached.host)):
                finding.skipped("the relay is dialled without TLS, on this host")
            else:
                finding.warning(
                    "there is none: on the way, visitors' traffic and tokens can be read and changed",
                    "Dial a wss:// address, or use the transport tls.",
                )
        checks.skip(Name.INTERCEPTION, "there is no TLS")
        return stream, None
    try:
        with checks.check(Name.TLS) as finding:
            secured, certificate = await _open_tls(finding, subject, reached, stream)
    except CheckFailedError as failure:
        if _was_not_trusted(failure):
            await _tell_of_certificate(checks, subject, reached)
        raise
    with checks.check(Name.INTERCEPTION) as finding:
        chain = secured.peer_certificates
        await trio.to_thread.run_sync(
            _check_interception, finding, chain, certificate, subject.trust, abandon_on_cancel=True
        )
    return secured, certificate


async def _open_tls(
    finding: Finding, subject: Subject, reached: Reached, stream: trio.abc.Stream
) -> tuple[TlsStream, certificates.Facts | None]:
    assert subject.trust is not None
    context: ssl.SSLContext | None = None
    with trio.move_on_after(subject.timeout):
        context = await trio.to_thread.run_sync(subject.trust.make_context, abandon_on_cancel=True)
    if context is None:
        raise RelayConnectError(f"the trusted certificates could not be read within {subject.timeout:g} seconds")
    try:
        secured = await begin_tls(
            stream,
            context,
            host=subject.address.host,
            what=str(subject.address) if subject.via is None else f"{subject.address} through {subject.via}",
            without_tls="A relay without TLS is dialled by a ws:// address",
            timeout=subject.timeout,
            https=True,
        )
    except RelayConnectError as error:
        too_slow = error.__cause__ is None
        if too_slow and await _handshake_again(subject, reached, segment=SMALL_SEGMENT) is not None:
            raise RelayConnectError(
                f"{error}; with packets of {SMALL_SEGMENT} bytes it is, so larger ones get lost on the way"
            ) from None
        raise
    certificate = next(map(certificates.read, secured.peer_certificates), None)
    until = "" if certificate is None else f"; the certificate is valid until {say_time(certificate.not_after)}"
    finding.ok(f"{secured.version}{until}")
    return secured, certificate


def _was_not_trusted(failure: CheckFailedError) -> bool:
    broken = failure.__cause__ and failure.__cause__.__cause__
    return broken is not None and isinstance(broken.__cause__, ssl.SSLCertVerificationError)


async def _handshake_again(subject: Subject, reached: Reached, *, segment: int | None = None) -> list[bytes] | None:
    """The certificates of another connection, unchecked; None if its handshake fails. Nothing is sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    with trio.move_on_after(subject.timeout), suppress(OSError, trio.BrokenResourceError, RelayConnectError):
        stream = watch(await dial_tcp(reached.host, reached.port, segment=segment))
        try:
            tunnel = await _enter(subject, stream)
            secured = TlsStream(tunnel, context, server_hostname=subject.address.host, https=True)
            await secured.do_handshake()
            return secured.peer_certificates
        finally:
            await trio.aclose_forcefully(stream)
    return None


async def small_packets_arrive(reached: Reached, *, timeout: float) -> bool:
    """Whether another connection to the same address comes about, which takes small packets alone."""
    with trio.move_on_after(timeout), suppress(OSError):
        await trio.aclose_forcefully(await dial_tcp(reached.host, reached.port))
        return True
    return False


async def _tell_of_certificate(checks: Checks, subject: Subject, reached: Reached) -> None:
    """What a certificate tells that was not trusted: who issued it, and whether the clock may be the reason."""
    shown = await _handshake_again(subject, reached)
    certificate = certificates.read(shown[0]) if shown else None
    if certificate is None:
        return
    with checks.check(Name.INTERCEPTION) as finding:
        finding.warning(
            f"the certificate that came is for {certificate.subject!r} and was issued by {certificate.issuer!r}",
            "If that is not the relay's authority, something on the way opens TLS, or answers in the relay's place.",
        )
    clock = datetime.fromtimestamp(subject.wall_clock(), UTC)
    if not certificate.not_before <= clock <= certificate.not_after:
        with checks.check(Name.CLOCK) as finding:
            finding.warning(
                f"this host's clock says {say_time(clock)}; the certificate is valid from"
                f" {say_time(certificate.not_before)} to {say_time(certificate.not_after)}",
                "If the clock is wrong, set it. If it is right, the relay's operator has to renew the certificate.",
            )


def _check_interception(
    finding: Finding, chain: list[bytes], certificate: certificates.Facts | None, trust: Trust
) -> None:
    """Blocks: it reads files."""
    if certificate is None:
        finding.skipped("the certificate cannot be read")
        return
    issued = f"issued by {certificate.issuer!r}"
    if trust.ca_file is not None and certificates.added_authority(chain, [trust.ca_file]) is not None:
        finding.ok(f"{issued}, an authority of the configured CA file")
        return
    if (file := certificates.added_authority(chain)) is not None:
        finding.warning(
            f"{issued}, an authority that was added to this host: {file}",
            "If it belongs to a proxy or a virus scanner, that reads all traffic; have the relay's name exempted.",
        )
        return
    replaced = [
        name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if trust.system_trust == "openssl" and name in os.environ
    ]
    if replaced:
        finding.ok(f"{issued}; the authorities that are trusted here come from {' and '.join(replaced)}")
    elif certificates.knows_added():
        directly = "" if hasattr(ssl.SSLObject, "get_verified_chain") else " directly"  # Python 3.13 shows the chain
        finding.ok(f"{issued}, and not{directly} by an authority that was added to this host")
    else:
        finding.skipped(f"{issued}; this system does not tell which authorities were added to it")


def say_time(time: datetime) -> str:
    """A time, for a person."""
    return f"{time:%Y-%m-%d %H:%M} UTC"
