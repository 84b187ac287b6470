"""The gateway of a simulated day, and the events of the `Day` that happen to it.

It knows at any moment whether anything is wrong (`calm`), and counts disturbances.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Final, NoReturn, final

import trio

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import TunnelError
from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import SettingsFile, SettingsUpdate
from pioneer_tunnel.testing.faults import FaultPlan
from pioneer_tunnel.testing.faulty_dialer import FaultyDialer
from pioneer_tunnel.testing.memory_relay import MemoryRelay
from pioneer_tunnel.testing.status_contract import attempt_began
from pioneer_tunnel.testing.virtual_time import wall_clock
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

from .conversation import Speech, Spoken, Talk
from .crowd import Crowd
from .day import (
    Act,
    Day,
    KeyChange,
    KeyRevoked,
    LocalGatewayDown,
    Lull,
    RelayRestart,
    Rival,
    SameAgain,
    Storm,
    SwitchedOff,
)
from .trace import Trace

__all__ = ["World"]

TUNNEL: Final = "office"

RECOVERY: Final = 1000.0
"""Seconds until the gateway must be connected again: a relay may have asked it to wait 15 minutes."""

_FINAL: Final = frozenset(
    {
        ErrorKind.INVALID_SETTINGS,
        ErrorKind.MISSING_KEY,
        ErrorKind.TUNNEL_AUTH_FAILED,
        ErrorKind.UNSUPPORTED_TRANSPORT,
        ErrorKind.RESTART_LIMIT_REACHED,
        ErrorKind.IO,
    }
)
"""The final failures of the gateway contract: another attempt is useless or harmful."""


@final
class World:
    """See the module.

    Args:
        day: the day.
        relay: the relay.
        trace: where events and faults are recorded.
        folder: the folder for the gateway's files.

    Attributes:
        relay: the argument `relay`.
        remote_access: the gateway.
    """

    def __init__(self, day: Day, relay: MemoryRelay, trace: Trace, folder: Path) -> None:
        self.relay: Final = relay
        self._day: Final = day
        self._trace: Final = trace
        self._crowd: Final = Crowd(relay, self, trace)
        self._key = relay.key
        self._keys = 0
        self._disturbances = 0
        self._generation = -1
        self._key_doubtful_since: float | None = None
        self._key_doubtful_until = -1.0
        self._rival_until = -1.0
        self._local_is_up = day.forwards
        self._nursery: trio.Nursery
        self.remote_access: Final = RemoteAccess(
            RemoteAccessConfig(relay_addr=relay.url, base_dir=folder),
            settings=SettingsFile(folder / "gateway-settings.toml"),
            keystore=MemoryKeystore(),
            handler=None if day.forwards else self._answer,
            dial=self._dial,
            watch_network=relay.watch_network if day.told else None,
            random=Random(day.seed),  # jitter
            wall_clock=wall_clock,
        )

    # State

    @property
    def calm(self) -> bool:
        """Whether nothing is wrong: a visitor who connects now must get through."""
        dials = self.relay.dials
        connection = dials[-1].connection if dials else None
        return (
            self.relay.running
            and self.relay.reachable
            and connection is not None
            and connection.whole
            and connection.bytes_per_second == float("inf")
            and self.remote_access.status.state is State.CONNECTED
            and self._rival_until < trio.current_time()
            and self._local_is_up is self._day.forwards
        )

    @property
    def disturbances(self) -> int:
        """Number of disturbances so far."""
        return self._disturbances

    def _disturb(self) -> None:
        self._disturbances += 1

    async def _watch_disturbances(self) -> NoReturn:
        """Count each change of a link as a disturbance."""
        while True:
            await self.relay.change()
            self._disturb()

    # The gateway

    async def start(self, nursery: trio.Nursery) -> trio.Nursery:
        """Start the gateway and the tasks beside it; returns the nursery that has only the gateway."""
        started: list[trio.Nursery] = []

        async def run(task_status: trio.TaskStatus[None]) -> None:
            async with trio.open_nursery() as gateway:
                started.append(gateway)
                await gateway.start(self.remote_access.run)
                task_status.started()

        if self._day.forwards:
            self.relay.listen(self._answer)
        self._nursery = nursery
        nursery.start_soon(self._watch_disturbances)
        nursery.start_soon(self._watch_statuses)
        await nursery.start(run)
        nursery.start_soon(self._mend)
        await self._apply(SettingsUpdate(enabled=True, key=self._key))
        return started[0]

    async def _dial(self, host: str, port: int) -> trio.abc.Stream:
        """The gateway's `Dialer`: report a dial after a final failure."""
        if Address(host, port) != self.relay.address:
            return await self.relay.dial(host, port)
        if self._has_given_up:
            status = self.remote_access.status
            self._trace.complain(f"it dialled at {trio.current_time():.3f} s, having given up: {status}")
        if self._begins_generation():
            self.relay.dial.settings_applied()
        try:
            return await self.relay.dial(host, port)
        finally:
            if self.relay.dials:
                self._trace.note(f"dial {self.relay.dials[-1].fault}", count="dials")

    def _begins_generation(self) -> bool:
        """Whether a generation has begun since the last call: it may begin long after `apply`."""
        before, dropped = self._generation, self.remote_access.history_dropped
        for number, status in enumerate(self.remote_access.history):
            if status.state is State.STARTING:
                self._generation = max(self._generation, dropped + number)
        return self._generation != before

    @property
    def _has_given_up(self) -> bool:
        *before, status = self.remote_access.history[-2:]
        return _rejected(status) and status.retry_at_unix is None and not (before and attempt_began(before[0], status))

    async def _answer(self, stream: Spoken) -> None:
        """Serve a visitor, as the gateway, as the local gateway behind it, or as a rival."""
        await self._crowd.answer(stream)

    async def _watch_statuses(self) -> NoReturn:
        async for status in self.remote_access.watch():
            self._check_reason(status)
        raise AssertionError("the gateway has stopped")

    def _check_reason(self, status: Status) -> None:
        """Report a failure that is final, or retried only every 15 minutes, without a reason."""
        if not _rejected(status) or not (self._has_given_up or status.retry_at_unix is not None):
            return
        dial = self.relay.dials[-1]
        reasons = set()
        if dial.fault is not None and dial.fault.final:
            reasons.add(dial.fault.kind)
        if self._key_doubtful_since is not None or self._key_doubtful_until >= dial.at:
            reasons.add(ErrorKind.TUNNEL_AUTH_FAILED)
        if self._rival_until >= dial.at:
            reasons.add(ErrorKind.INVALID_SETTINGS)
        if status.error_kind not in reasons:
            known = ", ".join(sorted(map(str, reasons))) or "there is none"
            self._trace.complain(f"it gave up without a reason: {status}; reasons: {known}")

    # Events

    async def live(self) -> None:
        """Run all events and visitors of the day; at the end no visitor is left."""
        for talk in self._day.talks:
            self._nursery.start_soon(self._crowd.come, talk)
        for at in self._day.acts:
            await trio.sleep_until(at.seconds)
            await self.do(at.act)
        await trio.sleep_until(self._day.end)
        self._crowd.hurry()
        await self.do(Lull(3, 100_000))
        await self._crowd.gone()

    async def do(self, act: Act) -> None:
        """Run one event to its end."""
        self._trace.note(f"{act}", count="things that happened")
        match act:
            case Storm(plan=plan):
                if not self._has_given_up:
                    self.relay.follow(plan)
                    self.relay.cut()
            case RelayRestart(seconds=seconds, abruptly=abruptly):
                await self.relay.stop(abruptly=abruptly)
                await trio.sleep(seconds)
                await self.relay.start()
            case KeyRevoked(seconds=seconds, cut=cut):
                async with self._doubtful_key():
                    self.relay.revoke(TUNNEL)
                    if cut:
                        self.relay.cut()
                    await trio.sleep(seconds)
                    self.relay.register(TUNNEL, self._key)
            case KeyChange(seconds=seconds, gateway_first=gateway_first):
                async with self._doubtful_key():
                    await self._change_key(seconds, gateway_first=gateway_first)
            case SwitchedOff(seconds=seconds):
                await self._apply(SettingsUpdate(enabled=False))
                await trio.sleep(seconds)
                await self._apply(SettingsUpdate(enabled=True))
            case SameAgain():
                if not self._has_given_up:
                    # No disturbance is counted: it must not cause one.
                    await self.remote_access.apply(SettingsUpdate(enabled=True))
            case LocalGatewayDown(seconds=seconds):
                if self._day.forwards:
                    await self._stop_local_gateway(seconds)
            case Rival(seconds=seconds):
                # `is_silent` knows only the last link of each tunnel.
                if not self.relay.is_silent(TUNNEL):
                    await self._rival(seconds)
            case Lull():
                await self._lull(act)

    async def _apply(self, update: SettingsUpdate) -> None:
        self._disturb()
        await self.remote_access.apply(update)
        self._disturb()

    async def _change_key(self, seconds: float, *, gateway_first: bool) -> None:
        self._keys += 1
        self._key = RelayKey(f"ptk1_the-key-number-{self._keys:04}-0123456789abcdef")
        if gateway_first:
            await self._apply(SettingsUpdate(key=self._key))
        else:
            self.relay.register(TUNNEL, self._key)
        await trio.sleep(seconds)
        if gateway_first:
            self.relay.register(TUNNEL, self._key)
        else:
            await self._apply(SettingsUpdate(key=self._key))

    async def _stop_local_gateway(self, seconds: float) -> None:
        self._disturb()
        self._local_is_up = False
        self.relay.stop_listening()
        await trio.sleep(seconds)
        self.relay.listen(self._answer)
        self._local_is_up = True
        self._disturb()

    async def _rival(self, seconds: float) -> None:
        relay = self.relay
        random = Random(self._day.seed)  # jitter
        self._rival_until = float("inf")
        self._disturb()
        try:
            with trio.move_on_after(seconds):
                async with open_tunnel(
                    relay.url, key=self._key, dial=FaultyDialer(relay), random=random, wall_clock=wall_clock
                ) as tunnel:
                    await _serve_visitors(tunnel, self._answer)
        except TunnelError as error:
            self._trace.note(f"the rival had to go: {error.kind}")
        # The gateway may notice its effects later.
        self._rival_until = trio.current_time() + 2 * self._day.heartbeat
        self._disturb()

    @asynccontextmanager
    async def _doubtful_key(self) -> AsyncIterator[None]:
        self._key_doubtful_since = trio.current_time()
        try:
            yield
        finally:
            self._key_doubtful_since, self._key_doubtful_until = None, trio.current_time()

    async def _mend(self) -> NoReturn:
        """Be the user who applies the settings again after the gateway has given up."""
        async for _ in self.remote_access.watch():
            if self._has_given_up:
                await trio.sleep(self._day.patience)
                await self._mend_now()
        raise AssertionError("the gateway has stopped")

    async def _mend_now(self) -> None:
        if _rejected(self.remote_access.status):
            self._trace.note("mended", count="times that it had given up")
            await self._apply(SettingsUpdate(enabled=True))

    # Lulls

    async def _lull(self, lull: Lull) -> None:
        """Stop all faults, and check that the gateway connects and serves visitors."""
        began = trio.current_time()
        self.relay.follow(FaultPlan())
        self.relay.cut()
        await self._mend_now()
        with trio.move_on_after(RECOVERY) as too_long:
            while not self.calm:
                await self._change()
        if too_long.cancelled_caught and not self.calm:
            self._trace.complain(
                f"nothing has gone wrong since {began:.3f} s, and {RECOVERY:g} s later it is not well:"
                f" {self.remote_access.status}, {'reachable' if self.relay.reachable else 'not reachable'}"
            )
        self._trace.note("calm")
        speech = Speech(1, lull.size)
        async with trio.open_nursery() as visitors:
            for _ in range(lull.visitors):
                visitors.start_soon(self._crowd.come, Talk(0.0, speech, speech))

    async def _change(self) -> None:
        """Wait until `calm` may have changed, at most a second."""
        with trio.move_on_after(1.0):
            await self.relay.change()


def _rejected(status: Status) -> bool:
    """Whether a user has to act: the gateway has given up, or retries only every 15 minutes."""
    return status.state is State.FAILED and status.error_kind in _FINAL


async def _serve_visitors(tunnel: Tunnel, handler: Callable[[TunnelStream], Awaitable[None]]) -> NoReturn:
    """Serve visitors until a final failure of the tunnel, which is raised without a group."""
    with lone_error_bare():
        async with trio.open_nursery() as visitors:
            while True:
                visitors.start_soon(handler, await tunnel.accept())  # no deadline: there may be no visitor
