"""An address in, a Trio stream out: names, TCP, TLS.

Names are resolved afresh at each call, IPv6 and IPv4 are tried together (`trio.open_tcp_stream` does both). A test,
or a host with a network of its own, puts its own `Dialer` in.

Neighbours: transports and the local side dial through here; everything that can go wrong leaves as a `TunnelError`.
Whom TLS trusts is decided in `trust`.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import ssl
from typing import Final, Protocol

import trio

from .address import Address, RelayAddress
from .errors import LocalGatewayError, RelayConnectError, RelayResolveError
from .streams import WatchedStream
from .tls_stream import TlsStream
from .trust import why_tls_failed

__all__ = ["Dialer", "dial_local", "dial_relay", "dial_tcp"]


_UNDER_WAY: Final = {errno.EINPROGRESS, errno.EWOULDBLOCK}


class Dialer(Protocol):
    """How a TCP connection comes about."""

    async def __call__(self, host: str, port: int) -> trio.abc.Stream:
        """Connect to `host`, a name or an IP address, at `port`. The caller sets the deadline.

        Raises:
            socket.gaierror: the name does not resolve.
            OSError: no address of it could be connected to.
        """


async def dial_tcp(host: str, port: int) -> trio.SocketStream:
    """The dialer that is used unless another one is given in."""
    family = _family_of(host)
    if family is None:
        return await trio.open_tcp_stream(host, port)
    # An address needs no resolver, which in Trio is a thread: this is several times as fast.
    await trio.lowlevel.checkpoint_if_cancelled()
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.setblocking(False)
        failure = plain.connect_ex((host, port))
        if failure in _UNDER_WAY:
            failure = await _connected(plain)
        if failure:
            raise OSError(failure, os.strerror(failure))
    except BaseException:
        plain.close()
        raise
    return trio.SocketStream(trio.socket.from_stdlib_socket(plain))


async def _connected(sock: socket.socket) -> int:
    """Wait until `sock` is connected, or not; returns the system's number for why not."""
    try:
        sock.getpeername()
    except OSError:
        await trio.lowlevel.wait_writable(sock)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return 0  # at once, as on one host: there is nothing to wait for


@functools.lru_cache(maxsize=256)
def _family_of(host: str) -> socket.AddressFamily | None:
    """That of a literal address, None of a name."""
    if not Address(host, 1).is_ip:
        return None
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def dial_relay(
    address: RelayAddress, *, dial: Dialer, tls: ssl.SSLContext | None, timeout: float
) -> tuple[trio.abc.Stream, WatchedStream]:
    """Connect to a relay, with TLS when a context is given; returns the stream, and the watched one at its bottom.

    Args:
        timeout: seconds for the connection, and again for the TLS handshake.

    Raises:
        RelayResolveError: the name does not resolve.
        RelayConnectError: nothing that can be talked to answers there.
    """
    try:
        with trio.fail_after(timeout):
            connected = await dial(address.host, address.port)
    except socket.gaierror as error:
        raise RelayResolveError(f"the relay's name {address.host!r} does not resolve: {error.strerror}") from error
    except OSError as error:
        raise RelayConnectError(f"cannot connect to the relay at {address}: {_why(error)}") from error
    except trio.TooSlowError:
        raise RelayConnectError(f"the relay at {address} did not answer within {timeout:g} seconds") from None
    watched = WatchedStream(connected)
    if tls is None:
        return watched, watched
    secured = TlsStream(watched, tls, server_hostname=address.host, https=True)
    try:
        with trio.fail_after(timeout):
            await secured.do_handshake()
    except BaseException as error:
        await trio.aclose_forcefully(watched)
        if isinstance(error, trio.TooSlowError):
            raise RelayConnectError(f"TLS with {address} was not agreed on within {timeout:g} seconds") from None
        if isinstance(error, trio.BrokenResourceError):
            raise RelayConnectError(f"TLS with {address} failed: {why_tls_failed(error.__cause__)}") from error
        raise
    return secured, watched


async def dial_local(address: Address, *, dial: Dialer, timeout: float) -> trio.abc.Stream:
    """Connect to the local gateway.

    Raises:
        LocalGatewayError: nothing answers there within `timeout` seconds.
    """
    try:
        with trio.move_on_after(timeout):
            return WatchedStream(await dial(address.host, address.port))
    except OSError as error:
        raise LocalGatewayError(f"the local gateway at {address} does not answer: {_why(error)}") from error
    raise LocalGatewayError(f"the local gateway at {address} did not answer within {timeout:g} seconds")


def _why(error: OSError) -> str:
    """The system's words for an error; of several attempts, those of the last."""
    if isinstance(error.__cause__, BaseExceptionGroup):
        attempts = [attempt for attempt in error.__cause__.exceptions if isinstance(attempt, OSError)]
        if attempts:
            error = attempts[-1]
    if error.errno is not None and error.errno in errno.errorcode:
        return os.strerror(error.errno)
    return str(error)
