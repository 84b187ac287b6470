"""A line between gateway and relay that carries little at a time, over real sockets. It counts what it carries."""

from __future__ import annotations

import socket
from typing import Final, NoReturn, final

import trio

from pioneer_tunnel._model.addresses import Address

__all__ = ["SlowLine"]

CHUNK: Final = 4 * 1024
BUFFER: Final = 16 * 1024


@final
class SlowLine:
    """Carries bytes to `target`, at full speed, and those from the gateway in chunks of 4 KiB with a pause after each.

    Attributes:
        carried: bytes from the gateway so far.
        pause: seconds.
    """

    def __init__(self, target: Address, *, pause: float = 0.002) -> None:
        self.carried: int = 0
        self.pause: float = pause
        self._target: Final = target
        self._port = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> NoReturn:
        listening = trio.socket.socket()
        # Accepted connections inherit it: little waits in the kernel.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        await listening.bind(("127.0.0.1", 0))
        listening.listen()
        self._port = listening.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [trio.SocketListener(listening)])
        raise AssertionError

    async def dial(self, _host: str, _port: int) -> trio.SocketStream:
        """The dialer of gateways."""
        return await trio.open_tcp_stream("127.0.0.1", self._port)

    async def _serve(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._target.port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._carry_slowly, near, far)
            async for data in far:
                await near.send_all(data)
            nursery.cancel_scope.cancel()

    async def _carry_slowly(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        while data := await near.receive_some(CHUNK):
            await far.send_all(data)
            self.carried += len(data)
            await trio.sleep(self.pause)
