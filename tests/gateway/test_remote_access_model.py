"""Remote access against a model, in virtual time: whatever happens in whatever order, the contract is kept.

The model is what was asked for last. Steps are data: an update, one that is cancelled or that the disk refuses, another
configuration, time going by, visitors, a restart of the host. After each of them the stores hold what the model says,
and whenever it has settled, so does the status.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final, TypeAlias, final

import attrs
import trio
import trio.testing
from fuzzing import examples
from gateway import KEY, OTHER_KEY, Carried, Gateway, failing_once
from hypothesis import HealthCheck, event, given, settings, strategies as st

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RelayResolveError,
    StorageError,
    TunnelAuthError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate
from pioneer_tunnel.testing import Connect, Crash, Fail, Return, ScriptedTransport, Stall, StatusContract, Step
from pioneer_tunnel.testing.virtual_time import without_threads
from pioneer_tunnel.transports.interface import LinkLost, LocalDialFailed, RoundTrip
from pioneer_tunnel.transports.tunnel_stream import TunnelStream


@final
@attrs.frozen
class Apply:
    update: SettingsUpdate


@final
@attrs.frozen
class ApplyCancelled:
    """Cancelled after so many checkpoints of another task."""

    update: SettingsUpdate
    checkpoints: int


@final
@attrs.frozen
class ApplyRefused:
    """The disk or the keystore fails once."""

    update: SettingsUpdate
    failing: str


@final
@attrs.frozen
class Configure:
    changes: dict[str, Any]


@final
@attrs.frozen
class Wait:
    seconds: float


@final
@attrs.frozen
class Visit:
    """A visitor comes, whose handler holds on to the stream for so long, and will not be cancelled."""

    seconds: float


@final
@attrs.frozen
class RetryNow:
    pass


@final
@attrs.frozen
class Settle:
    pass


@final
@attrs.frozen
class Restart:
    """The host ends `run`, and runs it again, in the same process or in a new one."""

    new_process: bool


Action: TypeAlias = Apply | ApplyCancelled | ApplyRefused | Configure | Wait | Visit | RetryNow | Settle | Restart

CONFIGS: Final[list[dict[str, Any]]] = [
    {},
    {"max_restarts": 2, "restart_jitter_percent": 20},
    {"allow_server_override": True},
    {"relay_addr": "relay.test:2333"},
    {"apply_grace_ms": 0, "restart_max_ms": 2000},
]

keys = st.sampled_from([KEY, OTHER_KEY])
updates = st.builds(
    SettingsUpdate,
    enabled=st.sampled_from([None, True, True, False]),
    server=st.sampled_from([None, None, "", "wss://elsewhere.test", "http://wrong"]),
    key=st.one_of(st.none(), keys),
    clear_key=st.sampled_from([False, False, False, True]),
)
waits = st.sampled_from([0.0, 0.3, 1.0, 5.0, 31.0, 120.0])
actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(Apply, updates),
    st.builds(Apply, updates),
    st.builds(ApplyCancelled, updates, st.integers(0, 12)),
    st.builds(ApplyRefused, updates, st.sampled_from(["replace", "get", "put", "delete"])),
    st.builds(Configure, st.sampled_from(CONFIGS)),
    st.builds(Wait, waits),
    st.builds(Visit, waits),
    st.builds(RetryNow),
    st.builds(Settle),
    st.builds(Restart, st.booleans()),
)
scripts = st.tuples(
    st.sampled_from([[Apply(SettingsUpdate(enabled=True, key=KEY))], []]), st.lists(actions, max_size=14)
).map(lambda parts: [*parts[0], *parts[1]])
failures = st.one_of(
    st.builds(
        Fail,
        st.sampled_from([RelayConnectError, RelayResolveError, LinkLostError, TunnelAuthError, InvalidSettingsError]),
        after=waits,
        retry_after=st.one_of(st.none(), st.sampled_from([0.5, 60.0, 5000.0])),
        retry_slowly=st.booleans(),
    ),
    st.builds(Crash, st.sampled_from([RuntimeError, OSError, AssertionError]), after=waits),
    st.builds(Return, after=waits),
)
reports = st.lists(
    st.tuples(
        waits, st.sampled_from([RoundTrip(0.02), RoundTrip(0.03), LocalDialFailed("no"), LinkLost(LinkLostError("x"))])
    ),
    max_size=4,
).map(tuple)
steps: st.SearchStrategy[Step] = st.one_of(
    failures,
    st.builds(Stall, waits),
    st.builds(Connect, waits, after=waits, then=failures, reports=reports),
    st.builds(Connect),
)


@final
class Host:
    """A gateway's process, or several of them one after another, and the model beside it."""

    def __init__(self, folder: Path, transport: ScriptedTransport, seed: int) -> None:
        self._gateway = Gateway(folder, transport=transport)
        self._transport = transport
        self._random = Random(seed)
        self._wanted = Settings()
        self._key: RelayKey | None = None
        self._config: dict[str, Any] = {}
        self._nursery: trio.Nursery | None = None
        self._hold: list[float] = []
        self._remote_access = self._start_process()

    def _start_process(self) -> RemoteAccess:
        contract = StatusContract()
        remote_access = self._gateway.remote_access(self._config, handler=self._handle, random=self._random)
        publish = remote_access._feed.publish
        contract.see(remote_access.status)

        def judged(status: Status) -> None:
            if status != remote_access.status:
                contract.see(status)
            publish(status)

        remote_access._feed.publish = judged  # type: ignore[method-assign]
        return remote_access

    async def _handle(self, stream: TunnelStream) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(self._hold.pop())

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._remote_access.run)
            yield
            nursery.cancel_scope.cancel()
        assert self._remote_access.status.state is State.STOPPED
        assert self._transport.running == 0

    async def live(self, script: list[Action]) -> None:
        left = list(script)
        while True:
            async with self._running():
                restart = await self._until_restart(left)
            await self._check_stores()
            if restart is None:
                return
            if restart.new_process:
                self._remote_access = self._start_process()

    async def _until_restart(self, left: list[Action]) -> Restart | None:
        while left:
            action = left.pop(0)
            if isinstance(action, Restart):
                return action
            began = trio.current_time()
            await self._do(action)
            if not isinstance(action, Wait | Settle):
                assert trio.current_time() == began, f"{action} waited for a generation"
            await self._check_stores()
            assert not self._transport.overlapped
        await self._settle()
        return None

    async def _do(self, action: Action) -> None:
        match action:
            case Apply(update=update):
                await self._remote_access.apply(update)
                self._accept(update)
            case ApplyCancelled():
                await self._apply_and_cancel(action)
            case ApplyRefused():
                await self._apply_and_fail(action)
            case Configure(changes=changes):
                await self._remote_access.configure(self._gateway.config(**changes))
                self._config = changes
            case Wait(seconds=seconds):
                await trio.sleep(seconds)
            case Visit(seconds=seconds):
                self._hold.append(seconds)
                with suppress(trio.WouldBlock):
                    self._transport.visit(TunnelStream(Carried()))
            case RetryNow():
                self._remote_access.retry_now()
            case Settle():
                await self._settle()
            case Restart():
                raise AssertionError("the caller does that")

    async def _apply_and_cancel(self, action: ApplyCancelled) -> None:
        before = await self._stored()
        begun = False
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def apply() -> None:
                nonlocal begun
                begun = True
                await self._remote_access.apply(action.update)

            for _ in range(action.checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        after = await self._stored()
        wanted, key = self._wanted, self._key
        self._accept(action.update)
        if after != (self._wanted, self._key):
            assert after == before
            assert action.checkpoints <= 3, "an apply that had begun was not finished"
            self._wanted, self._key = wanted, key
        event(f"cancelled {'after' if after != before else 'without'} effect")

    async def _apply_and_fail(self, action: ApplyRefused) -> None:
        keystore = self._gateway.keystore
        try:
            if action.failing == "replace":
                with failing_once("replace"):
                    await self._remote_access.apply(action.update)
            else:
                await trio.testing.wait_all_tasks_blocked()  # the failure is for the apply, not for `run`
                keystore.failing.add(action.failing)
                await self._remote_access.apply(action.update)
        except StorageError:
            event("an apply was refused")
        else:
            self._accept(action.update)
        finally:
            keystore.failing.clear()

    def _accept(self, update: SettingsUpdate) -> None:
        self._wanted = update.apply_to(self._wanted)
        self._key = update.key or (None if update.clear_key else self._key)

    async def _stored(self) -> tuple[Settings, RelayKey | None]:
        return self._gateway.stored(), await self._gateway.stored_key()

    async def _check_stores(self) -> None:
        assert await self._stored() == (self._wanted, self._key)

    async def _settle(self) -> None:
        remote_access = self._remote_access
        await remote_access.settled()
        status = remote_access.status
        event(f"settled as {status.state}")
        attempt = self._transport.attempts[-1] if self._transport.attempts else None
        if not self._wanted.enabled:
            expected: ErrorKind | None = None
            assert status.state is State.DISABLED
        elif "relay_addr" in self._config:
            expected = ErrorKind.UNSUPPORTED_TRANSPORT
        elif self._config.get("allow_server_override") and self._wanted.server == "http://wrong":
            expected = ErrorKind.INVALID_SETTINGS
        elif self._key is None:
            expected = ErrorKind.MISSING_KEY
        else:
            # It runs, or has run, with what was asked for last.
            assert status.state in {State.CONNECTED, State.RECONNECTING, State.FAILED}
            assert attempt is not None
            assert attempt.target.key == self._key
            server = self._wanted.server if self._config.get("allow_server_override") else None
            assert str(attempt.target.address) == (server or "wss://relay.test")
            if status.state is State.CONNECTED:
                assert attempt.connected is not None
                assert attempt.ended is None
            return
        assert status.error_kind is expected
        assert status.state in {State.DISABLED, State.FAILED}
        assert status.retry_at_unix is None
        assert self._transport.running == 0


@settings(max_examples=examples(150), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    script=scripts,
    transport_steps=st.lists(steps, max_size=8),
    goodbye=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 9),
)
def test_remote_access_does_what_was_asked_last_and_says_what_the_contract_allows(
    script: list[Action], transport_steps: list[Step], goodbye: float, seed: int
) -> None:
    async def main() -> None:
        transport = ScriptedTransport(transport_steps, goodbye=goodbye)
        tasks = trio.lowlevel.current_statistics().tasks_living
        await Host(Path(folder), transport, seed).live(script)
        assert not transport.overlapped
        assert trio.lowlevel.current_statistics().tasks_living == tasks

    with tempfile.TemporaryDirectory() as folder, without_threads():
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
