"""`resume.link` alone, over scripted WebSockets: moments that real connections seldom meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import final

import trio
import trio.testing
from rig import in_background

from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._wire.resumption import Counters
from pioneer_tunnel.resume import Carrier, ResumableLink, Tail
from pioneer_tunnel.websocket import Message, WebSocket, WebSocketLink
from pioneer_tunnel.websocket.frame_meter import FrameMeter
from pioneer_tunnel.websocket.wsproto_framing import WsprotoFraming
from pioneer_tunnel.yamux import SendBudget


@final
class ScriptedWebSocket(WebSocket):
    """Receives what the test says, and keeps what is sent."""

    def __init__(self) -> None:
        super().__init__(trio.testing.memory_stream_pair()[0], WsprotoFraming(is_client=False), FrameMeter())
        self.sent: list[bytes | str] = []
        self._come: deque[bytes | str] = deque()
        self._receiver = trio.lowlevel.ParkingLot()

    def come(self, message: bytes | str) -> None:
        self._come.append(message)
        self._receiver.unpark()

    async def send(self, messages: Sequence[bytes | str]) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += messages

    async def receive(self) -> list[Message]:
        if not self._come:
            await self._receiver.park()
        return [self._come.popleft()]

    async def close(self, code: int, reason: str = "") -> None:
        await trio.lowlevel.checkpoint()


def carrier_over(websocket: WebSocket) -> Carrier:
    return Carrier(WebSocketLink(websocket, watch(trio.testing.memory_stream_pair()[0])))


def link_over(websocket: WebSocket) -> ResumableLink:
    return ResumableLink(carrier_over(websocket), Tail(), timeout=60)


async def test_a_link_is_not_drained_before_the_first_look() -> None:
    assert not link_over(ScriptedWebSocket()).drained


async def test_bytes_that_come_in_the_moment_of_a_pause_are_not_received_twice() -> None:
    """The other end was told that they have not come, and sends them again."""
    old, new = ScriptedWebSocket(), ScriptedWebSocket()
    link = link_over(old)
    received = b""

    async def receive() -> None:
        nonlocal received
        while True:
            received += b"".join(await link.receive())

    async with in_background(receive):
        await trio.testing.wait_all_tasks_blocked()
        old.come(b"abc")
        assert link.pause() == Counters(0, 0)
        await trio.testing.wait_all_tasks_blocked()
        await link.attach(carrier_over(new), Counters(sent=3, received=0))
        new.come(b"abc")
        await trio.testing.wait_all_tasks_blocked()
        assert received == b"abc"
        assert link.counters == Counters(0, 3)


async def test_bytes_that_come_in_the_moment_of_a_pause_are_received_when_it_ends() -> None:
    old = ScriptedWebSocket()
    link = link_over(old)
    received = b""

    async def receive() -> None:
        nonlocal received
        while True:
            received += b"".join(await link.receive())

    async with in_background(receive):
        await trio.testing.wait_all_tasks_blocked()
        old.come(b"abc")
        link.pause()
        await trio.testing.wait_all_tasks_blocked()
        link.go_on()
        old.come(b"def")
        await trio.testing.wait_all_tasks_blocked()
        assert received == b"abcdef"
        assert link.counters == Counters(0, 6)


async def test_a_text_waits_for_the_end_of_a_resume() -> None:
    """Without a carrier, too: what the handshake has said may be outdated by this text."""
    new = ScriptedWebSocket()
    link = link_over(ScriptedWebSocket())
    link.lose_connection(trio.BrokenResourceError("cut"))
    await link.send_text("lost")
    link.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.send_text, "kept")
        await trio.testing.wait_all_tasks_blocked()
        await link.attach(carrier_over(new), Counters())
    assert new.sent == ["kept"]


async def test_a_text_does_not_wait_for_a_resume_that_fails_or_a_link_that_has_ended() -> None:
    link = link_over(ScriptedWebSocket())
    link.lose_connection(trio.BrokenResourceError("cut"))
    for end in (link.go_on, lambda: link.end(trio.BrokenResourceError("over"))):
        link.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.send_text, "lost")
            await trio.testing.wait_all_tasks_blocked()
            end()


async def test_what_a_resume_acknowledges_is_given_back_to_the_budget_at_once() -> None:
    """Not with the next bytes: an idle session sends none for a while, and then only pings."""
    process = SendBudget(1024 * 1024)
    link = link_over(ScriptedWebSocket())
    link.bind(on_interrupted=list, budget=SendBudget(1024 * 1024, process))

    async def resume(received: int) -> None:
        link.lose_connection(trio.BrokenResourceError("cut"))
        await link.attach(carrier_over(ScriptedWebSocket()), Counters(sent=0, received=received))

    await link.send([b"x" * 24])
    await resume(received=0)
    assert process.held == 24
    await resume(received=24)
    assert process.held == 0
    await link.send([b"x" * 24])
    await resume(received=24)
    assert process.held == 24, "the peer may lack these: less than `LEAST_REPORT` is not reported"
    link.end(trio.ClosedResourceError("over"))
    assert process.held == 0
