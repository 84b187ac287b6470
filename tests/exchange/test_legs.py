"""Legs in an exchange: what they keep is sent and counted, and a lost connection is no end."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing
from compiled import in_python
from rig import in_background, no_hang, tcp_pair
from yamux_rig import KIB, data, one, pipe, two, update

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.fastpath.pipe_pool import CAN_PIPE, Pipes
from pioneer_tunnel._net.fastpath.socket_leg import SocketLeg
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.leg import Bytes, Leg
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.exchange import Ending, Exchange
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.exchange.task_leg import TaskLeg
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import FIN, RST, SYN


class Keeper(Leg):
    """Sends nothing, and keeps what it is sent until a test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0
        self.keeps = True
        self.got_eof = False

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def receive(self, max_bytes: int) -> None:
        return None

    def send(self, data: Bytes) -> bool:
        if self.keeps:
            self.kept += len(data)
        return not self.kept

    @property
    def room(self) -> int:
        return 0 if self.kept else 255 * KIB

    @property
    def sent(self) -> bool:
        return not self.kept

    @property
    def broken(self) -> bool:
        return False

    def send_eof(self) -> None:
        self.got_eof = True

    def let_go(self) -> None:
        self.kept = 0
        self.on_writable()


@in_python
async def test_what_a_sink_keeps_counts_for_its_source_until_it_lets_go() -> None:
    async with two(pipe()) as both:
        near, far = await both.stream()
        keeper = Keeper()
        exchange = Exchange(far.leg(), keeper, on_end=lambda: None, soon=lambda turn: None)
        exchange.begin()
        sending = both.server.session.sending
        for size in (1000, 2000):
            await near.send_all(bytes(size))
            await trio.testing.wait_all_tasks_blocked()
            assert sending.held == keeper.kept == size
            keeper.let_go()
            assert sending.held == 0
        await near.send_all(bytes(3000))
        await trio.testing.wait_all_tasks_blocked()
        await near.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert sending.held == keeper.kept == 3000
        keeper.let_go()
        assert sending.held == 0, "also after EOF"
        exchange.give_up(keeper)
        await far.aclose()


async def test_a_visitor_that_has_ended_and_then_left_before_the_exchange_begins_is_noticed() -> None:
    """The other side may be silent for ever."""
    ours, theirs = await tcp_pair()
    async with one(pipe()) as (running, peer), theirs:
        await peer.hear_ping()
        await peer.say(update(1, SYN))
        stream = await running.accept()
        await peer.say(update(1, FIN), update(1, RST))
        await trio.testing.wait_all_tasks_blocked()
        with no_hang():
            assert not await pump(stream, adopt(ours))


async def test_what_is_sent_while_a_send_is_under_way_is_sent_after_it() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    under_way, go_on = trio.Event(), trio.Event()

    async def hold() -> None:
        under_way.set()
        await go_on.wait()
        assert pass_on is not None
        await pass_on()

    pass_on, ours.send_stream.send_all_hook = ours.send_stream.send_all_hook, hold
    leg = TaskLeg(adopt(ours))
    async with in_background(*leg.tasks):
        leg.send(b"first, ")
        await under_way.wait()
        leg.send(b"second")
        assert not leg.room
        go_on.set()
        received = b""
        with no_hang():
            while len(received) < len(b"first, second"):
                received += await theirs.receive_some()
        assert received == b"first, second"
        await trio.testing.wait_all_tasks_blocked()
        assert leg.sent


class Unreachable:
    """Lets each write to `descriptor` fail as one to a peer that has vanished does: the kernel reports that once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._write = os.write
        self._writev = os.writev

    def _fail(self, descriptor: int) -> None:
        if descriptor == self._descriptor:
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

    def write(self, descriptor: int, data: Any) -> int:
        self._fail(descriptor)
        return self._write(descriptor, data)

    def writev(self, descriptor: int, pieces: Sequence[Any]) -> int:
        self._fail(descriptor)
        return self._writev(descriptor, pieces)


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")
@pytest.mark.parametrize("as_leg", [True, False], ids=["leg", "stream"])
async def test_an_end_after_a_send_that_timed_out_is_none(as_leg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = await tcp_pair()
    stream = TcpStream(ours.socket)
    unreachable = Unreachable(stream.socket.fileno())
    async with stream, theirs:
        await theirs.send_all(b"half")
        await theirs.send_eof()  # what the kernel says then
        with monkeypatch.context() as patch, Stay():
            leg = SocketLeg(stream.lowest_socket)
            patch.setattr(os, "write", unreachable.write)
            patch.setattr(os, "writev", unreachable.writev)
            if as_leg:
                leg.attach()
                with pytest.raises(trio.BrokenResourceError):
                    leg.send(b"x")
                assert leg.receive(4) == b"half"
                with pytest.raises(trio.BrokenResourceError):
                    leg.receive(4)
                leg.detach()
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.send_all(b"x")
                assert await stream.receive_some() == b"half"
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")
async def test_a_leg_is_broken_when_a_send_has_got_the_only_report_of_the_loss() -> None:
    """The event loop sees no error any more, only that both ends are closed: that may be an end in order."""
    ours, theirs = await tcp_pair()
    stream = TcpStream(ours.socket)
    async with stream:
        await theirs.send_all(b"half")
        with Stay():
            leg = SocketLeg(stream.lowest_socket)
            leg.attach()
            await theirs.aclose()

            def send_until_reset() -> None:
                while True:
                    leg.send(b"x")

            with pytest.raises(trio.BrokenResourceError):
                send_until_reset()
            assert leg.broken
            assert leg.receive(4) == b"half"
            assert leg.receive(4) == b""
            leg.detach()


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no splice")
async def test_a_pipe_for_which_the_socket_takes_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = await tcp_pair()
    others, visitor = await tcp_pair()
    one_stream, other_stream = TcpStream(ours.socket), TcpStream(others.socket)
    splice = os.splice

    def refuse(source: int, sink: int, *arguments: Any, **options: Any) -> int:
        if sink == other_stream.socket.fileno():
            raise OSError(errno.EPIPE, "Broken pipe")
        return splice(source, sink, *arguments, **options)

    async with one_stream, other_stream, theirs, visitor:
        with Stay():
            source, sink = SocketLeg(one_stream.lowest_socket), SocketLeg(other_stream.lowest_socket)
            source.attach()
            sink.attach()
            await theirs.send_all(bytes(100_000))
            monkeypatch.setattr(os, "splice", refuse)
            with pytest.raises(trio.BrokenResourceError):
                source.move_bulk(sink)
            assert sink.sent
            assert not Pipes.current()._lent
            source.detach()
            sink.detach()


@pytest.mark.parametrize("flag", [FIN, RST, None], ids=["FIN", "RST", "the connection is lost"])
@in_python
async def test_an_end_that_came_behind_unread_data_is_passed_on_with_the_last_of_it(flag: int | None) -> None:
    """No event announces it again. A visitor that read slowly never got the end of its answer."""
    async with one(pipe()) as (running, peer):
        await peer.hear_ping()
        await peer.say(update(1, SYN))
        stream = await running.accept()
        keeper = Keeper()
        exchange = Exchange(stream.leg(), keeper, on_end=lambda: None, soon=lambda call: None)
        exchange.begin()
        await peer.say(data(1, bytes(INITIAL_WINDOW)), *([] if flag is None else [update(1, flag)]))
        await trio.testing.wait_all_tasks_blocked()
        if flag is None:
            running.connection.fail(trio.BrokenResourceError("it was lost"))
        assert 0 < keeper.kept < INITIAL_WINDOW, "it waits with the rest behind it"
        keeper.keeps = False  # it takes the rest at once, so it does not call back
        keeper.let_go()
        assert keeper.got_eof or exchange.ending is Ending.FIRST_BROKE
        exchange.end(Ending.STOPPED)
