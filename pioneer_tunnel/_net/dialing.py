"""Connects to an address and returns a Trio stream: name resolution, TCP, TLS.

Each call resolves the name again. Its addresses, IPv6 and IPv4, are tried in parallel. A test, or a host with a network
of its own, passes its own `Dialer`. Failures are raised as `TunnelError`s.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, final

import trio

from .._model.addresses import Address, HttpsAddress, LocalAddress, RelayAddress, UnixAddress
from .._model.errors import InvalidSettingsError, LocalGatewayError, RelayConnectError, RelayResolveError
from .._model.proxies import Proxy
from .adopted import Watched, watch
from .proxies.entering import Via
from .socket_options import limit_segment, limit_unsent, reset_on_close, send_promptly
from .tcp import CAN_USE_DESCRIPTORS, TcpStream
from .tls.client import client_tls, why_tls_failed
from .tls.handshake import begin_tls
from .tls.resumption import Resumption
from .tls.stream import TlsStream

__all__ = [
    "HEAD_START",
    "Attempt",
    "Dialer",
    "ResolvingDialer",
    "begin_dial",
    "dial_local",
    "dial_relay",
    "dial_tcp",
    "first_to_connect",
    "ip_address_of",
    "resolve",
    "secure_local",
]

HEAD_START: Final = 0.25
"""Seconds until the next address is tried in parallel (RFC 8305 recommends 250 ms)."""

_NOT_BLOCKING: Final = getattr(socket, "SOCK_NONBLOCK", 0)
_UNDER_WAY: Final = {errno.EINPROGRESS, errno.EWOULDBLOCK}
_BACKLOG_PAUSE: Final = 0.01
"""Seconds between attempts to connect to a Unix socket whose backlog is full. Nothing reports that it has room."""


class Dialer(Protocol):
    """How to make a TCP connection."""

    async def __call__(self, host: str, port: int) -> trio.abc.Stream:
        """Connect to `host`, a name or an IP address, at `port`. The caller sets the deadline.

        Raises:
            socket.gaierror: the name does not resolve.
            OSError: no address of the host could be connected to.
        """


async def dial_tcp(host: str, port: int, *, segment: int | None = None) -> trio.SocketStream:
    """The default dialer.

    Args:
        segment: the most bytes of a packet, in both directions. It applies only if `host` is an IP address.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    attempt = begin_dial(host, port, segment=segment)
    if attempt is None:
        return await first_to_connect(await resolve(host), port)
    return trio.SocketStream(trio.socket.from_stdlib_socket(attempt.at_once() or await attempt.wait()))


class ResolvingDialer(ABC):
    """A dialer in two steps, so that each step has a deadline of its own."""

    async def __call__(self, host: str, port: int) -> trio.abc.Stream:
        return await self.connect(await resolve(host), port)

    @abstractmethod
    async def connect(self, addresses: Sequence[str], port: int) -> trio.abc.Stream:
        """Connect to one of the IP addresses of a host. The caller sets the deadline.

        Raises:
            OSError: none of them could be connected to.
        """


async def resolve(host: str, *, timeout: float = math.inf) -> list[str]:
    """The IP addresses of `host`, in the order in which to try them. An IP address is its own.

    Args:
        host: a name or an IP address.
        timeout: seconds; by default the caller has the deadline. A system's resolver takes half a minute, or longer, to
            give up.

    Raises:
        socket.gaierror: the name does not resolve, or no name server answered in time.
    """
    if _family_of(host) is not None:
        return [host]
    try:
        with trio.fail_after(timeout):
            found = await trio.socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except trio.TooSlowError:
        raise socket.gaierror(socket.EAI_AGAIN, f"no name server answered within {timeout:g} seconds") from None
    addresses = list(dict.fromkeys(ip_address_of(sockaddr) for *_, sockaddr in found))
    # The second attempt uses the other family (RFC 8305), for hosts where one of them leads nowhere.
    other = next((index for index, text in enumerate(addresses) if (":" in text) != (":" in addresses[0])), 1)
    addresses[1 : other + 1] = addresses[other : other + 1] + addresses[1:other]
    return addresses


def ip_address_of(sockaddr: tuple[Any, ...]) -> str:
    """The IP address of a socket's name as text, with the interface that an IPv6 address may be limited to."""
    host, _, *scope = sockaddr
    return f"{host}%{scope[1]}" if scope and scope[1] else str(host)


@final
class Attempt:
    """A connection attempt to an IP address. Call `at_once` first; if that returns None, await `wait`.

    Args:
        resets, segment: see `begin_dial`.
    """

    def __init__(
        self, family: socket.AddressFamily, host: str, port: int, *, resets: bool, segment: int | None
    ) -> None:
        self._socket: Final = socket.socket(family, socket.SOCK_STREAM | _NOT_BLOCKING)
        try:
            if not _NOT_BLOCKING:
                self._socket.setblocking(False)
            if resets:
                reset_on_close(self._socket)
            if segment is not None:
                limit_segment(self._socket, segment)
            failure = self._socket.connect_ex((host, port))
            if failure and failure not in _UNDER_WAY:
                raise OSError(failure, os.strerror(failure))
        except BaseException:
            self._socket.close()
            raise

    def at_once(self) -> socket.socket | None:
        """The connected socket if it is connected already, as between two programs of one host; else None."""
        try:
            self._socket.getpeername()
        except OSError:
            return None
        return self._connected()

    async def wait(self) -> socket.socket:
        """The connected socket.

        Raises:
            OSError: it could not be connected.
        """
        try:
            await trio.lowlevel.wait_writable(self._socket)
            failure = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, os.strerror(failure))
            return self._connected()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Give it up. Not needed after `wait`."""
        self._socket.close()

    def _connected(self) -> socket.socket:
        send_promptly(self._socket)
        limit_unsent(self._socket)
        return self._socket


def begin_dial(host: str, port: int, *, resets: bool = False, segment: int | None = None) -> Attempt | None:
    """Start connecting to `host`; None if it is a name. An address needs no resolver, which in Trio is a thread.

    Args:
        resets: set `reset_on_close` before the socket connects, see `LentSocket`.
        segment: see `limit_segment`.

    Raises:
        OSError: refused at once.
    """
    family = _family_of(host)
    return None if family is None else Attempt(family, host, port, resets=resets, segment=segment)


@functools.lru_cache(maxsize=256)
def _family_of(host: str) -> socket.AddressFamily | None:
    """The family of an IP address; None for a name."""
    if not Address(host, 1).is_ip:
        return None
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def first_to_connect(
    hosts: Sequence[str],
    port: int,
    head_starts: Iterable[float] = itertools.repeat(HEAD_START),
    *,
    segment: int | None = None,
) -> trio.SocketStream:
    """Connect to one of several IP addresses. The caller sets the deadline.

    Args:
        hosts: the addresses, in the order in which they are tried.
        port: the port of all.
        head_starts: for each address, the seconds until the next one is tried in parallel. After a failure the next one
            is tried at once (default `HEAD_START`).

    Raises:
        OSError: none could be connected to.
    """
    connected: list[trio.SocketStream] = []
    failures: list[OSError] = []

    async def connect(host: str, failed: trio.Event) -> None:
        try:
            connected.append(await dial_tcp(host, port, segment=segment))
        except OSError as error:
            failures.append(error)
            failed.set()
        else:
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for host, head_start in zip(hosts, head_starts, strict=False):
                failed = trio.Event()
                nursery.start_soon(connect, host, failed)
                with trio.move_on_after(head_start):
                    await failed.wait()
    except BaseException:
        for stream in connected:
            stream.socket.close()
        raise
    if not connected:
        raise OSError(f"all attempts failed: no address could be connected to at port {port}") from ExceptionGroup(
            "attempts", failures
        )
    for stream in connected[1:]:
        stream.socket.close()
    return connected[0]


async def dial_relay(
    address: RelayAddress,
    *,
    dial: Dialer,
    tls: ssl.SSLContext | None,
    timeout: float,
    via: Via | None = None,
    what: str = "the relay",
    resumption: Resumption | None = None,
) -> tuple[trio.abc.Stream, Watched]:
    """Connect to a relay, with TLS when a context is given; returns the stream, and the lowest stream below it.

    Args:
        timeout: seconds for each of name resolution (with a `ResolvingDialer`), the connection, the tunnel through the
            proxy, and the TLS handshake.
        via: the proxy on the way; None (default) for none. With a proxy its name alone is resolved here.
        what: names what is dialled, for the errors.
        resumption: has the TLS session of the last connection to the relay; None to begin a new one.

    Raises:
        RelayResolveError: the name of the relay, or of the proxy, does not resolve, or not in time.
        RelayConnectError: the connection, the proxy or the TLS handshake failed.
    """
    if via is None:
        watched = await _dial(address, dial, what=what, shown=f"{what} at {address}", timeout=timeout)
    else:
        watched = await _dial(via.proxy, dial, what="the proxy", shown=str(via), timeout=timeout)
    stream: Watched | TlsStream = watched
    if via is not None:
        stream = await via.enter(watched, address.host, address.port, timeout=timeout)
    if tls is None:
        return stream, watched
    try:
        secured = await begin_tls(
            stream,
            tls,
            host=address.host,
            what=str(address) if via is None else f"{address} through {via}",
            without_tls="A relay without TLS is dialled by a ws:// address",
            timeout=timeout,
            https=True,
            hint="" if via is None else "; a proxy that opens TLS shows a certificate of its own",
            resumption=resumption,
        )
    except BaseException:
        await trio.aclose_forcefully(watched)
        raise
    return secured, watched


async def _dial(address: RelayAddress | Proxy, dial: Dialer, *, what: str, shown: str, timeout: float) -> Watched:
    try:
        connect = await _resolved(dial, address.host, address.port, timeout=timeout)
        with trio.fail_after(timeout):
            return watch(await connect())
    except socket.gaierror as error:
        raise RelayResolveError(f"{what}'s name {address.host!r} does not resolve: {error.strerror}") from error
    except OSError as error:
        raise RelayConnectError(f"cannot connect to {shown}: {_why(error)}") from error
    except trio.TooSlowError:
        raise RelayConnectError(f"{shown} did not answer within {timeout:g} seconds") from None


def begin_dial_local(address: LocalAddress, *, dial: Dialer) -> Attempt | None:
    """Start connecting to the local gateway, as `dial_local` does; None if it begins otherwise, or fails at once."""
    if not CAN_USE_DESCRIPTORS or dial is not dial_tcp or isinstance(address, UnixAddress):
        return None
    try:
        return begin_dial(address.host, address.port, resets=True)
    except OSError:
        return None


async def dial_local(address: LocalAddress, *, dial: Dialer, timeout: float, attempt: Attempt | None = None) -> Watched:
    """Connect to the local gateway, without TLS. Only `aclose` sends a FIN; any other close is a RST, see `LentSocket`.

    A Unix socket cannot be reset: any close is an EOF for the gateway. `dial` has nothing to do with it.

    Args:
        attempt: from `begin_dial_local`. It is not connected yet, and is closed if this raises.

    Raises:
        LocalGatewayError: nothing answers there within `timeout` seconds.
    """
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
    except trio.Cancelled:
        if attempt is not None:
            attempt.close()
        raise
    try:
        if isinstance(address, UnixAddress):
            with trio.move_on_after(timeout):
                return watch(await _dial_unix(address.path))
        else:
            # A deadline costs time for each visitor, and a local connection is mostly connected at once.
            if attempt is None and CAN_USE_DESCRIPTORS and dial is dial_tcp:
                attempt = begin_dial(address.host, address.port, resets=True)
                connected = None if attempt is None else attempt.at_once()
                if connected is not None:
                    return TcpStream(connected, resets=True)
            connect = None if attempt else await _resolved(dial, address.host, address.port, timeout=timeout)
            with trio.move_on_after(timeout):
                if attempt is not None:
                    return TcpStream(await attempt.wait(), resets=True)
                assert connect is not None
                stream = watch(await connect())
                if isinstance(stream, TcpStream):
                    stream.plain_socket.arm_reset()
                return stream
    except socket.gaierror as error:
        why = f"its name does not resolve: {error.strerror}"
        raise LocalGatewayError(f"the local gateway at {address} does not answer: {why}") from error
    except OSError as error:
        raise LocalGatewayError(f"the local gateway at {address} does not answer: {_why(error)}") from error
    raise LocalGatewayError(f"the local gateway at {address} did not answer within {timeout:g} seconds")


async def _resolved(dial: Dialer, host: str, port: int, *, timeout: float) -> Callable[[], Awaitable[trio.abc.Stream]]:
    """What connects to `host`, whose name is resolved now. A dialer that is one step does both when it is called."""
    if dial is dial_tcp:
        return functools.partial(first_to_connect, await resolve(host, timeout=timeout), port)
    if isinstance(dial, ResolvingDialer):
        return functools.partial(dial.connect, await resolve(host, timeout=timeout), port)
    return functools.partial(dial, host, port)


async def _dial_unix(path: str) -> trio.SocketStream:
    if not hasattr(socket, "AF_UNIX"):
        raise OSError("this system has no Unix sockets")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while failure := connection.connect_ex(path):
            if failure != errno.EAGAIN:
                raise OSError(failure, os.strerror(failure))
            await trio.sleep(_BACKLOG_PAUSE)
        return trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    except BaseException:
        connection.close()
        raise


async def secure_local(connection: Watched, address: HttpsAddress, *, timeout: float) -> TlsStream:
    """Make the TLS handshake with the local gateway. If this raises, `connection` is closed.

    Raises:
        LocalGatewayError: the handshake failed, took longer than `timeout` seconds, or the CA file cannot be used.
    """
    context: ssl.SSLContext | None = None
    try:
        with trio.move_on_after(timeout):
            context = await trio.to_thread.run_sync(_local_tls, address.ca_file, address.verify)
            # `https`: many local servers close without close_notify, and a browser would not mind either.
            secured = TlsStream(connection, context, server_hostname=address.host, https=True)
            await secured.do_handshake()
            return secured
    except BaseException as error:
        await trio.aclose_forcefully(connection)
        if isinstance(error, InvalidSettingsError):
            raise LocalGatewayError(f"the local gateway at {address} cannot be used: {error}") from error
        if isinstance(error, trio.BrokenResourceError):
            why = why_tls_failed(error.__cause__, context)
            raise LocalGatewayError(f"TLS with the local gateway at {address} failed: {why}") from error
        raise
    await trio.aclose_forcefully(connection)
    raise LocalGatewayError(f"TLS with the local gateway at {address} was not agreed on within {timeout:g} seconds")


@functools.lru_cache(maxsize=16)
def _local_tls(ca_file: Path | None, verify: bool) -> ssl.SSLContext:
    """Blocks. The context is kept: reading the system's certificates takes longer than the rest of a visit."""
    context = client_tls(ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _why(error: OSError) -> str:
    """The system's text for an error; of several attempts, that of the last."""
    if isinstance(error.__cause__, BaseExceptionGroup):
        attempts = [attempt for attempt in error.__cause__.exceptions if isinstance(attempt, OSError)]
        if attempts:
            error = attempts[-1]
    if error.errno is not None and error.errno in errno.errorcode:
        return os.strerror(error.errno)
    return str(error)
