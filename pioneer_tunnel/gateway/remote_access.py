"""Remote access as a gateway embeds it: settings, keystore, configuration, tunnel and status in one object.

    config = RemoteAccessConfig.load("gateway.toml")
    settings, keystore = SettingsFile("gateway-settings.toml"), FileKeystore("keystore")
    remote_access = RemoteAccess(config, settings=settings, keystore=keystore)
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, key=RelayKey("...")))
        async for status in remote_access.watch():
            print(status.state, status.error_kind, status.message, status.public_url)

It has two halves that never wait for each other. `apply` makes the desired state durable and signals that there is a
new one. `run` makes the desired state the actual one, generation by generation: the next one begins when all tasks and
sockets of the last one are gone. So an `apply` may come through the tunnel that it ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Final, final

import attrs
import trio

from .._async_library import need_trio
from .._model.errors import InvalidSettingsError, StorageError, TunnelError, UnknownError
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._model.log_fields import about
from .._model.session_limits import Limits
from .._model.stats import TunnelStats
from .._model.status import State, Status
from .._net.dialing import Dialer, dial_tcp
from .._net.network_changes import WatchNetwork
from .._net.tls.certificate import Certificate
from ..access.guard import check_files
from ..access.rules import Access
from ..access_log.writer import AccessLog
from ..certificates.opening import open_certificates
from ..monitoring.address import SiteAddress
from ..monitoring.serving import serve_metrics
from ..transports.built_in import TRANSPORTS
from ..transports.counts import TunnelCounts
from ..transports.interface import Serve
from ..transports.services import Services
from ..transports.tunnel_stream import Handler
from ..tunnel.restart_policy import Restarts, RunEnd
from ..tunnel.status_feed import StatusFeed
from ..tunnel.supervisor import announce, as_of_now
from .config import RemoteAccessConfig
from .generation import Generation
from .keystore import Keystore
from .planning import Plan, effective_config, make_plan, restart_policy, settle_config, why_refused
from .runtime_folder import load_instance
from .settings import Settings, SettingsFile, SettingsUpdate
from .settings_and_key import Desired, KeyProvider, NotRead, Stores, StoresHangError, Written
from .snapshot import Snapshot, wire_transport

__all__ = ["RemoteAccess"]

_log: Final = logging.getLogger("pioneer_tunnel.remote_access")


@final
class RemoteAccess:
    """A gateway's remote access.

    Args:
        config: the operator's configuration.
        settings: the settings file, which other programs may write too.
        keystore: where the relay key is stored.
        key_provider: for hosts that keep the key elsewhere: called for it at each generation, in place of `keystore`.
            Then saving and clearing a key is refused.
        handler: takes visitors' streams in this process; by default they are forwarded to `config.local_addr`.
        dial: makes TCP connections.
        watch_network: notices changes of the network; each one checks the link, as `retry_now` does. By default (None)
            the system's network is watched, unless `dial` is given.
        transports: the transports by name. One of your own may stand in for a built-in one.
        limits: what a session may cost in memory.
        services: what it offers in place of `config.services`, for a host that adds and removes services while it runs.
            Forwarded visitors go to its addresses. Only the host's own code gives these, never a client.
        random: the source of jitter.
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
        key_provider: KeyProvider | None = None,
        handler: Handler | None = None,
        dial: Dialer = dial_tcp,
        watch_network: WatchNetwork | None = None,
        transports: Mapping[str, Serve] = TRANSPORTS,
        limits: Limits | None = None,
        services: Services | None = None,
        random: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._stores: Final = Stores(settings, keystore=keystore, key_provider=key_provider)
        self._handler: Final = handler
        self._dial: Final = dial
        self._watch_network: Final = watch_network
        self._transports: Final = transports
        self._limits: Final = limits or Limits()
        self._services: Final = services
        self._random: Final = random or Random()  # noqa: S311  # jitter, no secret
        self._wall_clock: Final = wall_clock
        self._counts: Final = TunnelCounts(wall_clock())
        self._access_log: AccessLog | None = None  # of the generation
        self._feed: Final = StatusFeed(Status(state=State.DISABLED, updated_at_unix=int(wall_clock())))
        self._applying: Final = trio.Lock()
        self._running = self._stopping = False
        self._stopped = trio.Event()
        self._ended = trio.Event()
        self._generation: Generation | None = None
        self._generation_ended = True
        self._desired: Desired | None = None
        self._instance: tuple[Path, str] | None = None
        self._configured = 0
        self._wanted = 0
        self._taken_up = -1
        self._key_withdrawn = False
        self._grace = trio.CancelScope()
        self._retry_now = trio.Event()
        self._changed = trio.Event()
        self._progress = trio.Event()

    @property
    def config(self) -> RemoteAccessConfig:
        """The operator's configuration."""
        return self._config

    @property
    def status(self) -> Status:
        """Where remote access stands now."""
        return self._feed.current

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._feed.history

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._feed.dropped

    def stats(self) -> TunnelStats:
        """What remote access has done and holds, as of now, over all its settings so far. Does not wait.

        Transport `websocket` counts streams and bytes, `tcp` and `tls` count streams alone, and `process` nothing.
        """
        return self._counts.stats([] if self._generation is None else self._generation.sessions)

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`. Slow watchers skip, never block."""
        return self._feed.watch()

    async def settings(self) -> Settings:
        """What the settings file says now.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: its content is not allowed.
        """
        _need_trio()
        return await self._stores.settings()

    async def has_key(self) -> bool:
        """Whether a relay key is stored.

        Raises:
            StorageError: the keystore cannot tell, or does not answer within 20 s.
            UnknownError: the host's keystore or key provider raised an unexpected exception.
        """
        return await self._has_key(Desired(settings=await self.settings(), key=NotRead.YET))

    async def snapshot(self) -> Snapshot:
        """What clients see. Where settings cannot be used, the snapshot shows the configuration without them.

        Raises:
            StorageError: a file or the keystore cannot be read, or does not answer within 20 s.
            InvalidSettingsError: the content of the settings file is not allowed.
            UnknownError: as in `has_key`.
        """
        settings = await self.settings()
        has_key = await self._has_key(Desired(settings=settings, key=NotRead.YET))
        return self._show(settings, has_key=has_key, status=self.status)

    async def _has_key(self, desired: Desired) -> bool:
        with _unforeseen_named("asking for the relay key"):
            return await self._stores.has_key(desired)

    def _show(self, settings: Settings, *, has_key: bool, status: Status) -> Snapshot:
        try:
            config = effective_config(self._config, settings)
        except TunnelError:
            config = self._config  # the status reports what is wrong
        transport = config.effective_transport
        wire, detail = wire_transport(transport)
        return Snapshot(
            enabled=settings.enabled,
            server=str(config.effective_relay_addr),
            service_name=config.service_name,
            transport=wire,
            transport_detail=detail,
            has_key=has_key,
            status=status,
        )

    # Setting the desired state

    async def apply(self, update: SettingsUpdate) -> None:
        """Save `update`, whole or not at all, and hand it to `run`.

        It does not wait for the tunnel (`settled` does), so it may come through the tunnel that it changes. While
        `run` is not running, it only saves. An update that changes nothing leaves a live generation alone, except that
        it ends the wait after a rejection by the relay. When the generation has failed for good, an update that names a
        field starts a new one, even if it changes nothing.

        If cancelled while it waits for another `apply`, it does nothing. If cancelled later, it finishes first, for up
        to 5 s.

        Raises:
            InvalidSettingsError: `update` has a key or a server that cannot work, as far as that shows without a
                relay; or the content of the settings file is not allowed; or this host keeps its key where it cannot
                be changed. Nothing was changed.
            UnsupportedTransportError: the server in `update` needs a transport that this installation lacks. Nothing
                was changed.
            StorageError: a file or the keystore cannot be read or written; nothing was changed. Or it has not answered
                within 20 s. Then nothing can be rolled back now: a write that still happens is undone afterwards, and
                logged. Until then, no other update of the key is accepted.
        """
        written = await self._apply(update)
        if isinstance(written, TunnelError):
            raise written

    async def apply_and_show(self, update: SettingsUpdate) -> Snapshot | TunnelError:
        """`apply` for JSON-RPC: returns the snapshot after it, or why `update` is refused.

        The status of the snapshot is the one that the update leads to, where that is known at once.

        Raises:
            TunnelError: as for `apply` and `snapshot`, but not when `update` is wrong.
        """
        written = await self._apply(update)
        if isinstance(written, TunnelError):
            return written
        desired = written.desired
        has_key = await self._has_key(desired)
        return self._show(desired.settings, has_key=has_key, status=self._expected(desired))

    async def _apply(self, update: SettingsUpdate) -> Written | TunnelError:
        def judge(before: Settings, stored: RelayKey | None) -> TunnelError | None:
            return why_refused(update, before, stored, self._config, self._transports)

        _need_trio()
        async with self._applying:
            written = await self._stores.write(update, judge)
            if isinstance(written, TunnelError):
                return written
            if written.changed or (self._generation_ended and update != SettingsUpdate()):
                self._want_new_generation(
                    key_withdrawn=written.changed and update.deletes_key,
                    desired=written.desired if self._running else None,
                )
            elif self._generation is not None:
                self._generation.retry_if_rejected()
            return written

    def _expected(self, desired: Desired) -> Status:
        """The status that `desired` leads to; the current one where only an attempt or a file can show it."""
        if not self._running or self._taken_up >= self._wanted:
            return self.status
        if not desired.settings.enabled:
            expected = Status(state=State.DISABLED)
        elif isinstance(desired.key, NotRead):
            return self.status
        else:
            problem: TunnelError | None = None
            try:
                config, serve = settle_config(self._config, desired.settings, self._transports)
                if isinstance(desired.key, StorageError):
                    problem = desired.key
                else:
                    self._plan_of(config, serve, desired.key, instance="")
            except TunnelError as error:
                problem = error
            expected = Status(state=State.STARTING, attempt=1) if problem is None else _failed(problem)
        return as_of_now(self.status, self._wall_clock, expected)

    async def configure(self, config: RemoteAccessConfig) -> None:
        """Replace the configuration. If it differs from the one before, a new generation begins."""
        _need_trio()
        async with self._applying:
            if config != self._config:
                self._configured += 1
                self._config = config
                self._want_new_generation(key_withdrawn=False, desired=None)

    async def settled(self) -> None:
        """Wait until `run` has acted on everything that was applied, and the state is no longer `starting`.

        There is no deadline: the end of a generation and an attempt to connect have their own. Returns at once while
        `run` is not running.
        """
        _need_trio()
        wanted = self._wanted
        while self._running and self._taken_up < wanted:
            await self._progress.wait()
        async for status in self._feed.watch():
            if not self._running or status.state is not State.STARTING:
                return

    async def wait_failed(self) -> Status:
        """Wait until remote access has failed for good, so that nothing is retried; returns its status.

        There is no deadline. An update that starts a new generation makes it wait for the failure of that one.
        """
        _need_trio()
        while True:
            settled = self._running and self._generation_ended and self._taken_up == self._wanted
            if settled and self.status.state is State.FAILED:
                return self.status
            await self._progress.wait()

    def reopen_access_log(self) -> None:
        """Reopen the file of the access log, after it was renamed. Does not wait.

        Without an access log, and while `run` is not running, it does nothing.
        """
        if self._access_log is not None:
            self._access_log.reopen()

    def retry_now(self) -> None:
        """Retry now, if the tunnel waits before a retry; if it is up, check the link. See `Tunnel.retry_now`.

        Does nothing while `run` is not running.
        """
        self._retry_now.set()
        if self._generation is not None:
            self._generation.retry_now()

    def _want_new_generation(self, *, key_withdrawn: bool, desired: Desired | None) -> None:
        self._desired = desired
        if key_withdrawn:
            self._key_withdrawn = True
            self._grace.cancel()
        self._wanted += 1
        self._wake_generations()

    def _wake_generations(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # Running it

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what the settings ask for, until cancelled, or until `stop`. For `nursery.start`.

        Reports `started` after its first status, not after connecting. It may run again after it has ended. A bug in
        its tasks (for example, a `random` that raises) comes out, unwrapped when it is a single error.

        Raises:
            RuntimeError: it is running already, or asyncio is running, see `pioneer_tunnel.aio`.
        """
        _need_trio()
        if self._running:
            raise RuntimeError("RemoteAccess.run is running already")
        self._running, self._stopping, self._taken_up = True, False, -1
        self._stopped, self._ended = trio.Event(), trio.Event()
        self._feed.resume()
        try:
            with lone_error_bare():
                async with trio.open_nursery() as host_tasks:
                    host_tasks.start_soon(self._generations, host_tasks)
                    if self._config.metrics is not None:
                        host_tasks.start_soon(self._serve_metrics, self._config.metrics)
                    while self._taken_up < 0:
                        # No deadline: reading the stores, which the first status depends on, has one.
                        await self._progress.wait()
                    task_status.started()
                    # No deadline: it runs until it is stopped or cancelled.
                    await self._stopped.wait()
                    host_tasks.cancel_scope.cancel()
        finally:
            self._running, self._generation_ended = False, True
            self._desired = self._instance = None
            self._stores.forget_key()
            self._make_progress()
            try:
                announce(self._feed, self._wall_clock, Status(state=State.STOPPED))
            finally:
                self._feed.end()
                self._ended.set()

    async def _serve_metrics(self, address: SiteAddress) -> None:
        try:
            await serve_metrics(self, address)
        except (OSError, TunnelError) as error:
            line = "there are no metrics, and remote access goes on without: %s"
            _log.error(line, error, extra=about("no_metrics", reason=error))

    async def stop(self) -> None:
        """Stop `run` in order: ask the relay for no more visitors, wait for those who are there, and disconnect.

        They have `stop_grace_ms`, unless the key was withdrawn. Then `run` returns, and so does this. It does nothing
        while `run` is not running. If cancelled, `run` stops all the same; to stop it at once, cancel `run`.
        """
        _need_trio()
        if self._running:
            self._stopping = True
            self._wake_generations()
            await self._ended.wait()

    async def _generations(self, host_tasks: trio.Nursery) -> None:
        """Run one desired state after another. The next one begins when nothing is left of the one before."""
        while not self._stopping:
            wanted = self._wanted
            # A generation that is being prepared counts as live: an apply that changes nothing leaves it alone.
            self._key_withdrawn = self._generation_ended = False
            self._stores.forget_key()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_desired, wanted, host_tasks)
                while self._wanted == wanted and not self._stopping:
                    # No deadline: a desired state lasts until there is another one.
                    await self._changed.wait()
                await self._drain_visitors()
                nursery.cancel_scope.cancel()
        self._stopped.set()

    async def _drain_visitors(self) -> None:
        """Refuse new visitors, and wait for those that are there: `stop_grace_ms`, or else `apply_grace_ms`."""
        generation = self._generation
        if generation is None or self._generation_ended:
            return
        generation.refuse_visitors()
        if not self._key_withdrawn:
            config = self._config
            grace = config.stop_grace_ms if self._stopping else config.apply_grace_ms
            with trio.move_on_after(grace / 1000) as self._grace:
                await (generation.drain() if self._stopping else generation.visitors_gone())

    async def _run_desired(self, wanted: int, host_tasks: trio.Nursery) -> None:
        """Run the generation that is desired, or publish why there is none."""
        restarts = Restarts(restart_policy(self._config), self._random)
        try:
            while isinstance(plan := await self._plan(), TunnelError):
                delay = None if plan.final else restarts.after(RunEnd())
                if delay is not None:
                    failed = attrs.evolve(_failed(plan), retry_at_unix=math.ceil(self._wall_clock() + delay))
                else:
                    failed = _failed(plan if plan.final else restarts.limit_reached(plan))
                self._note_taken_up(wanted, failed)
                if delay is None:
                    return
                self._retry_now = trio.Event()
                with trio.move_on_after(delay):
                    await self._retry_now.wait()
                self._feed.publish(attrs.evolve(self._feed.current, retry_at_unix=None))
            if plan is None:
                self._note_taken_up(wanted, Status(state=State.DISABLED))
                return
            config = plan.config
            self._access_log = AccessLog.configured(
                config.access_log_path, config.access_log_format, config.access_log_addresses
            )
            async with nullcontext() if self._access_log is None else self._access_log.kept():
                self._generation = Generation(
                    plan,
                    self._feed,
                    access_log=self._access_log,
                    handler=self._handler,
                    host_tasks=host_tasks,
                    dial=self._dial,
                    watch_network=self._watch_network,
                    random=self._random,
                    wall_clock=self._wall_clock,
                )
                # Tasks that this wakes see `starting`: a generation publishes it before its first checkpoint.
                self._note_taken_up(wanted)
                await self._generation.run()
        finally:
            self._access_log = None
            self._generation, self._generation_ended = None, True
            self._make_progress()

    def _note_taken_up(self, wanted: int, status: Status | None = None) -> None:
        if status is not None:
            announce(self._feed, self._wall_clock, status)
        self._taken_up = wanted
        self._make_progress()

    async def _plan(self) -> Plan | TunnelError | None:
        """The plan of the next generation; None when remote access is switched off; the error when there can be none.

        Settings and key are read as of one moment, so a change that a failing `apply` rolls back is never used.
        """
        while True:
            async with self._applying:
                seen = (self._stores.writes, self._configured)
            plan: Plan | TunnelError | None
            try:
                with _unforeseen_named("preparing the tunnel"):
                    plan = await self._read_plan()
            except StoresHangError as error:
                plan = UnknownError(str(error))  # retried: a keyring may wait to be unlocked
            except TunnelError as error:
                plan = error
            if seen == (self._stores.writes, self._configured):
                return plan

    async def _read_plan(self) -> Plan | None:
        desired, self._desired = self._desired, None
        if desired is None:
            desired = Desired(settings=await self.settings(), key=NotRead.YET)
        if not desired.settings.enabled:
            return None
        config, serve = settle_config(self._config, desired.settings, self._transports)
        key = await self._stores.key(desired)
        folder = self._config.runtime_path
        if self._instance is None or self._instance[0] != folder:
            self._instance = folder, await trio.to_thread.run_sync(load_instance, folder)
        instance = self._instance[1]
        plan = self._plan_of(config, serve, key, instance=instance)
        plan = attrs.evolve(plan, target=attrs.evolve(plan.target, counts=self._counts))
        if config.access_log is not None and self._handler is not None:
            raise InvalidSettingsError("access_log is for visitors that are forwarded; here the program takes them")
        rules = [access for access in config.access_rules.values() if access is not None]
        if rules:
            await trio.to_thread.run_sync(self._check_access, rules)
        if config.acme_config is not None:
            automatic = await trio.to_thread.run_sync(open_certificates, config.acme_config)
            return attrs.evolve(plan, automatic=automatic)
        if config.tls is None:
            return plan
        return attrs.evolve(plan, certificate=await trio.to_thread.run_sync(Certificate, *config.tls_paths))

    def _plan_of(self, config: RemoteAccessConfig, serve: Serve, key: RelayKey | None, *, instance: str) -> Plan:
        return make_plan(
            config, serve, key, instance=instance, dial=self._dial, limits=self._limits, services=self._services
        )

    def _check_access(self, rules: Sequence[Access]) -> None:
        """Find out what is wrong with the access rules, before a visitor comes.

        Raises:
            StorageError, InvalidSettingsError: see `check_files`. The latter also if the rules would not be checked.
        """
        if self._handler is not None:
            raise InvalidSettingsError("access rules are for visitors that are forwarded; here the program takes them")
        for access in rules:
            check_files(access)

    def _make_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()


def _need_trio() -> None:
    need_trio("pioneer_tunnel.RemoteAccess", "pioneer_tunnel.aio.RemoteAccess")


def _failed(error: TunnelError) -> Status:
    return Status(state=State.FAILED, error_kind=error.kind, message=str(error))


@contextmanager
def _unforeseen_named(doing: str) -> Iterator[None]:
    """Turn unexpected exceptions of a host's keystore or key provider into `UnknownError`."""
    try:
        yield
    except TunnelError:
        raise
    except Exception as error:
        _log.exception("an unforeseen failure in %s", doing, extra=about("unforeseen", reason=doing))
        raise UnknownError(f"an unforeseen failure, see the log: {type(error).__name__}") from error
