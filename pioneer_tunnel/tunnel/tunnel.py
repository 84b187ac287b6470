"""The tunnel: a Trio listener for visitors who come through a relay. START READING HERE.

    async with open_tunnel("wss://relay.example.com", key=RelayKey("...")) as tunnel:
        await trio.serve_listeners(handler, [tunnel])

A visitor's bytes take this path:

    visitor ─ relay ═ WebSocket ═ link ─ yamux ─ Tunnel ─ handler, or `forward` to a local gateway

`transports` has the left part of the path, and `yamux` the middle. A `link` keeps itself up, and `supervisor` keeps the
links of the tunnel and publishes its status. A `Tunnel` outlives its connections: while they come back, `accept` waits.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final, final

import trio

from .._async_library import need_trio
from .._model.addresses import LocalAddress, RelayAddress, local_address
from .._model.engine_names import EngineName
from .._model.errors import InvalidSettingsError, TunnelError, UnsupportedTransportError, fresh_copy, is_copy
from .._model.exception_groups import leaves, open_tasks_beside_body, raise_bare
from .._model.keys import PublicKey, RelayKey
from .._model.proxies import Proxy, configured_proxy
from .._model.session_limits import Limits
from .._model.stats import TunnelStats
from .._model.status import State, Status
from .._model.text import redact_reason
from .._net.dialing import Dialer, dial_tcp
from .._net.network_changes import WatchNetwork
from .._net.proxies.choice import ProxyChoice
from .._net.tls.by_name import Certificates
from .._net.tls.client import SYSTEM_TRUSTS, SystemTrust, client_tls
from .._wire.links import MOST_LINKS
from ..certificates.config import AcmeConfig
from ..certificates.opening import open_certificates
from ..transports.built_in import TRANSPORTS, configured_transport
from ..transports.counts import TunnelCounts
from ..transports.interface import Event, Serve, Target, usable_key
from ..transports.rathole.key_mode import KeyMode
from ..transports.redial import DEFAULT_RESUME_TIMEOUT
from ..transports.services import Services
from ..transports.tunnel_stream import TunnelStream
from .automatic_tls import keep_certificates
from .forward import ProxyProtocol, probe_local
from .network import chosen_watch, follow_network
from .restart_policy import RestartPolicy
from .status_feed import StatusFeed
from .supervisor import Supervisor, announce

if TYPE_CHECKING:
    from ..certificates.keeper import AcmeCertificates

__all__ = ["Tunnel", "open_tunnel"]

DEFAULT_SERVICE: Final = "pioneer_gateway"
DEFAULT_BACKLOG: Final = 256
STOP_GRACE: Final = 5.0
_BARE: Final = ("tcp", "tls")


@final
class Tunnel(trio.abc.Listener[TunnelStream]):
    """A listener whose streams are visitors of a relay. Made by `open_tunnel`.

    Not promised: an order among visitors that come at the same moment.
    """

    def __init__(
        self, feed: StatusFeed, supervisor: Callable[[Tunnel], Supervisor], backlog: int, counts: TunnelCounts
    ) -> None:
        self._feed: Final = feed
        self._counts: Final = counts
        self._deliver, self._visitors = trio.open_memory_channel[TunnelStream](backlog)
        self._take: Callable[[TunnelStream], None] | None = None
        self._failure: TunnelError | None = None
        self._running: Final = trio.CancelScope()
        self._ended: Final = trio.Event()
        self._supervisor: Final = supervisor(self)
        self.certificates: Certificates | None = None
        """The certificates that `acme` orders, for `terminate_tls`; None without `acme`."""

    @property
    def status(self) -> Status:
        """Where the tunnel stands now."""
        return self._feed.current

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._feed.history

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._feed.dropped

    @property
    def public_url(self) -> str | None:
        """The URL for visitors, as the relay reports it; None before the first connect."""
        return self._feed.current.public_url

    def stats(self) -> TunnelStats:
        """What the tunnel has done and holds, as of now; also after its end. Does not wait.

        Transport `websocket` counts streams and bytes, `tcp` and `tls` count streams alone, and `process` nothing.
        """
        return self._counts.stats(self._supervisor.sessions)

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`. Slow watchers skip, never block."""
        return self._feed.watch()

    async def wait_connected(self) -> Status:
        """Wait until the tunnel is up. The tunnel retries without a deadline; set one with `trio.fail_after`.

        Raises:
            TunnelError: the tunnel has failed for good.
            trio.ClosedResourceError: it was closed.
        """
        async for status in self._feed.watch():
            if self._failure is not None:
                raise fresh_copy(self._failure)
            if status.state is State.CONNECTED:
                return status
            if status.state is State.STOPPED:
                break
        raise trio.ClosedResourceError("the tunnel was closed")

    async def accept(self) -> TunnelStream:
        """Wait for the next visitor, through reconnects, for as long as it takes.

        Raises:
            TunnelError: the tunnel has failed for good; each call raises a copy of the same one.
            trio.ClosedResourceError: it was closed, or is drained.
        """
        while True:
            try:
                stream = await self._visitors.receive()
            except trio.EndOfChannel:
                if self._failure is None:
                    raise trio.ClosedResourceError("the tunnel was drained") from None
                raise fresh_copy(self._failure) from self._failure.__cause__
            if stream.usable:
                stream.acknowledge()
                return stream
            stream.reset()  # the visitor left while it waited; what it sent is dropped

    def report(self, event: Event) -> None:
        """Report whether the local gateway answers: for `forward(..., report=tunnel.report)`.

        After three failures in a row the status is `connected` with `local_gateway_unavailable`, until a visitor
        reaches the gateway or, with `open_tunnel(..., local=...)`, a probe does.
        """
        self._supervisor.report(event)

    def retry_now(self) -> None:
        """Retry now, if the tunnel waits before a retry; if it is up, check the link. Does not wait.

        For a host that knows more of the network than this system tells. A link that shows no sign of life within 2
        seconds is dialled again. Not promised: a check of a link of transport `process`.
        """
        self._supervisor.retry_now()

    async def drain(self, grace: float = STOP_GRACE) -> None:
        """Stop in order: ask the relay for no more visitors, wait until those who are there have gone, and disconnect.

        `accept` still returns the visitors who wait already, then it raises `trio.ClosedResourceError`. Without
        visitors this returns at once, apart from a goodbye to the relay of a second at most. Then the status is
        `stopped`, and visitors who are left are reset. If cancelled, it disconnects at once.

        Not promised: that a visitor who comes at this moment is served. Over `tcp` and `tls` the relay cannot be asked,
        and goes on sending visitors, who are reset. With a transport that does not know its visitors, none is waited
        for (`process`, and one of your own whose `Session` has no `drain`).

        Args:
            grace: seconds that visitors have (default 5).
        """
        self._take = None
        self._deliver.close()
        try:
            with trio.move_on_after(grace):
                await self._supervisor.drain()
        finally:
            self._running.cancel()
        await self._ended.wait()

    async def aclose(self) -> None:
        """Accept no more visitors, and reset those that wait. The connection ends with the block of `open_tunnel`."""
        self._stop_accepting()
        await trio.lowlevel.checkpoint()

    def _stop_accepting(self) -> None:
        self._take = None
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self._visitors.receive_nowait().reset()
        self._visitors.close()

    def deliver(self, stream: TunnelStream) -> None:
        """Take a visitor's stream; the supervisor's transport calls this.

        Raises:
            trio.WouldBlock: the backlog is full, or the tunnel is closed.
        """
        try:
            if self._take is not None:
                stream.acknowledge()
                self._take(stream)
            else:
                self._deliver.send_nowait(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise trio.WouldBlock from None

    def _divert(self, take: Callable[[TunnelStream], None]) -> None:
        """Call `take` for each visitor that comes from now on, in place of `accept`. It must not wait or raise."""
        self._take = take

    async def _run(self) -> None:
        try:
            with self._running:
                await self._supervisor.run()
            self._supervisor.stopped()
        except TunnelError as error:
            self._failure = fresh_copy(error)
            self._deliver.close()
        finally:
            self._ended.set()

    def __repr__(self) -> str:
        return f"<Tunnel {self._feed.current.state}>"


@asynccontextmanager
async def open_tunnel(
    relay: str | RelayAddress | Sequence[str | RelayAddress],
    *,
    key: RelayKey,
    links: int | None = None,
    service: str = DEFAULT_SERVICE,
    instance: str | None = None,
    ca_file: Path | str | None = None,
    system_trust: SystemTrust = "openssl",
    proxy: Proxy | str | None = None,
    proxy_credentials_file: Path | str | None = None,
    relay_identity: PublicKey | str | None = None,
    restart: RestartPolicy | None = None,
    connect_timeout: float = 10.0,
    heartbeat: float | None = None,
    resume_timeout: float = DEFAULT_RESUME_TIMEOUT,
    backlog: int = DEFAULT_BACKLOG,
    limits: Limits | None = None,
    dial: Dialer = dial_tcp,
    watch_network: WatchNetwork | None = None,
    transport: Serve | str = "websocket",
    key_mode: KeyMode | str = KeyMode.TOKEN_ROUTING,
    websocket_engine: EngineName | None = None,
    local: str | LocalAddress | None = None,
    services: Services | Mapping[str, str | LocalAddress] | None = None,
    proxy_protocol: ProxyProtocol | None = None,
    acme: AcmeConfig | None = None,
    random: Random | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Tunnel]:
    """Keep a tunnel to `relay`, or to several relays, open for the length of an `async with`.

    The block is entered without waiting for the relay (`Tunnel.wait_connected` waits). On exit the tunnel says goodbye
    to the relay, for a second at most, and leaves no task or socket behind.

    An exception of the body comes out as it is, not in a group; a group that the body raises stays that group. The
    exception is a final `TunnelError`, which comes out bare when nothing else is in the group. A bug in the tunnel's
    own task (for example, a `random` that raises) cancels the body and comes out; so does `KeyboardInterrupt`, and an
    `AssertionError` of a transport of your own. Any other `Exception` of a transport that is no `TunnelError` is logged
    and retried.

    Args:
        relay: a `ws://` or `wss://` URL; a bare `host:port` is dialled as `wss://`. For `tcp` and `tls` always bare.
            Or several of these, the preferred ones first.
        key: proves this gateway to the relay. It is never sent.
        links: how many links to keep, 1 to 8, each to another relay where there are enough; by default one to each
            relay, and 8 at most. Further relays stand in for those that fail. While one link is up the tunnel is
            connected.
        service: the service label.
        instance: tells this gateway from another one with the same key; by default a random one for this tunnel.
        ca_file: PEM certificates to trust in addition to the system's.
        system_trust: which certificates of the system: `"openssl"`, the files that Python's OpenSSL knows (default);
            or `"os"`, what the operating system trusts, by its own rules. That needs the extra `truststore`.
        proxy: the proxy on the way to the relay, as a `http://`, `https://` or `socks5://` URL without credentials, or
            as a `Proxy`; `"none"` for none. By default (None) the environment says it: `HTTPS_PROXY`, else
            `ALL_PROXY`, unless `NO_PROXY` lists the relay, the relay is on loopback, or `dial` is given.
        proxy_credentials_file: a file with one line `user:password` for `proxy`, which only its owner may read. It is
            read for each attempt.
        relay_identity: the only relay to accept, as `ed25519:...`; by default any that TLS accepts. `websocket` only.
        restart: when to retry (default `RestartPolicy()`).
        connect_timeout: seconds for each step of connecting (default 10).
        heartbeat: seconds without a byte, 1 to 60, after which the relay and this gateway ping each other, if that is
            shorter than the relay's own; by default (None) the relay's, most often 15. `websocket` only.
        resume_timeout: seconds that visitors' streams survive without a link to the relay, where the relay allows that
            (default 60; 0 for not at all). `websocket` only.
        backlog: visitors that may wait for `accept`; more are reset (default 256). Over `tcp` and `tls` those beyond
            256 wait at the relay.
        limits: what the session may cost in memory (default `Limits()`).
        dial: makes TCP connections, to the relay or to the proxy; for hosts with a network of their own, and for tests.
        watch_network: notices changes of the network; each one checks the link, as `Tunnel.retry_now` does. By default
            (None) the system's network is watched, unless `dial` is given.
        transport: what carries the tunnel: `"websocket"`, which is native; `"tcp"` or `"tls"`, for a Pioneer Relay or
            rathole; or one of your own.
        key_mode: how such a relay knows the key: `"token_routing"`, `"token_hash"` or `"rathole"`.
        websocket_engine: `"websockets"` or `"trio-websocket"`; by default the fastest that is installed.
        local: the local gateway that you `forward` visitors to. It is dialled once as the tunnel comes up, and every
            5 seconds while it does not answer; meanwhile the status is `connected` with `local_gateway_unavailable`.
            By default (None) no local gateway is dialled. As for `forward`: an address, or the text of one.
        services: the services that this gateway offers, where the relay's entry of the tunnel has several. Visitors'
            streams say in `service` which one they want; `forward(stream, services)` finds its local server. By default
            (None), and with a relay that knows no services, visitors of the tunnel's first service come, and no others.
            `websocket` only.
        proxy_protocol: what you `forward` with, so that a local gateway with TLS is dialled in the same way.
        acme: orders certificates for the tunnel's hosts, where the relay passes TLS through; None (default) for none.
            `Tunnel.certificates` has them. `websocket` only.
        random: the source of jitter; a seeded one makes the delays reproducible.
        wall_clock: seconds since 1970, for the `*_unix` fields of statuses.

    Raises:
        RuntimeError: asyncio is running, see `pioneer_tunnel.aio`.
        InvalidSettingsError: an address, proxy, identity or file that cannot be used, or a key that is a public key or
            too short for the transport. When the relay rejects the key, `Tunnel.accept` and `Tunnel.wait_connected`
            raise.
        UnsupportedTransportError: there is no transport of that name, or the WebSocket engine is not installed.
        StorageError: the folder of `acme` cannot be used.
    """
    need_trio("pioneer_tunnel.open_tunnel", "pioneer_tunnel.aio.open_tunnel")
    if not isinstance(key, RelayKey):
        raise TypeError(f"key is a RelayKey, not {type(key).__name__}")
    serve = _configured(
        transport,
        key,
        relay_identity=_identity(relay_identity),
        key_mode=_key_mode(key_mode),
        limits=limits or Limits(),
        websocket_engine=websocket_engine,
        heartbeat=heartbeat,
        resume_timeout=resume_timeout,
    )
    if system_trust not in SYSTEM_TRUSTS:
        raise InvalidSettingsError(f"system_trust is {system_trust!r}; there are {', '.join(SYSTEM_TRUSTS)}")
    addresses = _addresses(relay, transport)
    if links is not None and not 1 <= links <= MOST_LINKS:
        raise InvalidSettingsError(f"links is {links}; allowed is 1 to {MOST_LINKS}")
    choice = _proxy_choice(proxy, proxy_credentials_file).for_dialer(own=dial is not dial_tcp)
    for address in addresses:
        choice.proxy_for(address.host, address.port)  # raises if the environment's proxy cannot be used
    target = Target(
        address=addresses[0],
        key=key,
        service=service,
        instance=instance if instance is not None else secrets.token_hex(16),
        make_tls=partial(client_tls, None if ca_file is None else Path(ca_file), system_trust=system_trust),
        connect_timeout=connect_timeout,
        dial=dial,
        services=_services(services, transport),
        proxy=choice,
        counts=TunnelCounts(wall_clock()),
    )
    certificates = None if acme is None else await trio.to_thread.run_sync(_certificates, acme, transport)
    feed = StatusFeed(Status(state=State.STARTING, updated_at_unix=int(wall_clock())))
    tunnel = Tunnel(
        feed,
        lambda tunnel: Supervisor(
            serve,
            target,
            tunnel.deliver,
            feed=feed,
            policy=restart or RestartPolicy(),
            random=random or Random(),  # noqa: S311  # jitter, no secret
            wall_clock=wall_clock,
            relays=addresses,
            links=min(len(addresses), MOST_LINKS) if links is None else links,
            probe=None
            if local is None
            else partial(probe_local, _local(local), dial=dial, proxy_protocol=proxy_protocol),
            # In a host's own transport, most often one of a test, a failed assertion must not pass for a bad network.
            bugs=() if isinstance(transport, str) else (AssertionError,),
        ),
        backlog,
        target.counts,
    )
    tunnel.certificates = certificates
    try:
        async with open_tasks_beside_body() as nursery:
            nursery.start_soon(tunnel._run)
            if certificates is not None:
                nursery.start_soon(keep_certificates, certificates, feed)
            nursery.start_soon(follow_network, chosen_watch(watch_network, dial), tunnel._supervisor, target)
            try:
                yield tunnel
            except BaseExceptionGroup as group:
                failure = tunnel._failure
                if failure is None or not all(is_copy(leaf, failure) for leaf in leaves(group)):
                    raise
                raise_bare(fresh_copy(failure))  # `trio.serve_listeners` has put it in a group
    finally:
        tunnel._stop_accepting()
        try:
            announce(feed, wall_clock, Status(state=State.STOPPED))
        finally:
            feed.end()


def _configured(
    transport: Serve | str,
    key: RelayKey,
    *,
    relay_identity: PublicKey | None,
    key_mode: KeyMode,
    limits: Limits,
    websocket_engine: EngineName | None,
    heartbeat: float | None,
    resume_timeout: float,
) -> Serve:
    """The transport, with its options, which are checked together with the key."""
    if not isinstance(transport, str):
        usable_key(key, native=False)
        return transport
    built_in = configured_transport(
        transport,
        relay_identity=relay_identity,
        key_mode=key_mode,
        limits=limits,
        websocket_engine=websocket_engine,
        heartbeat=heartbeat,
        resume_timeout=resume_timeout,
    )
    if built_in is None:
        raise UnsupportedTransportError(f"no transport is called {transport!r}; there are {', '.join(TRANSPORTS)}")
    built_in.check(key)
    if relay_identity is not None and transport in _BARE:
        raise InvalidSettingsError("relay_identity: only a relay of transport websocket can prove what it is")
    if heartbeat is not None and transport in _BARE:
        raise InvalidSettingsError("heartbeat: only a relay of transport websocket can be asked for one")
    return built_in


def _addresses(relay: str | RelayAddress | Sequence[str | RelayAddress], transport: Serve | str) -> list[RelayAddress]:
    addresses = [_address(each, transport) for each in ([relay] if isinstance(relay, str | RelayAddress) else relay)]
    if not addresses:
        raise InvalidSettingsError("relay names no relay")
    return addresses


def _address(relay: str | RelayAddress, transport: Serve | str) -> RelayAddress:
    if isinstance(relay, str):
        try:
            relay = RelayAddress.parse(relay)
        except ValueError as error:
            raise InvalidSettingsError(redact_reason(str(error), relay)) from None
    if transport in _BARE:
        if relay.scheme is not None:
            raise InvalidSettingsError(
                f"the relay's address {str(relay)!r} is a {relay.scheme}:// URL, which means websocket; for {transport}"
                " it is written as host:port"
            )
        return relay
    return relay if relay.scheme is not None else relay.with_scheme("wss")


def _certificates(acme: AcmeConfig, transport: Serve | str) -> AcmeCertificates:
    if transport in _BARE:
        raise InvalidSettingsError("acme: only a relay of transport websocket says under which names visitors come")
    return open_certificates(acme)


def _services(services: Services | Mapping[str, str | LocalAddress] | None, transport: Serve | str) -> Services | None:
    if services is None:
        return None
    if transport in _BARE:
        raise InvalidSettingsError("services: only a relay of transport websocket carries several")
    try:
        return services if isinstance(services, Services) else Services(services)
    except ValueError as error:
        raise InvalidSettingsError(f"services: {error}") from None


def _proxy_choice(proxy: Proxy | str | None, credentials_file: Path | str | None) -> ProxyChoice:
    try:
        configured = None if proxy is None else configured_proxy(proxy)
    except ValueError as error:
        raise InvalidSettingsError(f"proxy: {redact_reason(str(error), proxy)}") from None
    if credentials_file is not None and not isinstance(configured, Proxy):
        raise InvalidSettingsError("proxy_credentials_file: it is for the proxy that proxy names, and that names none")
    return ProxyChoice(
        configured=configured, credentials_file=None if credentials_file is None else Path(credentials_file)
    )


def _local(local: str | LocalAddress) -> LocalAddress:
    try:
        return local_address(local)
    except ValueError as error:
        raise InvalidSettingsError(f"local: {error}") from None


def _key_mode(mode: KeyMode | str) -> KeyMode:
    try:
        return KeyMode(mode)
    except ValueError:
        raise InvalidSettingsError(f"key_mode is {mode!r}; there are {', '.join(KeyMode)}") from None


def _identity(text: PublicKey | str | None) -> PublicKey | None:
    if not isinstance(text, str):
        return text
    try:
        return PublicKey.parse(text)
    except ValueError as error:
        raise InvalidSettingsError(f"relay_identity: {error}") from None
