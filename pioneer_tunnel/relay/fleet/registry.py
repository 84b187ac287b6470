"""The tunnels of a node: those of its own file, those that the operator has signed, and the names below wildcards.

The file comes first: what is in it, an id, a key or a host, is never replaced by what is in Redis.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final, NoReturn, final

import attrs
import trio

from ..._model.callbacks import nothing
from ..._model.errors import InvalidSettingsError, StorageError
from ..._model.exception_groups import leaves
from ..._model.keys import PublicKey, SigningIdentity
from ..._model.log_fields import about
from ..gateways.registry import LocalRegistry, Registry, RegistryAway
from ..tunnels import Route, TunnelEntry
from .config import FleetConfig
from .entries import SignedEntries
from .names import FleetNames
from .published import Published, RedisUnreachable, connected
from .seen import SeenFile
from .signed import SignedEntry

__all__ = ["FleetRegistry", "RegistryState"]

FIRST_WAIT: Final = 0.5
MOST_WAIT: Final = 10.0
"""Seconds between two attempts to reach Redis: the first, and the longest."""

START_WAIT: Final = 5.0
"""Seconds that a relay which starts waits for Redis."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.fleet")


@final
@attrs.frozen(kw_only=True)
class RegistryState:
    """What a registry has to tell about itself.

    Attributes:
        reachable: whether Redis answers, as far as is known.
        signed: the operator's tunnels that are in memory.
        unconfirmed: seconds since all of them were known to be Redis's last; None without an operator's key.
    """

    reachable: bool
    signed: int
    unconfirmed: float | None


@final
class FleetRegistry(Registry):
    """The registry of a node.

    Args:
        tunnels: those of its own file.
        config: its fleet, with complete paths.
        identity: the node's key.
        nodes: the keys of all nodes, this one among them, by name.
        reserved: names that no gateway may create.
        wall_clock: seconds since 1970.

    Attributes:
        on_change: called with the ids of tunnels that may have changed or ended.

    Raises:
        StorageError: the state file cannot be used.
    """

    def __init__(
        self,
        tunnels: Iterable[TunnelEntry],
        config: FleetConfig,
        *,
        identity: SigningIdentity,
        nodes: Mapping[str, PublicKey],
        reserved: Collection[str],
        wall_clock: Callable[[], float],
    ) -> None:
        self.on_change: Callable[[Collection[str]], object] = nothing
        self._access: Final = config.redis_access
        self._ids: frozenset[str] = frozenset()
        self._own: Final = LocalRegistry(())
        self._reachable = False
        self._complaint = ""
        self._seen: Final = SeenFile(config.state_file)
        with self._seen.opened():
            pass  # so that what is wrong with it is known before anybody comes
        self._names: Final = FleetNames(
            config.node, identity, nodes, self._seen, reserved=reserved, wall_clock=wall_clock
        )
        self._signed: Final = (
            None
            if config.operator_key is None
            else SignedEntries(
                config.operator_key,
                self._seen,
                unconfirmed=config.unconfirmed_ms / 1000,
                ours=lambda: self._ids,
                on_change=self._tell_change,
                wall_clock=wall_clock,
            )
        )
        self._ready: Final = trio.Event() if self._signed is None else self._signed.ever_confirmed
        self.replace(tunnels)

    def replace(self, tunnels: Iterable[TunnelEntry]) -> None:
        """Replace the tunnels of the node's own file."""
        entries = tuple(tunnels)
        self._ids = frozenset(entry.id for entry in entries)
        self._own.replace(entries)

    @property
    def state(self) -> RegistryState:
        """What there is to tell now."""
        signed = self._signed
        return RegistryState(
            reachable=self._reachable,
            signed=0 if signed is None else signed.known,
            unconfirmed=None if signed is None else signed.unconfirmed_for,
        )

    def signed(self, ids: Iterable[str]) -> list[TunnelEntry]:
        """Those of these tunnels that the operator has signed, and that are in memory."""
        return [] if self._signed is None else self._signed.tunnels(name for name in ids if name not in self._ids)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Keep a connection to Redis, until cancelled. Everything else works meanwhile, as far as it can.

        It starts when Redis has answered, or after `START_WAIT`: a Redis that is down does not keep a relay from
        starting.

        Raises:
            StorageError: the state file cannot be used.
        """
        with self._seen.opened():
            async with trio.open_nursery() as nursery:
                if self._signed is not None:
                    nursery.start_soon(self._signed.look_for_ends)
                nursery.start_soon(self._stay_connected)
                with trio.move_on_after(START_WAIT):
                    await self._ready.wait()
                task_status.started()
        raise AssertionError  # it runs until it is cancelled

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        ours = await self._own.by_key_id(key_id)
        if ours is not None or self._signed is None:
            return ours
        found = await self._signed.find(f"key:{key_id}")
        return None if found is None else found.tunnel

    async def by_host(self, host: str) -> Route | None:
        route, away = self._own.by_host_nowait(host), None
        if route is None and self._signed is not None:
            try:
                route = _route_of(await self._signed.find(f"host:{host}"), host)
            except RegistryAway as error:  # it may be a name that is known
                away = error
        if route is None:
            route = await self._below_wildcard(host)
        if route is None and away is not None:
            raise away
        return route

    async def _below_wildcard(self, host: str) -> Route | None:
        for key_id in await self._names.keys_of(host):
            entry = await self.by_key_id(key_id)
            if entry is not None and (below := _below(entry, host)) is not None:
                return below
        return None

    def by_host_nowait(self, host: str) -> Route | None:
        route = self._own.by_host_nowait(host)
        if route is None and self._signed is not None:
            with suppress(trio.WouldBlock):
                route = _route_of(self._signed.find_nowait(f"host:{host}"), host)
        return route

    async def created(self, entry: TunnelEntry, names: Iterable[str]) -> tuple[dict[str, Route], dict[str, str]]:
        wildcard = entry.wildcard
        if wildcard is None or wildcard.url is None:
            return await super().created(entry, names)
        domain = wildcard.url.domain
        routes: dict[str, Route] = {}
        refused: dict[str, str] = {}
        for name in names:
            why_not = await self._why_not_below(entry, name, domain)
            if why_not is None:
                routes[name] = wildcard.below(name)
            else:
                refused[name] = why_not
        return routes, refused

    async def _why_not_below(self, entry: TunnelEntry, name: str, domain: str) -> str | None:
        """Claim a name. None; or why it is refused, for a person."""
        try:
            route = await self.by_host(f"{name}.{domain}")
        except RegistryAway:
            return "the relay cannot look it up at the moment"
        if route is not None and route.entry.id != entry.id:
            return "another tunnel has it"
        return await self._names.claim(entry, name, domain)

    def _tell_change(self, ids: Collection[str]) -> None:
        self.on_change(ids)

    async def _stay_connected(self) -> NoReturn:
        wait = FIRST_WAIT
        while True:
            try:
                async with connected(self._access) as published:
                    self._note_reachable()
                    wait = FIRST_WAIT
                    await self._follow(published)
            except (RedisUnreachable, StorageError, InvalidSettingsError) as error:
                self._note_unreachable(str(error))
            except BaseExceptionGroup as group:
                _, others = group.split((RedisUnreachable, StorageError, InvalidSettingsError))
                if others is not None:
                    raise others from None
                self._note_unreachable(str(leaves(group)[0]))
            await trio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
            wait = min(wait * 2, MOST_WAIT)

    async def _follow(self, published: Published) -> NoReturn:
        """Take what Redis has, and what is written to it, until it is lost."""
        async with published.messages() as messages, trio.open_nursery() as nursery:
            # In this order: what is written while the entries are compared is a message.
            nursery.start_soon(self._names.follow, published)
            if self._signed is not None:
                nursery.start_soon(self._signed.follow, published)
            else:
                self._ready.set()
            async for text in messages:
                if self._signed is not None:
                    await self._signed.hear(text)
            raise RedisUnreachable("it has closed the connection")

    def _note_reachable(self) -> None:
        self._reachable, self._complaint = True, ""
        _log.info("Redis can be reached", extra=about("registry_reachable"))

    def _note_unreachable(self, why: str) -> None:
        self._reachable = False
        if why != self._complaint:
            self._complaint = why
            line = "Redis cannot be reached: %s; tunnels that are known are served on"
            _log.warning(line, why, extra=about("registry_unreachable", reason=why))


def _route_of(entry: SignedEntry | None, host: str) -> Route | None:
    if entry is None or entry.tunnel is None:
        return None
    return next((route for route in entry.tunnel.routes if route.host == host), None)


def _below(entry: TunnelEntry, host: str) -> Route | None:
    """The route of a name below the wildcard of a tunnel."""
    label, _, domain = host.partition(".")
    wildcard = entry.wildcard
    return None if wildcard is None or wildcard.url is None or wildcard.url.domain != domain else wildcard.below(label)
