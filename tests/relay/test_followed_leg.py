"""A visitor's leg that follows HTTP: a bug in one of its callbacks."""

from __future__ import annotations

from typing import final

import trio
import trio.testing
from compiled import in_python
from rig import request

from pioneer_tunnel._http.head import HeadReader
from pioneer_tunnel._net.leg import Bytes, Leg
from pioneer_tunnel.relay.visitors.followed_leg import FollowedLeg
from pioneer_tunnel.relay.visitors.turns import BUDGET, Turn, Turns


@final
class BuggyLeg(Leg):
    """Says nothing, and has a bug."""

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def receive(self, max_bytes: int) -> None:
        return None

    def send(self, data: Bytes) -> bool:
        raise ZeroDivisionError("a bug")

    @property
    def room(self) -> int:
        return 1024

    @property
    def broken(self) -> bool:
        return False

    def send_eof(self) -> None:
        pass


def followed(visitor: BuggyLeg, turns: Turns) -> FollowedLeg:
    first = request()
    head = HeadReader().feed(first)
    assert head is not None
    leg = FollowedLeg(visitor, head, first[head.length :], Turn(turns, "tenant", None), head_timeout=10)
    leg.attach()
    return leg


@in_python
async def test_a_bug_while_an_answer_has_its_turn_is_for_the_exchange(autojump_clock: trio.testing.MockClock) -> None:
    """It ended the relay: turns are granted by Trio's own callbacks."""
    turns = Turns()
    Turn(turns, "nobody", None).ask(lambda: None)
    turns.spend(BUDGET)
    leg = followed(BuggyLeg(), turns)
    leg.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100)
    assert not leg.sent

    told = trio.Event()
    leg.on_writable = told.set
    await told.wait()
    assert isinstance(leg.refusal, ZeroDivisionError)
    leg.detach()
