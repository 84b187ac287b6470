"""A day in the life of a gateway, as data that a seed makes up: what goes wrong, what people do, and who comes.

    make_day(7, hours=24)

A day prints as the code for it, so that one that failed can be cut down by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Final, TypeAlias, final

import attrs

from pioneer_tunnel.testing.faults import (
    BadTls,
    BlackHole,
    CaptivePortal,
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
    Unavailable,
    Up,
)
from pioneer_tunnel.testing.printable import Printable
from pioneer_tunnel.testing.visitors import Leave

from .conversation import Speech, Talk

__all__ = [
    "Act",
    "At",
    "Day",
    "KeyChange",
    "KeyRevoked",
    "LocalGatewayDown",
    "Lull",
    "RelayRestart",
    "Rival",
    "SameAgain",
    "Storm",
    "SwitchedOff",
    "make_day",
]


@final
@attrs.frozen(repr=False)
class Storm(Printable):
    """The network goes wrong: the connection is cut, and the next ones go by a plan.

    Attributes:
        plan: what becomes of them.
    """

    plan: FaultPlan


@final
@attrs.frozen(repr=False)
class RelayRestart(Printable):
    """The relay goes away and comes back.

    Attributes:
        seconds: how long it is away.
        abruptly: it takes no leave.
    """

    seconds: float
    abruptly: bool = False


@final
@attrs.frozen(repr=False)
class KeyRevoked(Printable):
    """The relay's operator takes the key out of the registry, and later thinks better of it.

    Attributes:
        seconds: after how many.
        cut: the connection is cut meanwhile, so that the gateway finds out.
    """

    seconds: float
    cut: bool = True


@final
@attrs.frozen(repr=False)
class KeyChange(Printable):
    """The tunnel gets another key, and one of the two sides is told later.

    Attributes:
        seconds: how much later.
        gateway_first: it is the gateway that has the new key first.
    """

    seconds: float
    gateway_first: bool = False


@final
@attrs.frozen(repr=False)
class SwitchedOff(Printable):
    """Somebody switches remote access off, and on again.

    Attributes:
        seconds: after how many.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class SameAgain(Printable):
    """Somebody saves the settings as they are, which must leave a live tunnel alone."""


@final
@attrs.frozen(repr=False)
class LocalGatewayDown(Printable):
    """Nobody listens where visitors are forwarded to. Of a gateway that takes visitors itself nothing happens.

    Attributes:
        seconds: for so long.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class Rival(Printable):
    """Another gateway comes with the same key, and goes away again; it does not come while a link is a black hole.

    Attributes:
        seconds: after how many.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class Lull(Printable):
    """Nothing goes wrong any more, and whatever did has to be mended: visitors come, and all have to get through.

    Attributes:
        visitors: how many come, all at once.
        size: bytes that each says, and hears.
    """

    visitors: int = 1
    size: int = 1


Act: TypeAlias = (
    Storm | RelayRestart | KeyRevoked | KeyChange | SwitchedOff | SameAgain | LocalGatewayDown | Rival | Lull
)
"""What happens at some moment of a day."""


@final
@attrs.frozen(repr=False)
class At(Printable):
    """When something happens, or later: what takes its time keeps the next waiting.

    Attributes:
        seconds: since the day began.
        act: what.
    """

    seconds: float
    act: Act


def _acts_of(acts: Iterable[At]) -> tuple[At, ...]:
    return tuple(acts)


def _talks_of(talks: Iterable[Talk]) -> tuple[Talk, ...]:
    return tuple(talks)


@final
@attrs.frozen(repr=False)
class Day(Printable):
    """A day.

    Attributes:
        seed: what it was made from; decides the jitter, and which of several tasks runs first.
        hours: how long it is.
        heartbeat: the relay's, in seconds.
        forwards: visitors are forwarded to a local gateway; by default the gateway takes them itself.
        patience: seconds until somebody notices that the gateway has given up, and sees to it.
        acts: what happens, in order.
        talks: who comes.
    """

    seed: int
    hours: float
    heartbeat: float = 15.0
    forwards: bool = False
    patience: float = 300.0
    acts: tuple[At, ...] = attrs.field(default=(), converter=_acts_of)
    talks: tuple[Talk, ...] = attrs.field(default=(), converter=_talks_of)

    @property
    def end(self) -> float:
        """When it ends, in seconds."""
        return self.hours * 3600


def make_day(seed: int, *, hours: float = 24.0) -> Day:
    """Make a day up.

    Args:
        seed: the same makes the same day.
        hours: how long it is.
    """
    random = Random(seed)  # a game, no secret
    heartbeat = random.choice([10.0, 15.0, 30.0, 60.0])
    makers = [_ACTS[name] for name in sorted(_ACTS)]
    weights = [weight for weight, _ in makers]
    acts = []
    now = 0.0
    while (now := now + random.choice([1.0, 60.0, 600.0, 1800.0]) * random.uniform(0.5, 1.5)) < hours * 3600:
        _, make = random.choices(makers, weights)[0]
        acts.append(At(round(now, 1), make(random, heartbeat)))
    return Day(
        seed,
        hours,
        heartbeat=heartbeat,
        forwards=random.random() < 0.5,
        patience=random.choice([5.0, 60.0, 600.0]),
        acts=tuple(acts),
        talks=tuple(_talks(random, hours * 3600)),
    )


# What happens


def _seconds(random: Random, most: float) -> float:
    """Short more often than long."""
    return round(random.choice([0.01, 0.1, 1.0]) * random.uniform(0, most), 1)


def _storm(random: Random, heartbeat: float) -> Storm:
    faults = [random.choice(_FAULTS)(random) for _ in range(random.randint(1, 5))]
    return Storm(FaultPlan(faults))


def _rival(random: Random, heartbeat: float) -> Rival:
    # It is gone before the gateway whose tunnel it has taken would have to show that visitors do not reach it.
    return Rival(round(random.uniform(1, 2 * heartbeat), 1))


_ACTS: Final[dict[str, tuple[float, Callable[[Random, float], Act]]]] = {
    "storm": (10, _storm),
    "restart": (2, lambda random, _: RelayRestart(_seconds(random, 600), random.random() < 0.5)),
    "revoked": (1, lambda random, _: KeyRevoked(_seconds(random, 600), random.random() < 0.7)),
    "key": (1, lambda random, _: KeyChange(_seconds(random, 600), random.random() < 0.5)),
    "off": (1, lambda random, _: SwitchedOff(_seconds(random, 600))),
    "same": (1, lambda *_: SameAgain()),
    "local": (1, lambda random, _: LocalGatewayDown(_seconds(random, 600))),
    "rival": (1, _rival),
    "lull": (4, lambda random, _: Lull(random.choice([1, 3, 30]), random.choice([1, 5000, 100_000]))),
}
"""By name, how often, and what."""


def _slow(random: Random) -> Fault:
    # Slower than this a message takes so long that the tunnel takes the link for dead.
    return Slow(float(random.choice([8192, 65536, 1_000_000])), _seconds(random, 600) + 1)


_FAULTS: Final[tuple[Callable[[Random], Fault], ...]] = (
    lambda _: Refuse(),
    lambda _: NotResolved(),
    lambda _: BadTls(),
    lambda random: CaptivePortal(random.choice([302, 200])),
    lambda random: Unavailable(random.choice([None, 1, 60, 1200])),
    lambda random: StallAt(random.choice(list(Stage))),
    lambda random: Reject(random.choice(["auth_failed", "service_unknown", "wrong_audience"])),
    lambda random: Reject(random.choice(["busy", "version", "another"]), retry_after=random.choice([None, 5.0, 100.0])),
    lambda random: Up(_seconds(random, 600)),
    lambda random: Up(_seconds(random, 600)),
    lambda random: CutAfter(random.choice([10, 1500, 5000, 100_000, 1_000_000])),
    lambda random: BlackHole(_seconds(random, 600)),
    lambda random: BlackHole(_seconds(random, 600), _seconds(random, 300)),
    _slow,
    lambda random: Takeover(_seconds(random, 600)),
    lambda random: Takeover(_seconds(random, 600), own=True),
    lambda random: HostSleep(_seconds(random, 600), random.choices([30.0, 3600.0, 8 * 3600.0], [6, 3, 1])[0]),
)


# Who comes


def _talks(random: Random, end: float) -> list[Talk]:
    talks = []
    now = 0.0
    while (now := now + random.expovariate(1 / 600)) < end:
        at = round(now, 1)
        many = random.choice([1, 1, 1, 1, 1, 1, 1, 12])
        talks += [Talk(at, _speech(random, visitor=True), _speech(random, visitor=False)) for _ in range(many)]
    return talks


def _speech(random: Random, *, visitor: bool) -> Speech:
    pieces, pause = random.choice([(0, 0.0), (1, 0.0), (1, 0.0), (3, 0.2), (8, 5.0), (10, 300.0)])
    return Speech(
        pieces,
        random.choice([1, 200, 5000, 70_000]) if pause < 100 else 500,
        pause=pause,
        leave=random.choices(list(Leave), [8, 1, 1])[0],
        slow=random.random() < 0.1,
        last=not visitor and random.random() < 0.3,
    )
