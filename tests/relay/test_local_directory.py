"""The directory of one relay: the links of a gateway, candidates, and sessions that change while it waits."""

from __future__ import annotations

from typing import Any, Final

import pytest
import trio
from hypothesis import given, strategies as st
from scripted_session import ScriptedSession

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.gateways.registry import MOST_CANDIDATES, LocalDirectory, TunnelTaken
from pioneer_tunnel.relay.gateways.takeover import Takeover, TakeoverRules, other_link

KEYS: Final = ("old", "new")
FIRST: Final = TakeoverRules(takeover=Takeover.FIRST)


def link_session(*, sound: bool, **fields: Any) -> ScriptedSession:
    return ScriptedSession(sound=sound, answering=sound, **fields)


places = st.none() | st.integers(2, 3).flatmap(lambda of: st.builds(LinkPlace, st.integers(0, of - 1), st.just(of)))
link_sessions = st.builds(
    link_session,
    instance=st.sampled_from(["a", "b"]),
    key_id=st.sampled_from(KEYS),
    place=places,
    sound=st.booleans(),
    draining=st.booleans(),
    burden=st.tuples(st.integers(0, 3), st.sampled_from([0.01, 0.2])),
)


@given(came=st.lists(link_sessions, max_size=8), leaving=st.sets(st.integers(0, 7)), first=st.booleans())
def test_visitors_go_to_a_link_that_lives(came: list[ScriptedSession], leaving: set[int], first: bool) -> None:
    rules = TakeoverRules(takeover=Takeover.FIRST if first else Takeover.NEWEST, keys=KEYS)

    async def tell() -> None:
        directory = LocalDirectory()
        has_it: list[ScriptedSession] = []
        for number, session in enumerate(came):
            try:
                await directory.enter("office", session, rules=rules)
            except TunnelTaken:
                await directory.leave("office", session)
                assert has_it
                continue
            has_it = [other for other in has_it if not other.orders and other_link(other, session)] + [session]
            # Whoever has lost the tunnel was told, or drains and ends by itself.
            assert not session.orders
            if number in leaving:
                await directory.leave("office", session)
                has_it.remove(session)
            holders = [holder for holder in has_it if not holder.orders]
            found = await directory.find("office")
            assert found in holders if holders else found is None
            if found is not None:
                assert found.sound or not any(holder.sound for holder in holders)
                alike = [each for each in holders if (each.sound, each.draining) == (found.sound, found.draining)]
                assert found.burden == min(each.burden for each in alike)
            assert len({holder.instance for holder in holders}) <= 1
            assert len({holder.place for holder in holders}) == len(holders)

    trio.run(tell)


async def test_a_session_that_counts_too_late_does_not_replace_a_newer_one() -> None:
    """A gateway came back, and then the first byte of its earlier connection arrives."""
    directory = LocalDirectory()
    early, late = ScriptedSession(instance="host-a"), ScriptedSession(instance="host-a")
    await directory.admit("office", early)
    await directory.admit("office", late)
    await directory.enter("office", late)
    assert early.orders == ["replaced by host-a"]
    assert late.orders == []


async def test_one_that_is_replaced_while_it_waits_gets_nothing() -> None:
    """It pings the holder, which does not answer; meanwhile the holder's gateway has reconnected."""
    directory = LocalDirectory()
    early, late = ScriptedSession(instance="host-b"), ScriptedSession(instance="host-b")

    class Holder(ScriptedSession):
        async def answers(self, within: float) -> bool:
            if not self.orders:
                self.orders.append("asked")
                await directory.leave("office", self)
                await directory.enter("office", late, rules=FIRST)
            return False

    await directory.enter("office", Holder(instance="host-a"))
    await directory.admit("office", early)
    await directory.admit("office", late)
    with pytest.raises(TunnelTaken):
        await directory.enter("office", early, rules=FIRST)
    assert early.orders == ["replaced by host-b"]
    assert await directory.find("office") is late


async def test_there_are_only_so_many_candidates() -> None:
    directory = LocalDirectory()
    candidates = [ScriptedSession(instance=f"host-{number}") for number in range(MOST_CANDIDATES + 2)]
    for candidate in candidates:
        await directory.admit("office", candidate)
    assert [candidate.orders for candidate in candidates] == [["abandoned"]] * 2 + [[]] * MOST_CANDIDATES
    for candidate in candidates:
        await directory.leave("office", candidate)
    assert not directory._candidates, "nothing is kept"


async def test_a_holder_that_leaves_while_it_is_asked_leaves_the_tunnel_to_the_newcomer() -> None:
    directory = LocalDirectory()

    class Holder(ScriptedSession):
        async def answers(self, within: float) -> bool:
            await directory.leave("office", self)
            return False

    newcomer = ScriptedSession(instance="b")
    await directory.enter("office", Holder(instance="a"))
    await directory.enter("office", newcomer, rules=FIRST)
    assert await directory.find("office") is newcomer


async def test_the_one_that_has_it_is_named() -> None:
    directory = LocalDirectory()
    holder = ScriptedSession(instance="host-a", since=1_700_000_000.0)
    await directory.enter("office", holder)
    with pytest.raises(TunnelTaken, match=r"'host-a'.*2023-11-14 22:13:20 UTC"):
        await directory.enter("office", ScriptedSession(instance="b"), rules=FIRST)
    assert await directory.find("office") is holder
