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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.errors import StorageError, TunnelError, UnknownError
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._model.status import State, Status
from .._net.dialing import Dialer, dial_tcp
from .._net.tls.certificate import Certificate
from ..transports import TRANSPORTS, Serve
from ..transports.tunnel_stream import Handler
from ..tunnel.restart_policy import Ending, Restarts
from ..tunnel.status_feed import StatusFeed
from ..tunnel.supervisor import announce, as_of_now
from ..yamux import Limits
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
        key_provider: KeyProvider | None = None,
        handler: Handler | None = None,
        dial: Dialer = dial_tcp,
        transports: Mapping[str, Serve] = TRANSPORTS,
        limits: Limits | None = None,
        random: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._stores: Final = Stores(settings, keystore=keystore, key_provider=key_provider)
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

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._feed.dropped

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`. Slow watchers skip, never block."""
        return self._feed.watch()

    async def settings(self) -> Settings:
        """What the settings file says now.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: what stands in it is not allowed.
        """
        return await self._stores.settings()

    async def has_key(self) -> bool:
        """Whether a relay key is stored.

        Raises:
            StorageError: the keystore cannot tell, or does not answer within 20 s.
            UnknownError: the host's keystore or key provider failed in a way that no one foresaw.
        """
        return await self._has_key(Desired(settings=await self.settings(), key=NotRead.YET))

    async def snapshot(self) -> Snapshot:
        """What clients are shown. Settings that cannot be used are shown as what stands in for them.

        Raises:
            StorageError: a file or the keystore cannot be read, or does not answer within 20 s.
            InvalidSettingsError: what stands in the settings file is not allowed.
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
            config = self._config  # the status tells what is wrong
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

    # Saying what is desired

    async def apply(self, update: SettingsUpdate) -> None:
        """Make `update` durable, whole or not at all, and hand it to `run`.

        It does not wait for the tunnel (`settled` does), so it may come through the tunnel that it changes. While
        `run` is not running, it saves only. What changes nothing leaves a live generation alone, except that it
        ends the wait after a rejection by the relay; when the generation has failed for good, an update that names a
        field starts a new one, changed or not.

        Cancelled while it waits for another `apply`, it does nothing; later, it is finished first, if that takes no
        longer than 5 s.

        Raises:
            InvalidSettingsError: `update` has a key or a server that cannot work, as far as that shows without a
                relay; or the settings file holds something that is not allowed; or this host keeps its key where it
                cannot be changed. All is as it was.
            UnsupportedTransportError: the server that `update` names takes a transport that this installation lacks.
                All is as it was.
            StorageError: a file or the keystore cannot be read or written; all is as it was. Or it has not answered
                within 20 s: then nothing can be rolled back now. What it still writes is undone when it has written
                it, and the log reports that. Until then, no other update about the key is accepted.
        """
        written = await self._apply(update)
        if isinstance(written, TunnelError):
            raise written

    async def apply_and_show(self, update: SettingsUpdate) -> Snapshot | TunnelError:
        """`apply` for JSON-RPC: returns what clients are shown of it, or why `update` is refused.

        The status is the one that the update leads to, where that is known at once.

        Raises:
            TunnelError: as `apply` and `snapshot` do, unless it is `update` that is wrong.
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
        """The status that `desired` leads to; the current one where that takes an attempt or a file to tell."""
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
                    make_plan(config, serve, desired.key, instance="", dial=self._dial, limits=self._limits)
            except TunnelError as error:
                problem = error
            expected = Status(state=State.STARTING, attempt=1) if problem is None else _failed(problem)
        return as_of_now(self.status, self._wall_clock, expected)

    async def configure(self, config: RemoteAccessConfig) -> None:
        """Go on with another configuration; a new generation begins when it differs from the one before."""
        async with self._applying:
            if config != self._config:
                self._configured += 1
                self._config = config
                self._want_new_generation(key_withdrawn=False, desired=None)

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
        """Try to connect at once, if the tunnel is waiting to. For a host that knows that the network is back.

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
        self._changed.set()
        self._changed = trio.Event()

    # Bringing it about

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Bring about what the settings ask for, until cancelled. For `nursery.start`.

        Reports `started` after its first status, not after connecting. May be run again after it has ended. A bug in
        its tasks (for example, a `random` that raises) comes out, unwrapped when it is a single error.

        Raises:
            RuntimeError: it is running already.
        """
        if self._running:
            raise RuntimeError("RemoteAccess.run is running already")
        self._running, self._taken_up = True, -1
        self._feed.resume()
        try:
            with lone_error_bare():
                async with trio.open_nursery() as host_tasks:
                    host_tasks.start_soon(self._generations, host_tasks)
                    while self._taken_up < 0:
                        # No deadline: where one is due, what the first status depends on has it.
                        await self._progress.wait()
                    task_status.started()
        finally:
            self._running, self._generation_ended = False, True
            self._desired = self._instance = None
            self._stores.forget_key()
            self._make_progress()
            try:
                announce(self._feed, self._wall_clock, Status(state=State.STOPPED))
            finally:
                self._feed.end()
        raise AssertionError("generations end only by being cancelled")

    async def _generations(self, host_tasks: trio.Nursery) -> NoReturn:
        """One desired state after another: the next is brought about when nothing is left of the one before."""
        while True:
            wanted = self._wanted
            # What is being prepared counts as live: an apply that changes nothing leaves it alone.
            self._key_withdrawn = self._generation_ended = False
            self._stores.forget_key()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bring_about, wanted, host_tasks)
                while self._wanted == wanted:
                    # No deadline: a desired state holds until there is another one.
                    await self._changed.wait()
                await self._take_leave()
                nursery.cancel_scope.cancel()

    async def _take_leave(self) -> None:
        """Let the visitors of a generation finish, for as long as they have."""
        if self._generation is None or self._generation_ended:
            return
        self._generation.refuse_visitors()
        if not self._key_withdrawn:
            with trio.move_on_after(self._config.apply_grace_ms / 1000) as self._grace:
                await self._generation.visitors_gone()

    async def _bring_about(self, wanted: int, host_tasks: trio.Nursery) -> None:
        """What is desired: a generation, or the status that says why there is none."""
        restarts = Restarts(restart_policy(self._config), self._random)
        try:
            while isinstance(plan := await self._plan(), TunnelError):
                delay = None if plan.final else restarts.after(Ending())
                if delay is not None:
                    failed = attrs.evolve(_failed(plan), retry_at_unix=math.ceil(self._wall_clock() + delay))
                else:
                    failed = _failed(plan if plan.final else restarts.limit_reached(plan))
                self._take_up(wanted, failed)
                if delay is None:
                    return
                self._retry_now = trio.Event()
                with trio.move_on_after(delay):
                    await self._retry_now.wait()
                self._feed.publish(attrs.evolve(self._feed.current, retry_at_unix=None))
            if plan is None:
                self._take_up(wanted, Status(state=State.DISABLED))
                return
            self._generation = Generation(
                plan,
                self._feed,
                handler=self._handler,
                host_tasks=host_tasks,
                dial=self._dial,
                random=self._random,
                wall_clock=self._wall_clock,
            )
            # Whom this wakes finds `starting`: a generation says so before it waits for anything.
            self._take_up(wanted)
            await self._generation.run()
        finally:
            self._generation, self._generation_ended = None, True

    def _take_up(self, wanted: int, status: Status | None = None) -> None:
        if status is not None:
            announce(self._feed, self._wall_clock, status)
        self._taken_up = wanted
        self._make_progress()

    async def _plan(self) -> Plan | TunnelError | None:
        """What the next generation is; None when none is asked for, and the error when there can be none.

        Settings and key are read as of one moment: what an `apply` that fails takes back is not acted upon.
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
        plan = make_plan(config, serve, key, instance=instance, dial=self._dial, limits=self._limits)
        if config.tls is None:
            return plan
        return attrs.evolve(plan, certificate=await trio.to_thread.run_sync(Certificate, *config.tls_paths))

    def _make_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()


def _failed(error: TunnelError) -> Status:
    return Status(state=State.FAILED, error_kind=error.kind, message=str(error))


@contextmanager
def _unforeseen_named(doing: str) -> Iterator[None]:
    """Let a `TunnelError` through; whatever else a host's keystore or key provider raises is unforeseen."""
    try:
        yield
    except TunnelError:
        raise
    except Exception as error:
        _log.exception("an unforeseen failure in %s", doing)
        raise UnknownError(f"an unforeseen failure, see the log: {type(error).__name__}") from error
