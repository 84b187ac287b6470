"""Two talks over real sockets with a pump between, at random, compared with what each side said."""

from __future__ import annotations

import random

import pytest
import trio
from fast_path import fast_path  # noqa: F401  # runs each test twice
from rig import no_hang, nothing_left_behind, seeds, tcp_pair

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.pump import pump


class Talker:
    """One outer end: says random pieces with random pauses, then ends or resets, and notes what it hears."""

    def __init__(self, stream: ByteStream, dice: random.Random, *, may_reset: bool) -> None:
        self.stream = stream
        self.said = bytearray()
        self.heard = bytearray()
        self.heard_end = False
        self.resets = may_reset and dice.random() < 0.5
        self.said_end = False
        self._dice = dice

    async def _pause(self) -> None:
        for _ in range(self._dice.choice([0, 0, 1, 5, 50])):
            await trio.lowlevel.checkpoint()

    async def say(self) -> None:
        try:
            for _ in range(self._dice.randint(0, 12)):
                piece = self._dice.randbytes(self._dice.choice([1, 100, 4096, 5000, 70_000, 400_000]))
                self.said += piece
                await self.stream.send_all(piece)
                await self._pause()
            if self.resets:
                await abandon(self.stream)
            else:
                self.said_end = True
                await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def hear(self) -> None:
        try:
            while piece := await self.stream.receive_some(self._dice.choice([1000, 65536])):
                self.heard += piece
                await self._pause()
            self.heard_end = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@pytest.mark.parametrize("buffers", [None, 8192])
@pytest.mark.parametrize("may_reset", [False, True], ids=["orderly", "resets"])
@seeds(40, quick=5)
async def test_nothing_is_lost_changed_or_cut_and_taken_for_whole(
    seed: int, may_reset: bool, buffers: int | None
) -> None:
    dice = random.Random(seed)
    with nothing_left_behind(), no_hang():
        left, first = await tcp_pair(buffers)
        right, second = await tcp_pair(buffers)
        talkers = [Talker(TcpStream(end.socket), dice, may_reset=may_reset) for end in (left, right)]
        async with talkers[0].stream, talkers[1].stream, trio.open_nursery() as nursery:
            nursery.start_soon(pump, TcpStream(first.socket), TcpStream(second.socket))
            for talker in talkers:
                nursery.start_soon(talker.say)
                nursery.start_soon(talker.hear)
    for talker, other in (talkers, talkers[::-1]):
        assert other.said.startswith(talker.heard)
        if talker.heard_end:
            assert other.said_end
            assert talker.heard == other.said
        if not any(each.resets for each in talkers):
            assert talker.heard_end
