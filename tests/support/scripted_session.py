"""A session for the directories of relays, which does what the test says."""

from __future__ import annotations

import secrets
from collections.abc import Collection

import attrs
import trio
import trio.testing

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.gateways.registry import LiveSession

__all__ = ["ScriptedSession"]


@attrs.define(eq=False, kw_only=True)
class ScriptedSession(LiveSession):
    """A session of a gateway.

    Attributes:
        answering: whether its gateway answers.
        orders: what it got.
        refused: whether it did not get the tunnel.
        ended: set when an order has ended it, or the gateway.
    """

    instance: str = "host-a"
    key_id: str = "key"
    place: LinkPlace | None = None
    since: float = 0.0
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    sound: bool = True
    draining: bool = False
    burden: tuple[int, float] = (0, 0.0)
    services: Collection[str] | None = None
    answering: bool = True
    orders: list[str] = attrs.field(factory=list)
    refused: bool = False
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def open_stream(self) -> ByteStream:
        await trio.lowlevel.checkpoint()
        if self.ended.is_set() or self.is_retired:
            raise trio.BrokenResourceError("the session has ended")
        return adopt(trio.testing.memory_stream_pair()[0])

    async def answers(self, within: float) -> bool:
        await trio.lowlevel.checkpoint()
        return self.answering and not self.ended.is_set()

    @property
    def is_retired(self) -> bool:
        return any(order.startswith("retired") for order in self.orders)

    def replace(self, by: str) -> None:
        self._end(f"replaced by {by}")

    def retire(self, by: str) -> None:
        self.orders.append(f"retired by {by}")

    def abandon(self) -> None:
        self._end("abandoned")

    def _end(self, order: str) -> None:
        if not self.ended.is_set():
            self.orders.append(order)
            self.ended.set()
