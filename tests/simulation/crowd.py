"""The visitors of a simulated day, and what has to become of them.

Who comes while nothing is wrong, and nothing goes wrong until it leaves, has to be heard out, promptly. When one is
broken off, both ends have to be told. What they hear is judged by the `Conversation`.
"""

from __future__ import annotations

from typing import Final, Protocol, final

import trio

from pioneer_tunnel.testing.memory_relay import MemoryRelay

from .conversation import Conversation, Spoken, Talk, number_in
from .trace import Trace

__all__ = ["Crowd"]

PROMPT: Final = 30.0
"""Seconds more than its pauses that a conversation may take when nothing is wrong."""


class Weather(Protocol):
    """What a crowd needs to know of its world."""

    @property
    def calm(self) -> bool:
        """Whether nothing is wrong."""

    @property
    def disturbances(self) -> int:
        """How often anything has gone wrong so far."""


@final
class Crowd:
    """See the module.

    Args:
        relay: where they come.
        weather: tells whether anything is wrong.
        trace: what is told of them.
    """

    def __init__(self, relay: MemoryRelay, weather: Weather, trace: Trace) -> None:
        self._relay: Final = relay
        self._weather: Final = weather
        self._trace: Final = trace
        self._hurried: Final = trio.Event()
        self._number = 0
        # None is forgotten: what a visitor has said may reach the gateway when it has long left.
        self._conversations: Final[dict[int, Conversation]] = {}

    def hurry(self) -> None:
        """From now on nobody pauses."""
        self._hurried.set()

    async def answer(self, stream: Spoken) -> None:
        """Be the gateway of whoever it is."""
        try:
            number = await number_in(stream)
            if number is not None:
                await self._conversations[number].answer(stream)
        finally:
            stream.reset()  # after an orderly end this changes nothing

    async def gone(self) -> None:
        """Wait until nobody speaks any more, and what they leave behind is gone."""
        for conversation in [*self._conversations.values()]:
            await self._all_told(conversation)
        await trio.sleep(PROMPT)

    async def come(self, talk: Talk) -> None:
        """Be a visitor, and judge what became of the visit."""
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
            nursery.start_soon(self._not_for_ever, conversation, calm, disturbances, nursery.cancel_scope)
            await conversation.visit(stream)
        await self._all_told(conversation)
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

    async def _not_for_ever(
        self, conversation: Conversation, calm: bool, disturbances: int, scope: trio.CancelScope
    ) -> None:
        """Complain of a conversation that comes to nothing while nothing is wrong."""
        talk = conversation.talk
        with trio.move_on_after(talk.seconds + PROMPT):
            await conversation.visitor.over.wait()
            return
        if calm and self._weather.calm and disturbances == self._weather.disturbances and talk.completes:
            self._trace.complain(f"{conversation} is not over {PROMPT:g} s after it should be, while nothing was wrong")
            scope.cancel()

    async def _all_told(self, conversation: Conversation) -> None:
        """Wait until both ends know that it is over, and complain when one is not told."""
        ends = [end for end in (conversation.visitor, conversation.gateway) if end is not None]
        # Until a dead link is noticed; and who does not listen only finds out when it speaks.
        patience = 2 * self._relay.heartbeat + 120.0 + conversation.talk.seconds
        for end in ends:
            # In steps, of which a host that sleeps takes one.
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
