"""The sockets of a relay: listeners, TLS, and which door a connection belongs to.

`Relay` is a whole relay. In a process of its own the command line runs it; in the same process, a nursery does:

    relay = Relay(config)
    addresses = await nursery.start(relay.serve)
    ...
    await relay.apply(another_config)        # other tunnels; those that stay are not touched
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar, final

import attrs
import trio

from .._http.head import RequestHead, wants_upgrade
from .._model.addresses import Address, normal_audience
from .._model.errors import InvalidSettingsError, StorageError
from .._model.exception_groups import lone_error_bare
from .._model.keys import SigningIdentity
from .._net.adopted import Watched, watch
from .._net.closing import abandon
from .._net.descriptor_limit import descriptor_limit
from .._net.log_limiter import Complaints
from .._net.prefixed_stream import PrefixedStream
from .._net.socket_options import keep_alive
from .._net.tls.certificate import Certificate
from .._storage import files
from .._wire.handshake import SUBPROTOCOL
from ..websocket import EngineName
from ..yamux import Limits
from .accept_loop import Front, Handler
from .admission import Admission, Arrival
from .config import RelayConfig, TunnelEntry, each_address
from .gateways.endpoint import ControlDoor
from .gateways.registry import Directory, LocalDirectory, LocalRegistry, Registry
from .listeners import BoundListeners, listened_at, open_listeners
from .reload import Changes
from .visitors.ingress import IngressDoor, Refusal, Visit, read_head, refuse
from .visitors.tls import TlsDoor, end_tls

__all__ = ["Relay", "RelayAddresses", "guarded", "serve_gateway"]

_IDENTITY_LIMIT: Final = 64 * 1024

_log: Final = logging.getLogger("pioneer_tunnel.relay.server")
_complaints: Final = Complaints(_log)

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
P = ParamSpec("P")


@final
@attrs.frozen(kw_only=True)
class RelayAddresses:
    """Where a relay listens, with the ports that the system chose where the configuration says 0.

    Attributes:
        all_control: for gateways.
        all_ingress: for visitors.
        all_tunnels: for visitors of tunnels that have a `bind_addr`, by tunnel id.
    """

    all_control: tuple[Address, ...]
    all_ingress: tuple[Address, ...]
    all_tunnels: dict[str, tuple[Address, ...]]

    @property
    def control(self) -> Address:
        """The first for gateways."""
        return self.all_control[0]

    @property
    def ingress(self) -> Address:
        """The first for visitors."""
        return self.all_ingress[0]

    @property
    def tunnels(self) -> dict[str, Address]:
        """The first of each tunnel that has a `bind_addr`, by tunnel id."""
        return {tunnel_id: addresses[0] for tunnel_id, addresses in self.all_tunnels.items()}


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
        StorageError: the identity key file cannot be read, or others may read or write it.
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
        own_registry = LocalRegistry(config.tunnels) if registry is None else None
        registry = registry or own_registry
        assert registry is not None
        directory = directory or LocalDirectory()
        self._config = config
        self._own_registry: Final = own_registry
        self._bound: BoundListeners | None = None
        self._addresses: RelayAddresses | None = None
        self._applying: Final = trio.Lock()
        self._admission: Final = Admission(config.limits, descriptors=descriptor_limit())
        self._certificate: Final = _certificate(config)
        self._control: Final = ControlDoor(
            config, registry, directory, identity=_identity(config), limits=limits, engine=engine
        )
        self._ingress: Final = IngressDoor(registry, directory, self._admission, limits=config.limits)
        self._tls_door: Final = TlsDoor(registry, self._ingress, self._certificate)

    async def serve(self, *, task_status: trio.TaskStatus[RelayAddresses] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Listen and serve until cancelled; then gateways are told that the relay goes away.

        Raises:
            OSError: an address cannot be listened at.
        """
        try:
            with lone_error_bare():
                await self._listen(task_status)
        finally:
            self._bound = self._addresses = None
        raise AssertionError("listeners end only by being cancelled")

    async def apply(self, config: RelayConfig) -> RelayAddresses:
        """Carry the tunnels of `config` from now on, without touching those that stay as they are.

        New ones work at once. Those that are gone end: their listeners are closed, their sessions ended, their visitors
        reset. So do sessions whose key is no longer one of their tunnel's. What else has changed of a tunnel counts for
        what comes next: visitors and gateways that are here stay. Whatever of the relay itself has changed is logged
        and takes a restart. Of a registry that was given to the relay, the entries are its owner's; sessions are held
        against it anew.

        Returns:
            Where the relay listens now.

        Raises:
            InvalidSettingsError: the tunnels do not go together with the addresses that the relay listens at.
            OSError: a tunnel's address cannot be listened at.
            RuntimeError: the relay does not serve.
            In each case nothing has changed.
        """
        async with self._applying:
            if self._bound is None or self._addresses is None:
                raise RuntimeError("a relay that does not serve cannot be reconfigured: make another one")
            changes = Changes.between(self._config, config)
            applied = attrs.evolve(self._config, tunnels=config.tunnels)
            await self._bound.arrange(applied.tunnels, applied.all_addresses)
            self._config = applied
            if self._own_registry is not None:
                self._own_registry.replace(applied.tunnels)
            await self._control.hold_against_registry()
            self._addresses = attrs.evolve(self._addresses, all_tunnels=self._bound.addresses)
            _log.info("the configuration was applied; changes of tunnels: %s", changes)
            if changes.for_a_restart:
                _log.warning("these have changed too, and take a restart: %s", ", ".join(changes.for_a_restart))
            return self._addresses

    async def _listen(self, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        config = self._config
        control, ingress = each_address(config.control_addr), each_address(config.ingress_addr)
        front = Front(self._admission)
        async with trio.open_nursery() as nursery:

            async def listen(address: Address, handler: Handler, *, only_visitors: bool = False) -> Address:
                listeners = await open_listeners(address, config.all_addresses)
                serve = functools.partial(front.serve, only_visitors=only_visitors)
                nursery.start_soon(serve, listeners, guarded(handler), nursery)
                return listened_at(address, listeners)

            listening: dict[Address, Address] = {}
            for address in control:
                listening[address] = await listen(
                    address, self._serve_either if address in ingress else self._serve_control
                )
            for address in ingress:
                if address not in control:
                    listening[address] = await listen(address, self._serve_ingress, only_visitors=True)
            bound = BoundListeners(front, nursery, lambda entry: guarded(functools.partial(self._serve_bound, entry)))
            await bound.arrange(config.tunnels, config.all_addresses)
            self._bound = bound
            self._addresses = RelayAddresses(
                all_control=tuple(listening[address] for address in control),
                all_ingress=tuple(listening[address] for address in ingress),
                all_tunnels=bound.addresses,
            )
            _log.info(
                "gateways at %s, visitors at %s",
                _listed(self._addresses.all_control), _listed(self._addresses.all_ingress),
            )  # fmt: skip
            for tunnel_id, addresses in bound.addresses.items():
                _log.info("visitors of tunnel %s at %s", tunnel_id, _listed(addresses))
            if self._admission.most_connections < config.limits.connections:
                _log.warning(
                    "this process may have so few descriptors that it takes %d connections at the most, not the %d"
                    " of its limits; see ulimit -n", self._admission.most_connections, config.limits.connections,
                )  # fmt: skip
            task_status.started(self._addresses)

    async def _serve_control(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        stream: trio.abc.Stream
        stream = watched = _watched(connected)
        _end_with_fin(watched)
        if self._config.control_tls:
            assert self._certificate is not None
            stream = await end_tls(watched, self._certificate)
        await serve_gateway(self._control, stream, watched, arrival)

    async def _serve_ingress(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        visit = await self._tls_door.admit(
            _visit(connected, _watched(connected), arrival), tls=self._config.ingress_tls
        )
        if visit is not None:
            await self._ingress.serve(visit)

    async def _serve_either(self, connected: trio.SocketStream, arrival: Arrival) -> None:
        """One address for both: the upgrade to our protocol on a public name is a gateway's, all else a visitor's."""
        watched = _watched(connected)
        visit = await self._tls_door.admit(_visit(connected, watched, arrival), tls=self._config.ingress_tls)
        if visit is None:
            return
        try:
            head, received = await read_head(visit.stream)
        except Refusal as refusal:
            await refuse(visit.stream, refusal)
            return
        if head is None:
            await visit.stream.aclose()
        elif _wants_control(head) and self._is_public(head):
            _end_with_fin(watched)
            await self._control.serve(PrefixedStream(visit.stream, received), watched, arrival)
        else:
            await self._ingress.serve_request(visit, head, received)

    async def _serve_bound(self, entry: TunnelEntry, connected: trio.SocketStream, arrival: Arrival) -> None:
        await self._ingress.serve_bound(_visit(connected, _watched(connected), arrival), entry)

    def _is_public(self, head: RequestHead) -> bool:
        try:
            written = normal_audience(head.host_header.decode("ascii").removesuffix(":"))  # an empty port is none
        except ValueError:
            return False
        names = self._config.public_names
        # A proxy in front may have taken the port off; the proof of the gateway is bound to all of its name anyhow.
        return written in names or any(name.rpartition(":")[0] == written for name in names)


async def serve_gateway(
    door: ControlDoor, stream: trio.abc.Stream, watched: Watched, arrival: Arrival | None = None
) -> None:
    """Serve a connection at the gateways' door, from its first byte on, until it ends; see `ControlDoor.serve`."""
    try:
        head, received = await read_head(stream)
        if head is None:
            return
        if not _wants_control(head):
            raise Refusal(
                404,
                f"this is the door for gateways; they ask for the WebSocket {SUBPROTOCOL}",
                omit_body=head.omit_body,
            )
    except Refusal as refusal:
        await refuse(stream, refusal)
        return
    await door.serve(PrefixedStream(stream, received), watched, arrival)


def _wants_control(head: RequestHead) -> bool:
    upgrade = wants_upgrade(head)
    return upgrade is not None and upgrade.websocket and SUBPROTOCOL in upgrade.subprotocols


def guarded(
    handler: Callable[Concatenate[StreamT, P], Awaitable[object]],
) -> Callable[Concatenate[StreamT, P], Awaitable[None]]:
    """One connection's trouble is its own: it is logged, and the relay goes on."""

    async def serve(connected: StreamT, /, *arguments: P.args, **named: P.kwargs) -> None:
        try:
            await handler(connected, *arguments, **named)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # it went away, or never came to the point
        except* Exception as error:  # noqa: BLE001  # whatever it is, other connections have nothing to do with it
            _complaints.tell("unforeseen", "a connection failed in an unforeseen way", level=logging.ERROR, error=error)
            with trio.CancelScope(shield=True):
                await abandon(connected)

    return serve


def _watched(connected: trio.SocketStream) -> Watched:
    keep_alive(connected.socket, idle=60, interval=15)
    return watch(connected, resets=True)


def _end_with_fin(link: Watched) -> None:
    """Let a gateway's link end with a FIN: what it carries says by itself which streams are complete."""
    lent = link.plain_socket
    if lent is not None:
        lent.disarm_reset()


def _visit(connected: trio.SocketStream, watched: Watched, arrival: Arrival) -> Visit:
    return Visit(
        stream=watched,
        visitor=_address_of(connected.socket.getpeername),
        local=_address_of(connected.socket.getsockname),
        tls=False,
        source=arrival.source,
        settle=arrival.settle_as_visitor,
    )


def _address_of(name: Callable[[], Any]) -> Address | None:
    try:
        return Address.of_socket(name())
    except OSError:
        return None  # it is gone already


def _listed(addresses: tuple[Address, ...]) -> str:
    return " and ".join(map(str, addresses))


def _certificate(config: RelayConfig) -> Certificate | None:
    certificate, private_key = config.tls_certificate_path, config.tls_private_key_path
    return None if certificate is None or private_key is None else Certificate(certificate, private_key)


def _identity(config: RelayConfig) -> SigningIdentity | None:
    path = config.identity_key_path
    if path is None:
        return None
    return SigningIdentity.from_seed(_read_seed(path))


def _read_seed(path: Path) -> bytes:
    """The first line of a file; the second may be what `relay new-identity` printed there."""
    content = files.read(path, limit=_IDENTITY_LIMIT, private=True)
    if content is None:
        raise StorageError(f"the identity key file {str(path)!r} cannot be read: there is none")
    try:
        seed = bytes.fromhex(str(content, "ascii").strip().partition("\n")[0])
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise InvalidSettingsError(
            f"the identity key file {str(path)!r} does not hold 64 hexadecimal digits on its first line;"
            " 'pioneer-tunnel relay new-identity' prints them"
        )
    return seed
