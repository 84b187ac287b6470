"""The sockets of a relay: listeners, TLS, and which door a connection belongs to.

`Relay` is a whole relay. In a process of its own the command line runs it; in the same process, a nursery does:

    addresses = await nursery.start(Relay(config).serve)
"""

from __future__ import annotations

import functools
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, final

import attrs
import trio

from ..address import Address, normal_audience
from ..errors import InvalidSettingsError, StorageError
from ..groups import lone_error_bare
from ..handshake import SUBPROTOCOL
from ..identity import SigningIdentity
from ..streams import PrefixedStream, TlsServerStream, WatchedStream, abandon, keep_alive, reset_on_close
from ..websocket import EngineName
from ..yamux import Limits
from .accepting import Complaints, serve_admitted
from .admission import Admission, Arrival
from .config import RelayConfig, TunnelEntry
from .control import ControlDoor
from .descriptors import descriptor_limit
from .head import RequestHead, wants_upgrade
from .ingress import IngressDoor, Refusal, Visit, read_head, refuse
from .registry import Directory, LocalDirectory, LocalRegistry, Registry

__all__ = ["Relay", "RelayAddresses"]

TLS_TIMEOUT: Final = 10.0
BACKLOG: Final = 1024

_log: Final = logging.getLogger("pioneer_tunnel.relay.server")

_Handler: TypeAlias = Callable[[trio.SocketStream, Arrival], Awaitable[None]]


@final
@attrs.frozen(kw_only=True)
class RelayAddresses:
    """Where a relay listens, with the ports that the system chose where the configuration says 0.

    Attributes:
        control: for gateways.
        ingress: for visitors.
        tunnels: for visitors of tunnels that have a `bind_addr`, by tunnel id.
    """

    control: Address
    ingress: Address
    tunnels: dict[str, Address]


@final
class Relay:
    """A relay.

    Args:
        config: what the operator decides.
        registry: which tunnels there are; by default those of `config`.
        directory: where they are connected; by default this process knows.
        limits: what each gateway's session may cost; by default as the `limits` of `config` say.
        engine: the WebSocket engine; None for the fastest that is installed.

    Raises:
        InvalidSettingsError: a certificate or key that cannot be used.
        StorageError: the identity key file cannot be read.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        registry: Registry | None = None,
        directory: Directory | None = None,
        limits: Limits | None = None,
        engine: EngineName | None = None,
    ) -> None:
        registry = registry or LocalRegistry(config.tunnels)
        directory = directory or LocalDirectory()
        self._config: Final = config
        self._admission: Final = Admission(config.limits, descriptors=descriptor_limit())
        self._tls: Final = _server_tls(config)
        self._control: Final = ControlDoor(
            config, registry, directory, identity=_identity(config), limits=limits, engine=engine
        )
        self._ingress: Final = IngressDoor(registry, directory, self._admission)

    async def serve(self, *, task_status: trio.TaskStatus[RelayAddresses] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Listen and serve until cancelled; then gateways are told that the relay goes away.

        Raises:
            OSError: an address cannot be listened at.
        """
        with lone_error_bare():
            await self._listen(task_status)
        raise AssertionError("listeners end only by being cancelled")

    async def _listen(self, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        config = self._config
        shared = config.control_addr == config.ingress_addr
        complaints = Complaints()
        async with trio.open_nursery() as nursery:

            async def listen(address: Address, handler: _Handler) -> Address:
                try:
                    listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
                except OSError as error:
                    raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
                nursery.start_soon(serve_admitted, listeners, self._admit, _guarded(handler), complaints)
                return Address(address.host, listeners[0].socket.getsockname()[1])

            control = await listen(config.control_addr, self._serve_either if shared else self._serve_control)
            ingress = control if shared else await listen(config.ingress_addr, self._serve_ingress)
            tunnels = {
                entry.id: await listen(entry.bind_addr, functools.partial(self._serve_bound, entry))
                for entry in config.tunnels
                if entry.bind_addr is not None
            }
            addresses = RelayAddresses(control=control, ingress=ingress, tunnels=tunnels)
            _log.info("gateways at %s, visitors at %s", addresses.control, addresses.ingress)
            for tunnel_id, address in tunnels.items():
                _log.info("visitors of tunnel %s at %s", tunnel_id, address)
            if self._admission.most_connections < config.limits.connections:
                _log.warning(
                    "this process may have so few descriptors that it takes %d connections at the most, not the %d"
                    " of its limits; see ulimit -n", self._admission.most_connections, config.limits.connections,
                )  # fmt: skip
            task_status.started(addresses)

    def _admit(self, connected: trio.SocketStream) -> _Admitted:
        """Let a connection arrive.

        Raises:
            TurnedAway: there is no room for it.
        """
        address, scope = _address_of(connected.socket.getpeername), trio.CancelScope()
        host = None if address is None else address.host

        def make_way() -> None:
            reset_on_close(connected.socket)
            scope.cancel()

        return _Admitted(self._admission.arrive(host, trio.current_time(), make_way), scope)

    async def _serve_control(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        stream, watched = await self._secured(connected, self._config.control_tls)
        try:
            head, received = await read_head(stream)
            if head is None:
                return
            if not _wants_control(head):
                raise Refusal(404, f"this is the door for gateways; they ask for the WebSocket {SUBPROTOCOL}")
        except Refusal as refusal:
            await refuse(stream, refusal)
            return
        await self._control.serve(PrefixedStream(stream, received), watched, arrival)

    async def _serve_ingress(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        stream, _ = await self._secured(connected, self._config.ingress_tls)
        await self._ingress.serve(_visit(connected, stream, arrival, tls=self._config.ingress_tls))

    async def _serve_either(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        """One address for both: the upgrade to our protocol on a public name is a gateway's, all else a visitor's."""
        tls = self._config.control_tls or self._config.ingress_tls
        stream, watched = await self._secured(connected, tls)
        try:
            head, received = await read_head(stream)
            if head is None:
                return
            if _wants_control(head) and self._is_public(head):
                await self._control.serve(PrefixedStream(stream, received), watched, arrival)
            else:
                await self._ingress.serve_request(_visit(connected, stream, arrival, tls=tls), head, received)
        except Refusal as refusal:
            await refuse(stream, refusal)

    async def _serve_bound(self, entry: TunnelEntry, connected: trio.SocketStream, arrival: Arrival) -> None:
        stream, _ = await self._secured(connected, tls=False)
        await self._ingress.serve_bound(_visit(connected, stream, arrival, tls=False), entry)

    async def _secured(self, connected: trio.SocketStream, tls: bool) -> tuple[trio.abc.Stream, WatchedStream]:
        keep_alive(connected, idle=60, interval=15)
        watched = WatchedStream(connected)
        if not tls:
            return watched, watched
        assert self._tls is not None
        secured = trio.SSLStream(watched, self._tls, server_side=True)
        with trio.fail_after(TLS_TIMEOUT):
            await secured.do_handshake()
        return TlsServerStream(secured), watched

    def _is_public(self, head: RequestHead) -> bool:
        try:
            written = normal_audience(head.host_header.decode("ascii"))
        except ValueError:
            return False
        names = self._config.public_names
        # A proxy in front may have taken the port off; the proof of the gateway is bound to all of its name anyhow.
        return written in names or any(name.rpartition(":")[0] == written for name in names)


def _wants_control(head: RequestHead) -> bool:
    upgrade = wants_upgrade(head)
    return upgrade is not None and upgrade.websocket and SUBPROTOCOL in upgrade.subprotocols


@final
@attrs.frozen
class _Admitted:
    """A connection that was let in, and the scope that it is served in, which ends when it makes way for another."""

    arrival: Arrival
    scope: trio.CancelScope


def _guarded(handler: _Handler) -> Callable[[trio.SocketStream, _Admitted], Awaitable[None]]:
    """One connection's trouble is its own: it is logged, and the relay goes on."""

    async def guarded(connected: trio.SocketStream, admitted: _Admitted) -> None:
        try:
            with admitted.scope:
                await handler(connected, admitted.arrival)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # it went away, or never came to the point
        except* Exception:  # noqa: BLE001  # whatever it is, other connections have nothing to do with it
            _log.exception("a connection failed in an unforeseen way")
            with trio.CancelScope(shield=True):
                await abandon(connected)
        finally:
            admitted.arrival.leave()

    return guarded


def _visit(connected: trio.SocketStream, stream: trio.abc.Stream, arrival: Arrival, *, tls: bool) -> Visit:
    return Visit(
        stream=stream,
        visitor=_address_of(connected.socket.getpeername),
        local=_address_of(connected.socket.getsockname),
        tls=tls,
        settle=arrival.settle,
    )


def _address_of(name: Callable[[], Any]) -> Address | None:
    try:
        host, port, *_ = name()
    except OSError:
        return None  # it is gone already
    return Address(host, port)


def _server_tls(config: RelayConfig) -> ssl.SSLContext | None:
    certificate, private_key = config.tls_certificate_path, config.tls_private_key_path
    if certificate is None or private_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettingsError(
            f"the TLS certificate {str(certificate)!r} with the key {str(private_key)!r} cannot be used:"
            f" {error.strerror or error}"
        ) from error
    return context


def _identity(config: RelayConfig) -> SigningIdentity | None:
    path = config.identity_key_path
    if path is None:
        return None
    return SigningIdentity.from_seed(_read_seed(path))


def _read_seed(path: Path) -> bytes:
    try:
        seed = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise StorageError(f"the identity key file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise InvalidSettingsError(f"the identity key file {str(path)!r} does not hold 64 hexadecimal digits")
    return seed
