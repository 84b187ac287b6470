"""A link: the reliable, ordered stream of bytes that yamux runs over.

yamux never learns what carries its bytes. Today that is one WebSocket (`websocket.link`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import trio

__all__ = ["Bytes", "Link"]

Bytes: TypeAlias = bytes | bytearray | memoryview


class Link(trio.abc.AsyncResource):
    """What yamux needs of the thing that carries it. One task sends, one task receives."""

    @property
    @abstractmethod
    def last_received(self) -> float:
        """`trio.current_time()` of the last byte that came from the other end, whatever it belonged to."""

    @property
    @abstractmethod
    def sending_since(self) -> float | None:
        """When the `send` that is under way last made progress; None while there is none."""

    @abstractmethod
    async def send(self, chunks: Sequence[Bytes]) -> None:
        """Send all of `chunks`, in order.

        Raises:
            trio.BrokenResourceError: the link is gone. Cancelled half way, it may have sent a part and is good for
                nothing but `aclose`.
        """

    @abstractmethod
    async def receive(self) -> Sequence[Bytes]:
        """Wait for bytes and return what has come, in order; empty at the end.

        Raises:
            trio.BrokenResourceError: the link is gone without having ended; the message tells how.
        """

    def blame(self) -> None:
        """The other end broke a rule: let `aclose` say so, where it has a way to."""

    @abstractmethod
    async def aclose(self) -> None:
        """Say goodbye if the protocol has a way to, then close. If cancelled, close at once."""
