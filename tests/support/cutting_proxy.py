"""A TCP proxy on loopback whose connections break after so many bytes, for tests of links that survive it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, final

import trio

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._net.closing import abandon

PIECE: Final = 64 * 1024


@final
class CuttingProxy:
    """Passes connections on, and cuts each one.

    Args:
        connect: connects to what is behind.
        bytes_until_cut: called for each connection; returns how many bytes it carries, both directions together.

    Attributes:
        connections: how many there were.
        open: whether new connections are accepted; otherwise they are reset.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[trio.SocketStream]], bytes_until_cut: Callable[[], float]
    ) -> None:
        self.connections = 0
        self.open = True
        self._connect: Final = connect
        self._bytes_until_cut: Final = bytes_until_cut
        self._current: trio.CancelScope | None = None
        self._port = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])
        raise AssertionError

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        """The dialer of a gateway."""
        return await trio.open_tcp_stream("127.0.0.1", self._port)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address("127.0.0.1", self._port)

    def cut(self) -> None:
        """Cut the latest connection now."""
        if self._current is not None:
            self._current.cancel()

    async def _serve(self, near: trio.SocketStream) -> None:
        if not self.open:
            await abandon(near)
            return
        self.connections += 1
        far = await self._connect()
        left = self._bytes_until_cut()

        async def carry(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            nonlocal left
            try:
                while data := await source.receive_some(PIECE):
                    await sink.send_all(data[: int(min(left, len(data)))])
                    left -= len(data)
                    if left <= 0:
                        break
                else:
                    await sink.send_eof()
                    return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            scope.cancel()

        try:
            with trio.CancelScope() as scope:
                self._current = scope
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(carry, near, far)
                    nursery.start_soon(carry, far, near)
        finally:
            await abandon(near)
            await abandon(far)
