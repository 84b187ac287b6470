"""The visitors of a simulated day, and the checks of their conversations.

A visitor must get through, promptly, if nothing is wrong from connect to leave. When a conversation breaks, both ends
must get an error. `Conversation` checks the bytes.
"""

from __future__ import annotations

from typing import Final, Protocol, final

import trio

from pioneer_tunnel.testing.memory_relay import MemoryRelay

from .conversation import Conversation, Spoken, Talk, number_in
from .trace import Trace

__all__ = ["Crowd"]

PROMPT: Final = 30.0
"""Seconds that a conversation may take beyond its pauses when nothing is wrong."""


class Weather(Protocol):
    """What a `Crowd` needs from its `World`."""

    @property
    def calm(self) -> bool:
        """Whether nothing is wrong."""

    @property
    def disturbances(self) -> int:
        """Number of disturbances so far."""


@final
class Crowd:
    """See the module.

    Args:
        relay: the relay that visitors connect to.
        weather: whether anything is wrong.
        trace: where events and faults are recorded.
    """

    def __init__(self, relay: MemoryRelay, weather: Weather, trace: Trace) -> None:
        self._relay: Final = relay
        self._weather: Final = weather
        self._trace: Final = trace
        self._hurried: Final = trio.Event()
        self._number = 0
        # None is removed: the bytes of a visitor may reach the gateway long after the visitor has left.
        self._conversations: Final[dict[int, Conversation]] = {}

    def hurry(self) -> None:
        """Skip all pauses from now on."""
        self._hurried.set()

    async def answer(self, stream: Spoken) -> None:
        """Be the gateway of the conversation that arrives on `stream`."""
        try:
            number = await number_in(stream)
            if number is not None:
                await self._conversations[number].answer(stream)
        finally:
            stream.reset()  # after an orderly end this changes nothing

    async def gone(self) -> None:
        """Wait until all conversations have ended, and their connections are closed."""
        for conversation in [*self._conversations.values()]:
            await self._wait_both_ended(conversation)
        await trio.sleep(PROMPT)

    async def come(self, talk: Talk) -> None:
        """Be a visitor, and check the result."""
        await trio.sleep_until(talk.at)
        self._number += 1
        conversation = Conversation(self._number, talk, complain=self._trace.complain, hurry=self._hurried)
        calm, disturbances, came = self._weather.calm, self._weather.disturbances, trio.current_time()
        try:
            stream = await self._relay.visit()
        except (ConnectionRefusedError, KeyError):
            self._note(conversation, "turned away")
            self._trace.counts["visitors turned away"] += 1
            return
        self._conversations[conversation.number] = conversation
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._complain_if_late, conversation, calm, disturbances, nursery.cancel_scope)
            await conversation.visit(stream)
        await self._wait_both_ended(conversation)
        outcome = conversation.visitor.outcome
        self._note(conversation, str(outcome))
        self._trace.counts[f"visitors: {outcome}"] += 1
        self._trace.counts["bytes heard"] += conversation.visitor.heard
        undisturbed = calm and self._weather.calm and disturbances == self._weather.disturbances
        if undisturbed and talk.completes and not conversation.whole:
            gateway = conversation.gateway
            self._trace.complain(
                f"{conversation} came at {came:.3f} s and was broken off at {trio.current_time():.3f} s, while nothing"
                f" was wrong; the visitor: {outcome}, the gateway: {gateway and gateway.outcome}"
            )

    async def _complain_if_late(
        self, conversation: Conversation, calm: bool, disturbances: int, scope: trio.CancelScope
    ) -> None:
        """Report a conversation that takes too long while nothing is wrong."""
        talk = conversation.talk
        with trio.move_on_after(talk.seconds + PROMPT):
            await conversation.visitor.over.wait()
            return
        if calm and self._weather.calm and disturbances == self._weather.disturbances and talk.completes:
            self._trace.complain(f"{conversation} is not over {PROMPT:g} s after it should be, while nothing was wrong")
            scope.cancel()

    async def _wait_both_ended(self, conversation: Conversation) -> None:
        """Wait until the conversation has ended for both ends; report an end for which it has not."""
        ends = [end for end in (conversation.visitor, conversation.gateway) if end is not None]
        # Time to detect a dead link; an end that does not read detects it only when it sends.
        patience = 2 * self._relay.heartbeat + 120.0 + conversation.talk.seconds
        for end in ends:
            # In steps: a jump of the clock by `HostSleep` uses up only one.
            for _ in range(10):
                with trio.move_on_after(patience / 10):
                    await end.over.wait()
            if not end.over.is_set():
                self._trace.complain(f"{conversation}: {end.name} was never told that it was over")

    def _note(self, conversation: Conversation, what: str) -> None:
        visitor, gateway = conversation.visitor, conversation.gateway
        told = f"visitor {conversation.number} {what}, heard {visitor.heard}, said {visitor.said}"
        if gateway is not None:
            told += f"; the gateway {gateway.outcome}, heard {gateway.heard}, said {gateway.said}"
        self._trace.note(told)
