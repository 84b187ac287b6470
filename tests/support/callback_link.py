"""A yamux link in memory that calls back, as one over a plain socket does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, final

import trio

from pioneer_tunnel._net.fastpath.event_loop import Reactor
from pioneer_tunnel._net.link import Bytes, Link


@final
class CallbackLink(Link):
    """What a test gives it comes piece by piece; what yamux sends is written down.

    Attributes:
        sent: everything that was sent.
        takes: how many bytes the next `send_nowait` takes; the rest waits for `send`.
        pieces: what has come and was not received.
        broken: whether the link breaks after that.
    """

    def __init__(self) -> None:
        self.sent: Final = bytearray()
        self.takes: float = float("inf")
        self.pieces: Final[deque[bytes]] = deque()
        self.broken = False
        self._rest = b""
        self._closed: Final = trio.Event()
        self._on_readable: Callable[[], object] | None = None

    @property
    def last_received(self) -> float:
        return trio.current_time()

    @property
    def sending_since(self) -> float | None:
        return None

    def come(self, *pieces: bytes) -> None:
        self.pieces.extend(pieces)
        self.report()

    def report(self) -> None:
        """What an edge does."""

        def call() -> int:
            if self._on_readable is not None:
                self._on_readable()
            return 0

        Reactor.current().queue(call)

    @property
    def watched(self) -> bool:
        return self._on_readable is not None

    def watch(self, on_readable: Callable[[], object]) -> bool:
        self._on_readable = on_readable
        return True

    def unwatch(self) -> None:
        self._on_readable = None

    def receive_nowait(self) -> Sequence[Bytes] | None:
        if self.broken and not self.pieces:
            raise trio.BrokenResourceError("the connection is broken")
        return [self.pieces.popleft()] if self.pieces else None

    async def receive(self) -> Sequence[Bytes]:
        raise AssertionError("it calls back")

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        data = self._rest + b"".join(chunks)
        taken = int(min(self.takes, len(data)))
        self.sent.extend(data[:taken])
        self._rest = data[taken:]
        return not self._rest

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.extend(b"".join((self._rest, *chunks)))
        self._rest = b""

    async def aclose(self) -> None:
        self._closed.set()
        await trio.lowlevel.checkpoint()
