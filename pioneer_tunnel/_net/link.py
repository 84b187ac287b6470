"""A link: the reliable, ordered stream of bytes that yamux runs over.

yamux never learns what carries its bytes: one WebSocket, or several that follow each other when one is lost (`resume`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from .delivery import Delivery
from .leg import Bytes

__all__ = ["Budget", "Bytes", "Link"]


class Budget(Protocol):
    """Counts the bytes that are held for sending."""

    @property
    def is_short(self) -> bool:
        """Whether so much is held that each holder should hold little."""

    def take(self, amount: int) -> None:
        """Hold `amount` bytes more; fewer if it is negative."""


class Link(trio.abc.AsyncResource):
    """What yamux needs of its carrier. One task sends, one task receives."""

    __slots__ = ()

    @property
    @abstractmethod
    def last_received(self) -> float:
        """`trio.current_time()` when the last byte arrived from the peer, also one of a control frame."""

    @property
    @abstractmethod
    def sending_since(self) -> float | None:
        """`trio.current_time()` when the peer was last seen to take bytes; None while none wait for it."""

    @property
    def suspended(self) -> bool:
        """Whether the link has lost its connection, and may get another one. `send` and `receive` wait meanwhile."""
        return False

    @property
    def usable_since(self) -> float:
        """When the link got its connection, if that is not its first one; the current time while it is suspended."""
        return -math.inf

    def lose_connection(self, reason: trio.BrokenResourceError) -> None:
        """The connection is dead, as far as the user of the link can tell.

        Raises:
            trio.BrokenResourceError: `reason`, if the link does not outlive its connection.
        """
        raise reason

    def bind(self, *, on_interrupted: Callable[[], object], budget: Budget) -> None:
        """Set what a link that outlives its connection needs of its user.

        Args:
            on_interrupted: called when it has lost its connection.
            budget: counts the sent bytes that it keeps.
        """

    def delivery(self) -> Delivery | None:
        """What the system knows of the connection below; None if it cannot tell. Ask at least every 10 seconds."""
        return None

    def restore(self) -> bool:
        """The path is in doubt: try another connection at once, if this link can survive the loss of one.

        The current connection stays in use until the other one has proved itself. Returns False if the link has only
        this connection. Does not wait. A call while it is tried already changes nothing.
        """
        return False

    @property
    def address_is_gone(self) -> bool:
        """Whether the system has lost the address of this end, so that nothing can come on the current connection."""
        return False

    def outlast(self, seconds: float) -> None:
        """Let the system keep the connection through a pause of the path of `seconds`, where it can."""

    @property
    def window_left(self) -> int:
        """Bytes that the system would send at once, beyond those that it has; 0 if that is not known."""
        return 0

    def expect_bulk(self) -> None:
        """Note that much is sent next, after a while in which little was sent."""

    def limit_unsent(self, limit: int) -> None:
        """Let about `limit` bytes at most wait below the link before they are sent, if the link can."""

    @property
    def has_room(self) -> bool:
        """False while `wait_room` would wait."""
        return True

    async def wait_room(self) -> None:
        """Wait until about half of that limit is free, so that what to send can be decided late.

        It need not be a checkpoint. Returns at once if the link cannot tell.
        """

    @abstractmethod
    async def send(self, chunks: Sequence[Bytes]) -> None:
        """Send all of `chunks`, in order.

        Raises:
            trio.BrokenResourceError: the link is gone.

        If cancelled, it may have sent a part. Only `aclose` may be called after that.
        """

    def watch(self, on_readable: Callable[[], object]) -> bool:  # noqa: ARG002  # the default
        """Call `on_readable` when `receive_nowait` may return something, until `unwatch` or a close.

        The caller holds a stay in the event loop.

        False, and nothing happens, if this link cannot do that: then use `receive`.
        """
        return False

    def unwatch(self) -> None:
        """Call back no more. To be called before the stay ends."""

    drained: bool = False
    """True if `receive_nowait` would return None now, as far as the last call knows."""

    def receive_nowait(self) -> Sequence[Bytes] | None:
        """Like `receive`, but it never waits: None when nothing has come. After `watch` only.

        Empty when what came has no bytes for the caller: call again, after others had their turn. EOF is a
        `trio.BrokenResourceError`.
        """
        raise NotImplementedError

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:  # noqa: ARG002  # the default
        """Send `chunks` as far as that is possible without waiting. Not to be called while `send` runs.

        Returns:
            False if a rest waits: then call `send` next, which sends it first, also without chunks. None if this link
            cannot do that, and has taken nothing.

        Raises:
            trio.BrokenResourceError: the link is gone.
        """
        return None

    @abstractmethod
    async def receive(self) -> Sequence[Bytes]:
        """Wait for bytes and return what has arrived, in order; empty at EOF.

        Raises:
            trio.BrokenResourceError: the link broke before EOF; the message says how.
        """

    def blame(self) -> None:
        """The peer broke a rule: let `aclose` send that as the reason, if the link can."""

    @abstractmethod
    async def aclose(self) -> None:
        """Send a close message if the link has one, then close the connection. If cancelled, close it at once."""
