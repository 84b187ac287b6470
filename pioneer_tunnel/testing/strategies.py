"""Hypothesis strategies: what may happen to a gateway, made up, and shrunk to what a person can read.

    @given(plan=fault_plans())
    @virtual_time
    async def test_my_gateway(plan): ...

Only this module of the kit imports Hypothesis. Whatever it makes is data whose repr is the code for it. Times are
whole seconds, ten minutes at the most, and whatever stands first in a choice here is what a failure shrinks to.

Neighbours: `faults`, `visitors` and `settings` have the data.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from hypothesis import strategies as st

from .._model.keys import RelayKey
from .._model.public_names import publish as _publish
from ..gateway.settings import SettingsUpdate
from .faults import (
    MAY_BE_UP,
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
from .visitors import Leave, Visitor

__all__ = ["chunkings", "fault_plans", "settings_updates", "visitor_traffic"]

_KEYS: Final = tuple(RelayKey(f"ptk1_a-key-that-was-made-up-0123456789-{number}") for number in range(3))

_SERVERS: Final = ("", "wss://relay.test", "relay.test:2333", "http://relay.test", "relay.test:0")


def _seconds(least: int, most: int) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(float)


_SPEEDS: Final = st.integers(4096, 1024 * 1024).map(float)

_PASSING: Final[st.SearchStrategy[Fault]] = st.one_of(
    st.just(Refuse()),
    st.just(NotResolved()),
    st.builds(Up, _seconds(1, 600)),
    st.builds(CutAfter, st.integers(0, 5000)),
    st.builds(StallAt, st.sampled_from(Stage)),
    st.builds(BlackHole, _seconds(0, 600)),
    st.builds(Takeover, _seconds(0, 600), own=st.just(True)),
    st.builds(HostSleep, _seconds(0, 600)),
    st.builds(Slow, _SPEEDS, _seconds(1, 600)),
    st.builds(
        Reject, st.sampled_from(["busy", "version", "another_reason"]), retry_after=st.none() | _seconds(1, 1200)
    ),
    st.builds(Unavailable, st.none() | st.integers(1, 1200)),
    st.builds(CaptivePortal, st.sampled_from([302, 200])),
    st.just(BadTls()),
)
"""What comes to an end, so that another attempt follows."""

_LASTING: Final[st.SearchStrategy[Fault]] = st.one_of(
    st.just(Up()),
    st.builds(BlackHole, _seconds(60, 600), _seconds(1, 10)),
    st.builds(Slow, _SPEEDS),
)
"""What leaves the tunnel up."""

_FINAL: Final[st.SearchStrategy[Fault]] = st.one_of(
    st.builds(Reject, st.sampled_from(["auth_failed", "service_unknown", "wrong_audience"])),
    st.builds(Takeover, _seconds(0, 600)),
)
"""What has the gateway give up."""


def fault_plans(*, max_faults: int = 4, final: bool | None = None) -> st.SearchStrategy[FaultPlan]:
    """Plans of some faults that pass, and of an end: the tunnel is up, or the gateway has to give up.

    They shrink to `FaultPlan()`, in which nothing goes wrong.

    Args:
        max_faults: how many may pass at the most (default 4).
        final: True for plans at whose end the gateway has to give up, False for the others, None for both.
    """
    end = {True: _FINAL, False: _LASTING, None: _LASTING | _FINAL}[final]
    return st.builds(_plan, st.lists(_PASSING, max_size=max_faults), end)


def _plan(faults: list[Fault], end: Fault) -> FaultPlan:
    # A rejection is final only for a gateway that was never connected.
    never_up = [fault for fault in faults if not isinstance(fault, MAY_BE_UP)]
    return FaultPlan(never_up if isinstance(end, Reject) else faults, then=end)


def settings_updates(
    *,
    keys: st.SearchStrategy[RelayKey] | None = None,
    servers: st.SearchStrategy[str] | None = None,
) -> st.SearchStrategy[SettingsUpdate]:
    """What clients may want changed. They shrink to an update that changes nothing.

    Args:
        keys: the relay keys that may be in it (default: three that no relay knows).
        servers: the addresses that may be (default: good ones, bad ones, and none, which clears it).
    """
    if keys is None:
        keys = st.sampled_from(_KEYS)
    if servers is None:
        servers = st.sampled_from(_SERVERS)
    return st.builds(
        SettingsUpdate,
        enabled=st.sampled_from([None, True, False]),
        server=st.none() | servers,
        key=st.none() | keys,
        clear_key=st.booleans(),
    )


def chunkings(data: bytes | st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Ways in which `data` may come in pieces; none is empty. They shrink to a single piece.

    Args:
        data: what comes, or where that is from.
    """
    if not isinstance(data, bytes):
        return data.flatmap(chunkings)
    if len(data) < 2:
        return st.just([data] if data else [])
    cuts = st.sets(st.integers(1, len(data) - 1), max_size=min(len(data) - 1, 32))
    return cuts.map(lambda cuts: [data[start:end] for start, end in pairwise([0, *sorted(cuts), len(data)])])


def visitor_traffic(
    *, max_visitors: int = 4, max_bytes: int = 100_000, within: int = 3600
) -> st.SearchStrategy[list[Visitor]]:
    """Visitors who come in the order of the list. They shrink to none, and each to one who comes and leaves.

    Args:
        max_visitors: how many there may be (default 4).
        max_bytes: how many each may send at a time (default 100000).
        within: seconds within which they come (default 3600).
    """
    visitors = st.builds(
        Visitor,
        _seconds(0, within),
        sends=st.lists(st.integers(1, max_bytes), max_size=4),
        pause=_seconds(0, 60),
        leave=st.sampled_from(Leave),
    )
    return st.lists(visitors, max_size=max_visitors).map(lambda found: sorted(found, key=lambda visitor: visitor.after))


_publish(globals())
