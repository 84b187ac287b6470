"""What the attempts of one link share, so that each attempt uses the experience of earlier ones.

- Addresses. A relay's name may resolve to several. One of them may accept TCP and then stay silent, or close during TLS
  or the upgrade. An address counts as tried from the moment that it connects until the tunnel is up through it. The
  next attempt starts with an address that is not tried, or else with the one that was tried the longest time ago.
  An address that another link uses comes last.
- The size of packets. Some paths drop large packets without a word. Small ones arrive, so connecting works, and TLS
  stalls with its certificates, or the link with the first large answer. So after a link that was lost, and after an
  opening that failed, packets are limited.
- The heartbeat. A balancer or a NAT on the way may cut idle connections before the relay's heartbeat comes. After a
  link that was cut so, the gateway asks for the protocol's default.
- The TLS context, and the credentials for a proxy. They are made for each attempt, from files that another program may
  be replacing. Once the tunnel was up, the last good ones are used when the files are missing, partial or empty.

With a proxy, the first two are about the proxy's addresses and the path to it.
"""

from __future__ import annotations

import functools
import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, TypeVar, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.errors import InvalidSettingsError, RelayConnectError, StorageError
from .._model.log_fields import about
from .._model.proxies import ProxyCredentials
from .._net.dialing import HEAD_START, Dialer, ResolvingDialer, dial_tcp, first_to_connect, ip_address_of
from .._net.proxies.choice import ProxyChoice
from .._net.proxies.credentials_file import read_credentials
from .._net.proxies.entering import Via
from .._net.tls.client import trust_alike
from .._net.tls.resumption import Resumption
from .._wire.heartbeat import DEFAULT_HEARTBEAT_MS

__all__ = ["DEFAULT_RESUME_TIMEOUT", "Redial"]

DEFAULT_RESUME_TIMEOUT: Final = 60.0
"""Seconds that a session survives without a link."""

DEFAULT_HEARTBEAT: Final = DEFAULT_HEARTBEAT_MS / 1000
SEGMENTS: Final = (None, 1220, 536)
"""Bytes of a packet: unlimited, as much as any path of IPv6 carries, and what any path of IPv4 carries."""

_T = TypeVar("_T")

_log: Final = logging.getLogger("pioneer_tunnel.redial")


@final
class Redial:
    """The memory of one link to one relay, in one generation. A new generation has a new one.

    Args:
        beside: that of another link; None for the first one of a generation.
    """

    def __init__(self, beside: Redial | None = None) -> None:
        self._all: Final[list[Redial]] = [] if beside is None else beside._all
        self._all.append(self)
        self._uses: str | None = None  # the address, while a connection to it is made or up
        self._was_up = False
        self._tried: Final[dict[str, None]] = {}  # the address that was tried the longest time ago comes first
        self._connected_to: str | None = None
        self.resumption: Final = Resumption()
        self._context: Final[_Renewed[ssl.SSLContext]] = _Renewed()
        self._kept_context: ssl.SSLContext | None = None
        self._credentials: Final[_Renewed[ProxyCredentials]] = _Renewed()
        self._told_of_proxy = False
        self._narrowed = 0  # index into SEGMENTS
        self._cut_when_idle = False

    @property
    def addresses(self) -> list[str]:
        """The IP address that each link has connected to last, of the relay or of a proxy; empty before."""
        return [redial._connected_to for redial in self._all if redial._connected_to is not None]

    @property
    def _taken(self) -> set[str]:
        """The addresses that other links use."""
        return {redial._uses for redial in self._all if redial is not self and redial._uses is not None}

    def note_down(self) -> None:
        """Note that the link has no connection any more."""
        self._uses = None

    def note_up(self) -> None:
        """Note that the tunnel is up, through the address that was connected last."""
        self._was_up = True
        if self._connected_to is not None:
            self._tried.pop(self._connected_to, None)

    def heartbeat(self, wanted: float | None) -> float | None:
        """The heartbeat to ask the relay for, in seconds; None for the relay's own.

        Args:
            wanted: what the operator wants; None leaves it to the relay.
        """
        return min(wanted or DEFAULT_HEARTBEAT, DEFAULT_HEARTBEAT) if self._cut_when_idle else wanted

    def note_lost(self, *, stuck: bool, silence: float = 0, heartbeat: float = 0) -> None:
        """Note that a link ended without a word of the relay.

        Args:
            stuck: whether this end has sent large packets that did not arrive.
            silence: seconds in which nothing had come.
            heartbeat: seconds of silence after which this end would have pinged.
        """
        self._cut_when_idle |= DEFAULT_HEARTBEAT <= silence < heartbeat
        # The relay's large packets may vanish as well; then this end has nothing that is not acknowledged.
        self._narrowed = min(self._narrowed + 1, len(SEGMENTS) - 1) if stuck else max(self._narrowed, 1)

    def dialer(self, dial: Dialer, *, timeout: float) -> Dialer:
        """`dial`, with the addresses in the order of this memory. A dialer of the host's own is returned as it is.

        Args:
            timeout: seconds that a connection may take. A tried address is dialled after half of them.
        """
        return _RedialingDialer(self, timeout) if dial is dial_tcp else dial

    async def connect(self, addresses: Sequence[str], port: int, *, timeout: float) -> trio.SocketStream:
        """See `dialer`, whose second step this is."""
        connected = await self._connect(addresses, port, timeout)
        with suppress(OSError):  # the connection is broken; its user gets the error
            self._uses = self._connected_to = address = ip_address_of(connected.socket.getpeername())
            self._tried.pop(address, None)
            self._tried[address] = None
        return connected

    async def _connect(self, addresses: Sequence[str], port: int, timeout: float) -> trio.SocketStream:
        taken = self._taken.intersection(addresses)
        some_failed = not self._tried.keys().isdisjoint(addresses)
        segment = SEGMENTS[max(self._narrowed, int(some_failed))]
        if segment is None and not taken:
            return await first_to_connect(addresses, port)
        untried = [address for address in addresses if address not in self._tried.keys() | taken]
        tried = [address for address in self._tried if address in addresses and address not in taken]
        tried += [address for address in addresses if address in taken]
        # With a short head start, a near address that was tried would always win against a good one that is far away.
        head_starts = [*[HEAD_START] * len(untried), *[timeout / 2] * len(tried)]
        if untried:
            head_starts[len(untried) - 1] = timeout / 2
        return await first_to_connect([*untried, *tried], port, head_starts, segment=segment)

    async def tls(self, make: Callable[[], ssl.SSLContext], address: RelayAddress, *, timeout: float) -> ssl.SSLContext:
        """The TLS context for the next attempt. A thread makes it: that reads files and takes up to 0.4 seconds.

        It is the last one if both trust the same, so that its sessions can be resumed.

        Args:
            make: makes the context.
            address: the relay, for the error.
            timeout: seconds that this may take.

        Raises:
            InvalidSettingsError: a file cannot be used, and the tunnel was never up.
            StorageError: the same.
            RelayConnectError: it took too long.
        """

        def make_or_keep() -> ssl.SSLContext:
            made = make()
            if self._kept_context is None or not trust_alike(made, self._kept_context):
                self._kept_context = made
            return self._kept_context

        what = f"the certificates for TLS with {address}"
        return await self._context.renewed(make_or_keep, what=what, timeout=timeout, was_up=self._was_up)

    async def via(
        self, choice: ProxyChoice, make_tls: Callable[[], ssl.SSLContext], address: RelayAddress, *, timeout: float
    ) -> Via | None:
        """The proxy for the next attempt; None for none. A thread reads its credentials, and makes its TLS context.

        Args:
            choice: how the proxy is chosen.
            make_tls: makes the context, for an `https` proxy.
            address: the relay.
            timeout: seconds that each file may take.

        Raises:
            InvalidSettingsError: the environment's proxy cannot be used; or see `tls`.
            StorageError: the credentials cannot be read, and the tunnel was never up.
            RelayConnectError: it took too long.
        """
        chosen = choice.proxy_for(address.host, address.port)
        if chosen is None:
            return None
        if chosen.variable is not None and not any(redial._told_of_proxy for redial in self._all):
            self._told_of_proxy = True
            _log.info(
                "%s is dialled through the proxy %s, which the environment variable %s names",
                address,
                chosen.proxy,
                chosen.variable,
            )
        if choice.credentials_file is not None and chosen.variable is None:
            read = functools.partial(read_credentials, choice.credentials_file)
            what = f"the credentials for the proxy {chosen.proxy}"
            credentials = await self._credentials.renewed(read, what=what, timeout=timeout, was_up=self._was_up)
            chosen = attrs.evolve(chosen, proxy=chosen.proxy.with_credentials(credentials))
        tls = await self.tls(make_tls, address, timeout=timeout) if chosen.proxy.scheme == "https" else None
        return Via(chosen, tls)


@final
class _Renewed(Generic[_T]):
    """A value that is made again for each attempt, from files that another program may be replacing."""

    def __init__(self) -> None:
        self._value: _T | None = None
        self._making = False

    async def renewed(self, make: Callable[[], _T], *, what: str, timeout: float, was_up: bool) -> _T:
        """What `make` returns, in a thread. If it fails and the tunnel was up, the last good value.

        Args:
            what: names the value, for errors.
            timeout: seconds that this may take.
        """

        def make_and_note() -> _T:
            self._making = True
            try:
                return make()
            finally:
                self._making = False

        problem: Exception = RelayConnectError(f"{what} could not be read within {timeout:g} seconds")
        # A thread that hangs on a file cannot be stopped, so start at most one.
        if not self._making:
            try:
                with trio.move_on_after(timeout):
                    self._value = await trio.to_thread.run_sync(make_and_note, abandon_on_cancel=True)
                    return self._value
            except (InvalidSettingsError, StorageError) as error:
                problem = error
        if self._value is None or not was_up:
            raise problem
        _log.warning("%s; the last good ones stay in use", problem, extra=about("file_refused", reason=problem))
        return self._value


@final
@attrs.frozen
class _RedialingDialer(ResolvingDialer):
    redial: Redial
    timeout: float

    async def connect(self, addresses: Sequence[str], port: int) -> trio.SocketStream:
        return await self.redial.connect(addresses, port, timeout=self.timeout)
