"""An accepted connection, which the relay counts from its accept to its end. It has a task only while it needs one."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, Final, TypeAlias, final

import trio

from .._model.addresses import Address
from .._model.log_fields import about
from .._net.adopted import Watched
from .._net.closing import abandon
from .._net.lent_socket import LentSocket
from .._net.log_limiter import LogLimiter
from .._net.socket_options import Socket, descriptor_of
from .admission import Arrival

__all__ = ["Connection", "address_of", "contain_errors", "log_unforeseen"]

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.server"))

Serve: TypeAlias = Callable[..., Awaitable[object]]


@final
class Connection:
    """One accepted connection. Its keeper closes it: the task that serves it, or what carries it without a task.

    Args:
        accepted: its socket. Only this object uses it until `begin`, or `close`.
        peer: the address of the other end; None if it is unknown.
        local: the address of this end; None to ask the socket.
        tasks: the nursery of its tasks.
        context: the context of its tasks.

    Attributes:
        accepted, peer: as above.
        stream: the connection, from `begin` on.
        arrival: its entry in the limits. The accept loop sets it.
        received: what was read of it before `begin`. The next reader takes it.
        may_pass: whether it may still be passed to another process, see `passing`.
    """

    __slots__ = (
        "_context",
        "_left",
        "_lent",
        "_local",
        "_scope",
        "_tasks",
        "accepted",
        "arrival",
        "may_pass",
        "peer",
        "received",
        "stream",
    )

    _lent: LentSocket
    arrival: Arrival
    stream: Watched

    def __init__(
        self, accepted: Socket, peer: Address | None, local: Address | None, tasks: trio.Nursery, context: Context
    ) -> None:
        self.accepted: Final = accepted
        self.peer: Final = peer
        self._local: Final = local
        self._tasks: Final = tasks
        self._context: Final = context
        self._scope: trio.CancelScope | None = None  # of its task
        self._left = False
        self.received: bytes = b""
        self.may_pass: bool = True

    def begin(self, stream: Watched) -> None:
        """This process serves it, as `stream`."""
        lent = stream.lowest_socket
        assert lent is not None  # it was accepted
        self.stream, self._lent = stream, lent

    @property
    def local(self) -> Address | None:
        """The address of this end; None if it is unknown, since the peer has already closed the connection."""
        return self._local or address_of(self.accepted.getsockname)

    @property
    def descriptor(self) -> int:
        """Of its socket."""
        return descriptor_of(self.accepted)

    def start(self, serve: Serve, *arguments: Any) -> None:
        """Serve it in a task, which is cancelled when the connection is evicted.

        When `serve` returns, the connection is closed, unless it was `release`d. What it raises is logged, see
        `contain_errors`.
        """
        self._scope = trio.CancelScope()
        self._context.run(self._tasks.start_soon, self._run, self._scope, serve, arguments)

    def release(self) -> None:
        """Let the connection outlive its task. Call `close` or `start` later."""
        self._scope = None

    def close(self) -> None:
        """Close it if it is open, and count it no more. Later calls change nothing."""
        if not self._left:
            self._left = True
            self.arrival.leave()
            self._lent.drop()

    def evict(self) -> None:
        """Reset it, and count it no more."""
        if self._scope is None:
            self._lent.take_back()
            self.reset()
            self.close()
        else:
            self._lent.arm_reset()
            self._scope.cancel()  # the task closes it

    def reset(self) -> None:
        """Close it with a RST."""
        self._lent.reset()

    async def _run(self, scope: trio.CancelScope, serve: Serve, arguments: tuple[Any, ...]) -> None:
        try:
            with scope:
                await contain_errors(self.stream, serve, *arguments)
        finally:
            if self._scope is scope:
                self.close()


async def contain_errors(stream: trio.abc.AsyncResource, serve: Serve, *arguments: Any) -> None:
    """Call `serve` for a connection so that its errors do not reach other connections.

    A broken connection or a timeout is ignored. Any other error is logged, and `stream` is reset.
    """
    try:
        await serve(*arguments)
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        pass
    except* Exception as error:  # noqa: BLE001  # whatever it is, it concerns this connection alone
        log_unforeseen(error)
        with trio.CancelScope(shield=True):
            await abandon(stream)


def log_unforeseen(error: Exception) -> None:
    """Log a bug that concerns one connection alone."""
    fields = about("unforeseen", reason=type(error).__name__)
    line = "a connection failed in an unforeseen way"
    _log_limiter.log("unforeseen", line, level=logging.ERROR, error=error, about=fields)


def address_of(name: Callable[[], tuple[Any, ...]]) -> Address | None:
    """The address that `getpeername` or `getsockname` of a socket returns; None if the peer has already closed it."""
    try:
        return Address.of_socket(name())
    except OSError:
        return None
