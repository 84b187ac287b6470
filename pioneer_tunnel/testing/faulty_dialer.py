"""A `Dialer` that connects a gateway to a relay in memory, and applies the faults of a plan."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias, final

import attrs
import trio
import trio.testing

from .._model.addresses import Address
from .._net.suspension import NOTICED
from .faults import (
    MAY_BE_UP,
    BlackHole,
    ChangeNetwork,
    CutAfter,
    Drain,
    Fault,
    FaultPlan,
    HostSleep,
    NotResolved,
    Refuse,
    Reject,
    Slow,
    Stage,
    StallAt,
    Takeover,
    Up,
)
from .impostor import IMPOSTORS, Impostor
from .memory_stream import MemoryConnection

__all__ = ["Dial", "FaultyDialer", "RelayInMemory"]

_Task: TypeAlias = Callable[[], Awaitable[None]]


@final
@attrs.define(kw_only=True, eq=False)
class Dial:
    """One attempt of a gateway to connect to the relay. Times are those of `trio.current_time`.

    Attributes:
        at: the time of the attempt.
        fault: the plan's fault for this attempt; None if the relay was stopped, which uses up no fault of the plan.
        connection: the connection; None if the attempt made none.
        connected_at: when the relay admitted the gateway; None if it did not.
        ended_at: when the relay ended that session; None if it has not, or if there was none.
        after_final: True if an earlier fault was final, so that the gateway must not make this attempt.
    """

    at: float
    fault: Fault | None
    connection: MemoryConnection | None = attrs.field(default=None, repr=False)
    connected_at: float | None = None
    ended_at: float | None = None
    after_final: bool = False


class RelayInMemory(Protocol):
    """The part of a relay that a dialer uses."""

    @property
    def address(self) -> Address:
        """The address that gateways connect to."""

    @property
    def running(self) -> bool:
        """Whether the relay accepts connections."""

    def new_connection(self) -> MemoryConnection:
        """Make a connection; the relay has its `server` end."""

    def serve(self, dial: Dial, impostor: Impostor | None, meanwhile: Sequence[_Task]) -> None:
        """Serve the connection of `dial`, as the relay or as `impostor`; run the tasks `meanwhile` until it ends."""

    async def connect_local(self, address: Address) -> trio.abc.Stream:
        """Connect to a server at an address other than the relay's."""

    async def change(self) -> None:
        """Wait until a session begins or ends, or the connection of a gateway breaks or recovers."""

    async def take_over(self, dial: Dial, *, own: bool) -> bool:
        """Let another session take over the tunnel of `dial`; False if `dial` has no session."""

    async def drain(self, dial: Dial) -> bool:
        """Drain the session of `dial`; False if it has none."""


@final
class FaultyDialer:
    """A `Dialer` that connects one gateway to a relay in memory, and applies the faults of a plan.

        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel: ...

    `MemoryRelay.dial` is a `FaultyDialer`. It records each attempt to connect, so that a test can count the attempts
    and find those after a final fault.

    Args:
        relay: the relay.
        plan: the faults (default: none).

    Attributes:
        dials: all attempts to connect to the relay, in order.
    """

    def __init__(self, relay: RelayInMemory, plan: FaultPlan | None = None) -> None:
        self.dials: Final[list[Dial]] = []
        self._relay: Final = relay
        self._plan = plan or FaultPlan()
        self._next = 0
        self._over = False
        self._was_up = False
        self._changed = trio.Event()
        self._watchers: Final[list[Callable[[str], object]]] = []

    @property
    def plan(self) -> FaultPlan:
        """The current plan."""
        return self._plan

    def follow(self, plan: FaultPlan) -> None:
        """Start another plan from its beginning. Final faults of the old plan no longer count for `after_final`."""
        self._plan, self._next, self._over = plan, 0, False

    def settings_applied(self) -> None:
        """Continue the plan after a final fault: the gateway's settings were applied, so it may connect again."""
        self._over = self._was_up = False

    async def played(self) -> None:
        """Wait until the plan is played out: at a final fault, or at the first attempt that gets `then`.

        There is no deadline: the caller sets one. If the gateway gives up too early, this never returns.
        """
        await trio.lowlevel.checkpoint()
        while not (self._over if self._gives_up else self._next > len(self._plan.faults)):
            await self._changed.wait()

    @property
    def _gives_up(self) -> bool:
        """Whether the gateway must give up at the end of the plan. Once the tunnel was up, no rejection is final."""
        final = self._plan.final
        return final is not None and not (self._was_up and isinstance(final, Reject))

    async def __call__(self, host: str, port: int) -> trio.abc.Stream:
        """Connect to the relay, or to a server that `MemoryRelay.listen` started.

        Raises:
            socket.gaierror: by the plan, or the name is unknown.
            ConnectionRefusedError: by the plan, or nothing listens at the address.
        """
        await trio.lowlevel.checkpoint()
        if Address(host, port) != self._relay.address:
            return await self._relay.connect_local(Address(host, port))
        dial = Dial(at=trio.current_time(), fault=self._take_fault(), after_final=self._over)
        self.dials.append(dial)
        match dial.fault:
            case None | Refuse():
                raise ConnectionRefusedError(f"nothing listens at {self._relay.address}")
            case NotResolved():
                raise socket.gaierror(socket.EAI_NONAME, f"no address for {host!r}")
            case StallAt(stage=Stage.DIAL):
                await trio.sleep_forever()  # no deadline: the gateway has one
        fault = dial.fault
        impostor = fault if isinstance(fault, IMPOSTORS) else None
        if isinstance(fault, MAY_BE_UP):
            self._was_up = True
        elif impostor is not None and impostor.final and not self._was_up:
            self._over = True
            self._wake()
        connection = dial.connection = self._relay.new_connection()
        self._relay.serve(dial, impostor, self._apply(fault, dial, connection))
        return connection.client

    # The network and the host of the gateway

    async def watch_network(
        self,
        changed: Callable[[str], object],
        relay_addresses: Callable[[], Collection[str]],  # noqa: ARG002  # every change concerns this relay
    ) -> None:
        """Tell a gateway of `change_network` and `sleep`, and of the faults that do the same.

        For the argument `watch_network` of `open_tunnel` and `RemoteAccess`. The system of a gateway in the field tells
        it of such changes.
        """
        self._watchers.append(changed)
        try:
            await trio.sleep_forever()  # no deadline: the gateway cancels it
        finally:
            self._watchers.remove(changed)

    def change_network(self) -> None:
        """Change the gateway's network: its connections are dead, and it can make others at once."""
        self._lose_paths()
        self._tell("the network has changed")

    def sleep(self, seconds: float) -> None:
        """Let the gateway's host sleep: the clock jumps, and its connections are dead.

        Raises:
            TypeError: the clock cannot jump: it is no `trio.testing.MockClock`.
        """
        clock = trio.lowlevel.current_clock()
        if not isinstance(clock, trio.testing.MockClock):
            raise TypeError(f"HostSleep needs a clock that can jump, a trio.testing.MockClock; this is {clock!r}")
        self._lose_paths()
        clock.jump(seconds)
        if seconds > NOTICED:
            self._tell(f"resumed after {seconds:.0f} seconds")

    def _lose_paths(self) -> None:
        for dial in self.dials:
            if dial.connection is not None:
                dial.connection.black_hole()

    def _tell(self, what: str) -> None:
        for changed in self._watchers:
            changed(what)

    def _take_fault(self) -> Fault | None:
        if not self._relay.running:
            return None
        self._next += 1
        self._wake()
        return self._plan.fault(self._next - 1)

    def _apply(self, fault: Fault, dial: Dial, connection: MemoryConnection) -> list[_Task]:
        """Apply `fault` to a new connection; returns the tasks for its later parts."""
        match fault:
            case CutAfter(amount=amount, towards=None):
                connection.cut_after(amount)
            case CutAfter(amount=amount, towards=end):
                connection.cut_after(amount, towards="server" if end == "relay" else "client")
            case Slow(bytes_per_second=speed, seconds=seconds):
                connection.slow_down(speed)
                return [_at(seconds, connection.cut)]
            case Up(seconds=seconds):
                return [_at(seconds, connection.cut)]
            case BlackHole(after=after, seconds=seconds):
                return [_at(after, connection.black_hole), _at(after + seconds, connection.heal)]
            case HostSleep(after=after, seconds=seconds):
                return [_at(after, partial(self.sleep, seconds))]
            case ChangeNetwork(after=after):
                return [_at(after, self.change_network)]
            case Drain(after=after):
                return [partial(self._drain, after, dial)]
            case Takeover(after=after, own=own):
                return [partial(self._take_over, after, dial, own=own)]
        return []

    async def _drain(self, after: float, dial: Dial) -> None:
        await trio.sleep(after)
        while not await self._relay.drain(dial):
            await self._relay.change()

    async def _take_over(self, after: float, dial: Dial, *, own: bool) -> None:
        await trio.sleep(after)
        while not await self._relay.take_over(dial, own=own):
            await self._relay.change()
        if not own:
            self._over = True
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _at(seconds: float, happen: Callable[[], None]) -> _Task:
    async def wait() -> None:
        await trio.sleep(seconds)
        happen()

    return wait
