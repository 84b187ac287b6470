"""The interface of the handshakes with a proxy, and how a proxy refuses. No I/O."""

from __future__ import annotations

from typing import Final, Protocol, final

__all__ = ["LONGEST_ANSWER", "CredentialsRefused", "Handshake", "ProxyRefusal"]

LONGEST_ANSWER: Final = 64 * 1024
"""Bytes that a proxy may send before its tunnel is there."""


class ProxyRefusal(Exception):
    """The proxy makes no tunnel. The text continues a sentence that begins with its name.

    Attributes:
        retry_after: seconds that it asked us to wait; None when it did not.
    """

    def __init__(self, why: str, *, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


@final
class CredentialsRefused(ProxyRefusal):
    """It wants credentials, or others than it got.

    Attributes:
        can_be_given: False when credentials of ours cannot help.
    """

    def __init__(self, why: str, *, can_be_given: bool = True) -> None:
        super().__init__(why)
        self.can_be_given = can_be_given


class Handshake(Protocol):
    """One end of a handshake. `hello` is sent first; then all that comes is passed to `receive`.

    Attributes:
        hello: the first bytes for the proxy.
        done: whether the tunnel is there.
        surplus: what came after the answer. A relay never speaks first, so it is not from the relay.
    """

    hello: bytes
    done: bool
    surplus: bytes

    def receive(self, data: bytes) -> bytes:
        """Take what the proxy sent, in pieces of any size; returns what to send, b"" for nothing.

        Raises:
            ProxyRefusal: there will be no tunnel.
        """
