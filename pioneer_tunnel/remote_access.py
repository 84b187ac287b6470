"""Remote access as a gateway embeds it: settings, keystore, configuration, tunnel and status in one object.

    config = RemoteAccessConfig.load("gateway.toml")
    settings, keystore = SettingsFile("gateway-settings.toml"), FileKeystore("keystore")
    remote_access = RemoteAccess(config, settings=settings, keystore=keystore)
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, key=RelayKey("...")))
        async for status in remote_access.watch():
            print(status.state, status.error_kind, status.message, status.public_url)

Two halves that never wait for each other. `apply` makes the desired state durable and says that there is a new one.
`run` brings about what is desired, one generation after another: the next begins when the last is gone with all its
tasks and sockets. So an `apply` may come through the very tunnel that it ends.

Neighbours: `generation` is what runs; `jsonrpc` puts this on the wire.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from random import Random
from typing import Any, Final, Literal, NoReturn, TypeAlias, final

import attrs
import trio

from .config import RemoteAccessConfig, Transport
from .dialer import Dialer, dial_tcp
from .errors import InvalidSettingsError, StorageError, TunnelError, UnknownError
from .generation import Generation, Handler, Plan, choose_transport, effective_config, make_target
from .identity import RelayKey
from .keystore import Keystore
from .runtime_folder import load_instance
from .settings import Settings, SettingsFile, SettingsUpdate
from .status import State, Status, StatusFeed
from .supervisor import announce
from .transports import TRANSPORTS, Serve
from .yamux import Limits

__all__ = ["RemoteAccess", "Snapshot", "WireTransport"]

WireTransport: TypeAlias = Literal["tcp", "tls", "noise", "websocket"]
"""The transports that clients know. The list is closed: what is newer is told as `tcp`, with a detail."""


_log: Final = logging.getLogger("pioneer_tunnel.remote_access")

_WIRE_TRANSPORTS: Final[Mapping[Transport, tuple[WireTransport, str | None]]] = {
    Transport.TCP: ("tcp", None),
    Transport.TLS: ("tls", None),
    Transport.NOISE: ("noise", None),
    Transport.WEBSOCKET: ("websocket", None),
}


@final
@attrs.frozen(kw_only=True)
class Snapshot:
    """What clients are shown: the `SNAPSHOT` of the gateway contract.

    Attributes:
        enabled: whether remote access is switched on.
        server: the relay's address that is in use.
        service_name: the service's label.
        transport: one of those that clients know.
        transport_detail: what `transport` is more exactly, when it is none of those.
        has_key: whether a relay key is stored. The key itself is never told.
        status: where remote access stands.
    """

    enabled: bool
    server: str | None = None
    service_name: str | None = None
    transport: WireTransport
    transport_detail: str | None = None
    has_key: bool
    status: Status

    def to_wire(self) -> dict[str, Any]:
        """The object that goes to clients; a field that is None is absent."""
        wire = {field.name: getattr(self, field.name) for field in attrs.fields(Snapshot)}
        wire["status"] = self.status.to_wire()
        return {name: value for name, value in wire.items() if value is not None}


@final
class RemoteAccess:
    """A gateway's remote access.

    Args:
        config: what the operator decided.
        settings: the settings file, which others may write too.
        keystore: where the relay key lives.
        key_provider: for hosts that keep the key elsewhere: asked for it at each generation, in place of `keystore`.
            Saving and clearing a key is refused then.
        handler: takes visitors' streams in this process; by default they are forwarded to `config.local_addr`.
        dial: how TCP connections come about.
        transports: the transports by name.
        limits: what a session may cost in memory.
        random: where jitter comes from.
        wall_clock: seconds since 1970, for the `*_unix` fields of statuses.

    Raises:
        TypeError: neither or both of `keystore` and `key_provider` are given.
    """

    def __init__(
        self,
        config: RemoteAccessConfig,
        *,
        settings: SettingsFile,
        keystore: Keystore | None = None,
        key_provider: Callable[[], Awaitable[RelayKey | None]] | None = None,
        handler: Handler | None = None,
        dial: Dialer = dial_tcp,
        transports: Mapping[str, Serve] = TRANSPORTS,
        limits: Limits | None = None,
        random: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if (keystore is None) == (key_provider is None):
            raise TypeError("give either keystore or key_provider")
        self._config = config
        self._settings_file: Final = settings
        self._keystore: Final = keystore
        self._key_provider: Final = key_provider
        self._handler: Final = handler
        self._dial: Final = dial
        self._transports: Final = transports
        self._limits: Final = limits or Limits()
        self._random: Final = random or Random()  # noqa: S311  # jitter, no secret
        self._wall_clock: Final = wall_clock
        self._feed: Final = StatusFeed(Status(state=State.DISABLED, updated_at_unix=int(wall_clock())))
        self._applying: Final = trio.Lock()
        self._running = False
        self._generation: Generation | None = None
        self._generation_ended = True
        self._wanted = 0
        self._taken_up = 0
        self._key_withdrawn = False
        self._changed = trio.Event()
        self._progress = trio.Event()

    @property
    def config(self) -> RemoteAccessConfig:
        """What the operator decided."""
        return self._config

    @property
    def status(self) -> Status:
        """Where remote access stands now."""
        return self._feed.current

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._feed.history

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`. Slow watchers skip, never block."""
        return self._feed.watch()

    async def settings(self) -> Settings:
        """What the settings file says now.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: what stands in it is not allowed.
        """
        return await trio.to_thread.run_sync(self._settings_file.read)

    async def has_key(self) -> bool:
        """Whether a relay key is stored.

        Raises:
            StorageError: the keystore cannot tell.
        """
        if self._keystore is not None:
            return await self._keystore.exists((await self.settings()).secret_ref)
        assert self._key_provider is not None
        return await self._key_provider() is not None

    async def snapshot(self) -> Snapshot:
        """What clients are shown. Settings that cannot be used are shown as what stands in for them.

        Raises:
            StorageError: a file or the keystore cannot be read.
            InvalidSettingsError: what stands in the settings file is not allowed.
        """
        settings = await self.settings()
        try:
            config = effective_config(self._config, settings)
        except TunnelError:
            config = self._config  # the status tells what is wrong
        transport = config.effective_transport
        wire, detail = _WIRE_TRANSPORTS.get(transport, ("tcp", str(transport)))
        return Snapshot(
            enabled=settings.enabled,
            server=str(config.effective_relay_addr),
            service_name=config.service_name,
            transport=wire,
            transport_detail=detail,
            has_key=await self.has_key(),
            status=self.status,
        )

    # Saying what is desired

    async def apply(self, update: SettingsUpdate) -> None:
        """Make `update` durable, whole or not at all, and hand it to `run`.

        It does not wait for the tunnel (`settled` does), so it may come through the tunnel that it changes. While
        `run` is not running, it saves only. What changes nothing leaves a live generation alone; when the generation
        has failed for good, an update that names a field starts a new one, changed or not.

        Cancelled while it waits for another `apply`, it does nothing; later, it is finished first.

        Raises:
            StorageError: a file or the keystore cannot be read or written; all is as it was.
            InvalidSettingsError: the settings file holds something that is not allowed, or this host keeps its key
                where it cannot be changed; all is as it was.
        """
        async with self._applying:
            with trio.CancelScope(shield=True):
                changed = await self._store(update)
                if changed or (self._generation_ended and update != SettingsUpdate()):
                    self._want_new_generation(key_withdrawn=changed and update.deletes_key)

    async def configure(self, config: RemoteAccessConfig) -> None:
        """Go on with another configuration; a new generation begins when it differs from the one before."""
        async with self._applying:
            if config != self._config:
                self._config = config
                self._want_new_generation(key_withdrawn=False)

    async def settled(self) -> None:
        """Wait until `run` has taken up all that was applied, and it has come to something: no longer `starting`.

        There is no deadline: bringing a generation to an end is bounded, and an attempt to connect is. Returns at
        once while `run` is not running.
        """
        wanted = self._wanted
        while self._running and self._taken_up < wanted:
            await self._progress.wait()
        async for status in self._feed.watch():
            if not self._running or status.state is not State.STARTING:
                return

    def retry_now(self) -> None:
        """Try to connect at once, if the tunnel is waiting to. For a host that knows that the network is back."""
        if self._generation is not None:
            self._generation.retry_now()

    def _want_new_generation(self, *, key_withdrawn: bool) -> None:
        self._key_withdrawn = self._key_withdrawn or key_withdrawn
        self._wanted += 1
        self._changed.set()
        self._changed = trio.Event()

    async def _store(self, update: SettingsUpdate) -> bool:
        """Write what `update` changes; returns whether that was anything."""
        before = await self.settings()
        settings_change = update.apply_to(before) != before
        if update.key is None and not update.deletes_key:
            return settings_change and await self._write_settings(update.apply_to)
        if self._keystore is None:
            raise InvalidSettingsError("the relay key of this host is kept elsewhere; it is not saved or cleared here")
        reference = before.secret_ref
        if update.key is None:
            existed = await self._keystore.exists(reference)
            return await self._clear_key(self._keystore, reference, update, before) or existed
        return await self._save_key(self._keystore, reference, update, update.key) or settings_change

    async def _save_key(self, keystore: Keystore, reference: str, update: SettingsUpdate, key: RelayKey) -> bool:
        try:
            old = await keystore.get(reference)
        except StorageError as error:
            # What cannot be opened cannot be put back either. A new key is how a person mends that.
            _log.warning("the stored relay key cannot be opened and is replaced: %s", error)
            old = None
        if old != key:
            await keystore.put(reference, key)
        try:
            await self._write_settings(update.apply_to)
        except BaseException:
            if old is None:
                await keystore.delete(reference)
            elif old != key:
                await keystore.put(reference, old)
            raise
        return old != key

    async def _clear_key(self, keystore: Keystore, reference: str, update: SettingsUpdate, before: Settings) -> bool:
        changed = await self._write_settings(update.apply_to)
        try:
            await keystore.delete(reference)
        except BaseException:
            await self._write_settings(lambda now: attrs.evolve(now, enabled=before.enabled, server=before.server))
            raise
        return changed

    async def _write_settings(self, change: Callable[[Settings], Settings]) -> bool:
        before = await self.settings()
        return await trio.to_thread.run_sync(self._settings_file.update, change) != before

    # Bringing it about

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Bring about what the settings ask for, until cancelled. For `nursery.start`.

        Reports `started` after its first status, not after connecting. May be run again after it has ended.

        Raises:
            RuntimeError: it is running already.
        """
        if self._running:
            raise RuntimeError("RemoteAccess.run is running already")
        self._running = True
        self._feed.resume()
        try:
            async with trio.open_nursery() as host_tasks:
                while True:
                    await self._one_generation(host_tasks, task_status)
                    task_status = trio.TASK_STATUS_IGNORED
        finally:
            self._running = False
            self._make_progress()
            announce(self._feed, self._wall_clock, Status(state=State.STOPPED))
            self._feed.end()
        raise AssertionError("the loop ends only by being cancelled")

    async def _one_generation(self, host_tasks: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        """From one desired state to the next: a generation, or the status that says why there is none."""
        wanted, self._key_withdrawn = self._wanted, False
        retry_at = math.inf
        async with trio.open_nursery() as nursery:
            try:
                plan = await self._plan()
                if plan is not None:
                    self._generation = Generation(
                        plan,
                        self._feed,
                        handler=self._handler,
                        host_tasks=host_tasks,
                        dial=self._dial,
                        random=self._random,
                        wall_clock=self._wall_clock,
                    )
                    self._generation_ended = False
                    await nursery.start(self._run_generation, self._generation)
            except TunnelError as error:
                if not error.final:
                    retry_at = trio.current_time() + self._config.restart_max_ms / 1000
                planned = None if error.final else math.ceil(self._wall_clock() + self._config.restart_max_ms / 1000)
                failed = Status(state=State.FAILED, error_kind=error.kind, message=str(error), retry_at_unix=planned)
                announce(self._feed, self._wall_clock, failed)
            self._taken_up = wanted
            self._make_progress()
            task_status.started()
            with trio.move_on_at(retry_at):
                while self._wanted == wanted:
                    # No deadline: a desired state holds until there is another one.
                    await self._changed.wait()
            if self._generation is not None and not self._key_withdrawn:
                await self._generation.take_leave(self._config.apply_grace_ms / 1000)
            nursery.cancel_scope.cancel()
        self._generation = None
        self._generation_ended = True

    async def _run_generation(self, generation: Generation, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await generation.run(task_status=task_status)
        finally:
            self._generation_ended = True

    async def _plan(self) -> Plan | None:
        """What the next generation is; None when there is to be none, which has been published then.

        Raises:
            TunnelError: why there can be none.
        """
        try:
            settings = await self.settings()
            if not settings.enabled:
                announce(self._feed, self._wall_clock, Status(state=State.DISABLED))
                return None
            config = effective_config(self._config, settings)
            serve = choose_transport(config, self._transports)
            key = await self._key(settings)
            instance = await trio.to_thread.run_sync(load_instance, self._config.runtime_path)
            target = make_target(config, key, instance=instance, dial=self._dial, limits=self._limits)
            return Plan(config=config, serve=serve, target=target)
        except TunnelError:
            raise
        except Exception as error:  # a keystore or key provider of the host may raise anything
            _log.exception("an unforeseen failure in preparing the tunnel; it will be tried again")
            raise UnknownError(f"an unforeseen failure, see the log: {type(error).__name__}") from error

    async def _key(self, settings: Settings) -> RelayKey | None:
        if self._keystore is not None:
            return await self._keystore.get(settings.secret_ref)
        assert self._key_provider is not None
        return await self._key_provider()

    def _make_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()
