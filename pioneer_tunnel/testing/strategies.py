"""Hypothesis strategies for fault plans, visitors, settings updates and chunks.

    @given(plan=fault_plans())
    @virtual_time
    async def test_my_gateway(plan): ...

Only this module of the kit imports Hypothesis. The repr of every example is the code that makes it. Times are whole
seconds, mostly up to ten minutes. In each choice below, the first alternative is what a failure shrinks to.
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
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
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
    st.builds(CutAfter, st.integers(0, 5000), towards=st.sampled_from([None, "relay", "gateway"])),
    st.builds(StallAt, st.sampled_from(Stage)),
    st.builds(BlackHole, _seconds(0, 600)),
    st.builds(Takeover, _seconds(0, 600), own=st.just(True)),
    st.builds(Drain, _seconds(0, 600)),
    st.builds(HostSleep, _seconds(0, 600)),
    st.builds(ChangeNetwork, _seconds(0, 600)),
    st.just(CutAtWelcome()),
    st.builds(Slow, _SPEEDS, _seconds(1, 600)),
    st.builds(
        Reject, st.sampled_from(["busy", "version", "another_reason"]), retry_after=st.none() | _seconds(1, 1200)
    ),
    st.builds(Unavailable, st.none() | st.integers(1, 1200)),
    st.builds(CaptivePortal, st.sampled_from([302, 200])),
    st.just(BadTls()),
)
"""Faults that end, so that another attempt follows."""

_LASTING: Final[st.SearchStrategy[Fault]] = st.one_of(
    st.just(Up()),
    st.builds(BlackHole, _seconds(60, 600), _seconds(1, 10)),
    st.builds(Slow, _SPEEDS),
)
"""Faults that leave the tunnel up."""

_FINAL: Final[st.SearchStrategy[Fault]] = st.one_of(
    st.builds(Reject, st.sampled_from(["auth_failed", "service_unknown", "wrong_audience"])),
    st.builds(Takeover, _seconds(0, 600)),
)
"""Faults at which the gateway gives up."""


def fault_plans(*, max_faults: int = 4, final: bool | None = None) -> st.SearchStrategy[FaultPlan]:
    """Plans of faults that pass, and a last one: the tunnel stays up, or the gateway must give up.

    They shrink to `FaultPlan()`, which has no fault.

    Args:
        max_faults: most faults before the last one (default 4).
        final: True for plans at whose end the gateway must give up, False for plans at whose end the tunnel is up,
            None for both (default).
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
    """Settings updates that clients may send, valid and invalid. They shrink to an update that changes nothing.

    Args:
        keys: relay keys to choose from (default: three that no relay knows).
        servers: relay addresses to choose from (default: valid ones, invalid ones, and `""`, which clears it).
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
    """Ways to split `data` into at most 33 chunks, none of them empty. They shrink to a single chunk.

    Args:
        data: the bytes, or a strategy for them.
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
    """Lists of visitors, sorted by `after`. They shrink to `[]`, and a visitor to one who only connects and leaves.

    Args:
        max_visitors: most visitors in a list (default 4).
        max_bytes: most bytes in one chunk (default 100000).
        within: most seconds until a visitor connects (default 3600).
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
