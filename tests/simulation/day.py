"""A simulated day as data, made from a seed: faults, actions of users and operators, and visitors.

    make_day(7, hours=24)

The repr of a day is code, so that a day that failed can be reduced by hand.
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
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
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
    """Cut the connection; the next ones follow a plan.

    Attributes:
        plan: the plan.
    """

    plan: FaultPlan


@final
@attrs.frozen(repr=False)
class RelayRestart(Printable):
    """Stop the relay and start it again.

    Attributes:
        seconds: time between stop and start.
        abruptly: whether it stops without a goodbye.
    """

    seconds: float
    abruptly: bool = False


@final
@attrs.frozen(repr=False)
class KeyRevoked(Printable):
    """Remove the tunnel from the registry, and add it again later.

    Attributes:
        seconds: time between the two.
        cut: whether to cut the connection meanwhile, so that the gateway notices.
    """

    seconds: float
    cut: bool = True


@final
@attrs.frozen(repr=False)
class KeyChange(Printable):
    """Change the tunnel's key at one side, and later at the other.

    Attributes:
        seconds: time between the two.
        gateway_first: whether the gateway gets the new key first.
    """

    seconds: float
    gateway_first: bool = False


@final
@attrs.frozen(repr=False)
class SwitchedOff(Printable):
    """Switch remote access off, and on again.

    Attributes:
        seconds: time between the two.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class SameAgain(Printable):
    """Save the settings unchanged, which must not disturb a live tunnel."""


@final
@attrs.frozen(repr=False)
class LocalGatewayDown(Printable):
    """Stop the server that visitors are forwarded to. Without effect if the day does not forward.

    Attributes:
        seconds: how long it is down.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class Rival(Printable):
    """Run another gateway with the same key for a while; not during a black hole.

    Attributes:
        seconds: how long it runs.
    """

    seconds: float


@final
@attrs.frozen(repr=False)
class Lull(Printable):
    """Stop all faults and repair the gateway's settings; then visitors connect, and all must get through.

    Attributes:
        visitors: number of visitors, all at once.
        size: bytes that each sends and receives.
    """

    visitors: int = 1
    size: int = 1


Act: TypeAlias = (
    Storm | RelayRestart | KeyRevoked | KeyChange | SwitchedOff | SameAgain | LocalGatewayDown | Rival | Lull
)
"""An event of a day."""


@final
@attrs.frozen(repr=False)
class At(Printable):
    """An event and its earliest time: it waits for the end of the one before.

    Attributes:
        seconds: since the day began.
        act: the event.
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
        seed: the seed of `make_day`; also decides the jitter and the order of tasks.
        hours: its length.
        heartbeat: the relay's heartbeat in seconds.
        resume_timeout: seconds that the relay keeps a session without connection (default: 0).
        told: whether the gateway's system tells it of sleep and of other networks (default: it does not).
        forwards: whether visitors are forwarded to a local gateway (default: the gateway serves them itself).
        patience: seconds until a user applies the settings again after the gateway has given up.
        acts: the events, in order.
        talks: the conversations of the visitors.
    """

    seed: int
    hours: float
    heartbeat: float = 15.0
    resume_timeout: float = 0.0
    told: bool = False
    forwards: bool = False
    patience: float = 300.0
    acts: tuple[At, ...] = attrs.field(default=(), converter=_acts_of)
    talks: tuple[Talk, ...] = attrs.field(default=(), converter=_talks_of)

    @property
    def end(self) -> float:
        """When it ends, in seconds."""
        return self.hours * 3600


def make_day(seed: int, *, hours: float = 24.0) -> Day:
    """Make a day from a seed.

    Args:
        seed: the same seed makes the same day.
        hours: its length (default 24).
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
        resume_timeout=60.0 if seed % 2 else 0.0,
        told=seed % 4 > 1,
        forwards=random.random() < 0.5,
        patience=random.choice([5.0, 60.0, 600.0]),
        acts=tuple(acts),
        talks=tuple(_talks(random, hours * 3600)),
    )


# Events


def _seconds(random: Random, most: float) -> float:
    """Up to `most` seconds; short times are more frequent."""
    return round(random.choice([0.01, 0.1, 1.0]) * random.uniform(0, most), 1)


def _storm(random: Random, heartbeat: float) -> Storm:
    faults = [random.choice(_FAULTS)(random) for _ in range(random.randint(1, 5))]
    return Storm(FaultPlan(faults))


def _rival(random: Random, heartbeat: float) -> Rival:
    # It ends before the first gateway must show that visitors do not get through.
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
"""The weight of each event, and a function that makes it."""


def _slow(random: Random) -> Fault:
    # At a lower speed a message takes so long that the tunnel takes the link for dead.
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
    lambda random: ChangeNetwork(_seconds(random, 600)),
    lambda random: CutAfter(random.choice([1500, 5000, 100_000]), towards=random.choice(["relay", "gateway"])),
    lambda _: CutAtWelcome(),
)


# Visitors


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
