"""The socket of a stream, which the fast path may borrow to move bytes past the stream."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final, final

import trio

from .socket_options import Socket, fin_on_close, reset_on_close

__all__ = ["LentSocket"]


@final
class LentSocket:
    """A stream's socket. The stream owns it; a borrower may move bytes past the stream. All closes go through here.

    While `resets` is True, only `close` sends a FIN. Any other close sends a RST, also by the garbage collector, or by
    the kernel after this process died. So a truncated stream never looks complete.

    Args:
        socket: the connected socket.
        resets: whether SO_LINGER is set on it already. An accepted socket inherits that from its listener.

    Attributes:
        socket, resets: as above.
        waited_for: whether a Trio task has ever waited for it. Only then a close has to wake waiting tasks.
        on_close: set by the owner; called after a close, by the owner or the borrower.
        taken_back: set by the borrower; called just before the owner closes the socket.
    """

    __slots__ = ("on_close", "resets", "socket", "taken_back", "waited_for")

    def __init__(self, socket: Socket, *, resets: bool = False) -> None:
        self.socket: Final = socket
        self.resets: bool = resets
        self.waited_for: bool = False
        self.on_close: Callable[[], None] | None = None
        self.taken_back: Callable[[], None] | None = None

    def take_back(self) -> None:
        """Tell the borrower that the owner closes the socket next."""
        if self.taken_back is not None:
            self.taken_back()

    def arm_reset(self) -> None:
        """Make every close but `close` a RST."""
        if not self.resets:
            self.resets = True
            reset_on_close(self.socket)

    def disarm_reset(self) -> None:
        """Make every close but `reset` a FIN."""
        if self.resets:
            self.resets = False
            fin_on_close(self.socket)

    def shut_down(self) -> None:
        """Send a FIN. Both kinds of sockets do this at once."""
        found: Any = self.socket
        found.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it with a FIN: what was sent still arrives. The borrower calls this after EOF in both directions."""
        self.disarm_reset()
        self.drop()

    def reset(self) -> None:
        """Close it with a RST, which drops unsent data."""
        self.arm_reset()
        self.drop()

    def drop(self) -> None:
        """Close it, with a RST if `resets` is True."""
        if self.waited_for and isinstance(self.socket, socket.socket) and self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)  # Trio's own sockets do this themselves
        self.socket.close()
        if self.on_close is not None:
            self.on_close()
