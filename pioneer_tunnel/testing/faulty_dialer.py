"""A gateway's way to a relay in memory, on which goes wrong what a plan says.

    async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel: ...

`MemoryRelay.dial` is one of these. It writes down each attempt to connect, so that a test can count them, and see
which should not have been made.

Neighbours: `faults` is the plan; `impostor` is at the other end when it is not the relay; `MemoryRelay` is when it is.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias, final

import attrs
import trio
import trio.testing

from .._model.addresses import Address
from .faults import (
    BlackHole,
    CutAfter,
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
        at: when it was made.
        fault: what the plan had for it; None when the relay did not run, which is no fault of the plan.
        connection: the connection that came of it; None when none did.
        connected_at: when the relay had let the gateway in; None when it never did.
        ended_at: when that session was over for the relay; None while it is not, or never was.
        after_final: True when a fault before it was final, so that it should not have been made.
    """

    at: float
    fault: Fault | None
    connection: MemoryConnection | None = attrs.field(default=None, repr=False)
    connected_at: float | None = None
    ended_at: float | None = None
    after_final: bool = False


class RelayInMemory(Protocol):
    """What a dialer needs of the relay at the other end."""

    @property
    def address(self) -> Address:
        """Where gateways find it."""

    @property
    def running(self) -> bool:
        """Whether it listens."""

    def new_connection(self) -> MemoryConnection:
        """A connection whose server's end is for the relay."""

    def serve(self, dial: Dial, impostor: Impostor | None, meanwhile: Sequence[_Task]) -> None:
        """Be at the other end of the connection of `dial`, or have an impostor there; run `meanwhile` until its end."""

    async def connect_local(self, address: Address) -> trio.abc.Stream:
        """Connect to what listens at an address that is not the relay's."""

    async def change(self) -> None:
        """Wait until a gateway has come in or gone, or the connection of one is another than before."""

    async def take_over(self, dial: Dial, *, own: bool) -> bool:
        """Have another session take the tunnel over that `dial` carries; False when it carries none."""


@final
class FaultyDialer:
    """A `Dialer`: how TCP connections come about for one gateway.

    Args:
        relay: the relay.
        plan: what goes wrong (default: nothing).

    Attributes:
        dials: every attempt to connect to the relay, in order.
    """

    def __init__(self, relay: RelayInMemory, plan: FaultPlan | None = None) -> None:
        self.dials: Final[list[Dial]] = []
        self._relay: Final = relay
        self._plan = plan or FaultPlan()
        self._next = 0
        self._over = False
        self._was_up = False
        self._changed = trio.Event()

    @property
    def plan(self) -> FaultPlan:
        """What goes wrong."""
        return self._plan

    def follow(self, plan: FaultPlan) -> None:
        """Go by another plan, from its beginning. For a second act: also what was final before is so no more."""
        self._plan, self._next, self._over = plan, 0, False

    def settings_applied(self) -> None:
        """Have the plan go on: the gateway's settings were applied anew, so what was final before is so no more."""
        self._over = self._was_up = False

    async def played(self) -> None:
        """Wait until the plan is played out: the gateway has had to give up, or has come to `then`, which lasts.

        There is no deadline: the caller sets one. A gateway that gives up too early is waited for in vain.
        """
        await trio.lowlevel.checkpoint()
        while not (self._over if self._gives_up else self._next > len(self._plan.faults)):
            await self._changed.wait()

    @property
    def _gives_up(self) -> bool:
        """Whether the gateway has to give up at the end of the plan: no rejection is final once the tunnel was up."""
        final = self._plan.final
        return final is not None and not (self._was_up and isinstance(final, Reject))

    async def __call__(self, host: str, port: int) -> trio.abc.Stream:
        """Connect to the relay, or to what listens at another address of `MemoryRelay.listen`.

        Raises:
            socket.gaierror: as the plan has it, or nobody goes by that name.
            ConnectionRefusedError: as the plan has it, or nobody listens there.
        """
        await trio.lowlevel.checkpoint()
        if Address(host, port) != self._relay.address:
            return await self._relay.connect_local(Address(host, port))
        dial = Dial(at=trio.current_time(), fault=self._take_fault(), after_final=self._over)
        self.dials.append(dial)
        match dial.fault:
            case None | Refuse():
                raise ConnectionRefusedError(f"nobody listens at {self._relay.address}")
            case NotResolved():
                raise socket.gaierror(socket.EAI_NONAME, f"no address for {host!r}")
            case StallAt(stage=Stage.DIAL):
                await trio.sleep_forever()  # no deadline: the gateway has one
        fault = dial.fault
        impostor = fault if isinstance(fault, IMPOSTORS) else None
        if impostor is None:
            self._was_up = True
        elif impostor.final and not self._was_up:
            self._over = True
            self._wake()
        connection = dial.connection = self._relay.new_connection()
        self._relay.serve(dial, impostor, self._befall(fault, dial, connection))
        return connection.client

    def _take_fault(self) -> Fault | None:
        if not self._relay.running:
            return None
        self._next += 1
        self._wake()
        return self._plan.fault(self._next - 1)

    def _befall(self, fault: Fault, dial: Dial, connection: MemoryConnection) -> list[_Task]:
        """Have `fault` happen to a connection on which no byte has moved yet; returns what of it has its time."""
        match fault:
            case CutAfter(amount=amount):
                connection.cut_after(amount)
            case Slow(bytes_per_second=speed, seconds=seconds):
                connection.slow_down(speed)
                return [_at(seconds, connection.cut)]
            case Up(seconds=seconds):
                return [_at(seconds, connection.cut)]
            case BlackHole(after=after, seconds=seconds):
                return [_at(after, connection.black_hole), _at(after + seconds, connection.heal)]
            case HostSleep(after=after, seconds=seconds):
                return [_at(after, partial(_sleep_through, seconds, connection))]
            case Takeover(after=after, own=own):
                return [partial(self._take_over, after, dial, own=own)]
        return []

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


def _sleep_through(seconds: float, connection: MemoryConnection) -> None:
    """The host is asleep: time goes by, and nobody answers at either end."""
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, trio.testing.MockClock):
        raise TypeError(f"HostSleep needs a clock that can jump, a trio.testing.MockClock; this is {clock!r}")
    connection.black_hole()
    clock.jump(seconds)
