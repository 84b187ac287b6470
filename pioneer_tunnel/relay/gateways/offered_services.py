"""The services that a connected gateway offers, and what the relay tells it of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final, NoReturn, TypeAlias, final

import trio

from ..._wire.messages import Message
from ..._wire.services import SERVICES, Located, located_text, serves

__all__ = ["Locate", "OfferedServices"]

Locate: TypeAlias = Callable[[Collection[str]], Awaitable[Located]]
"""Says where visitors reach the services of a tunnel, when its gateway offers those with these names."""


@final
class OfferedServices:
    """What a gateway offers in one session.

    Args:
        names: what it said in its handshake.
        locate: asked when these or the relay's tunnels change.
        located: its answer for `names`, which the welcome has.

    Attributes:
        names: what it offers now.
    """

    def __init__(self, names: Collection[str], locate: Locate, located: Located) -> None:
        self.names = names
        self._locate: Final = locate
        self._located = located
        self._changed = trio.Event()

    def take(self, text: str) -> None:
        """Take a text of the gateway, if it says what it offers now.

        Raises:
            RemoteProtocolError: it is malformed.
        """
        message = Message.parse(text)
        if message.type == SERVICES:
            self.names = serves(message)
            self._changed.set()

    def told(self, names: Collection[str], located: Located) -> None:
        """Another handshake has said what it offers, and where."""
        self.names, self._located = names, located

    def look_again(self) -> None:
        """The relay's tunnels have changed. Does not wait."""
        self._changed.set()

    async def keep_told(self, send: Callable[[str], Awaitable[None]]) -> NoReturn:
        """Tell the gateway whenever there is something new."""
        while True:
            # No deadline: most sessions never have any news.
            await self._changed.wait()
            self._changed = trio.Event()
            located = await self._locate(self.names)
            if located != self._located:
                self._located = located
                await send(located_text(located))
