"""A stream's socket while the fast path moves its bytes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, final

import trio

from .socket_options import Socket, fin_on_close, reset_on_close

__all__ = ["LentSocket"]


@final
class LentSocket:
    """The socket of a stream, lent to whoever moves bytes past the stream. Every close of it goes through here.

    While it `resets`, only `close` ends the connection with a FIN. All else that closes the socket is a RST, the kernel
    after the death of this process and the garbage collector included. So a truncated stream never looks complete.

    Args:
        socket: what is lent.
        resets: whether it does so already: what is accepted inherits it from its listener.

    Attributes:
        socket, resets: as above.
        waited_for: whether Trio was ever asked to wait for it. Only then closing has to wake who waits.
        on_close: the owner's; called when it was closed, by the borrower or through here.
        taken_back: the borrower's; called when the stream is closed meanwhile, just before its socket is.
    """

    __slots__ = ("on_close", "resets", "socket", "taken_back", "waited_for")

    def __init__(self, socket: Socket, *, resets: bool = False) -> None:
        self.socket: Final = socket
        self.resets: bool = resets
        self.waited_for: bool = False
        self.on_close: Callable[[], None] | None = None
        self.taken_back: Callable[[], None] | None = None

    def take_back(self) -> None:
        """The stream is about to close the socket."""
        if self.taken_back is not None:
            self.taken_back()

    def arm_reset(self) -> None:
        """Let every end but `close` be a RST."""
        if not self.resets:
            self.resets = True
            reset_on_close(self.socket)

    def disarm_reset(self) -> None:
        """Let every end but `reset` be a FIN."""
        if self.resets:
            self.resets = False
            fin_on_close(self.socket)

    def close(self) -> None:
        """Close it in good order: what was sent still arrives. The borrower does so once both directions have ended."""
        self.disarm_reset()
        self.drop()

    def reset(self) -> None:
        """Close it with a RST, which drops what has not been sent."""
        self.arm_reset()
        self.drop()

    def drop(self) -> None:
        """Close it, with a RST if `resets` is True."""
        if self.waited_for and isinstance(self.socket, socket.socket) and self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)  # Trio's own do so themselves
        self.socket.close()
        if self.on_close is not None:
            self.on_close()
