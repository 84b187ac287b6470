"""A yamux stream as a leg: the driver calls back when frames arrive, and when there is room for more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from .._net.leg import LARGEST_READ, Bytes, Leg

if TYPE_CHECKING:
    from .driver import Driver
    from .stream import YamuxStream
    from .stream_state import Stream

__all__ = ["StreamLeg"]


@final
class StreamLeg(Leg):
    """A stream in an exchange. The session queues what is sent, so `close` takes no time."""

    __slots__ = ("_driver", "_session", "_state", "_stream")

    smallest_read = LARGEST_READ  # a read returns what has come, and allocates no more

    def __init__(self, stream: YamuxStream, state: Stream, driver: Driver) -> None:
        super().__init__()
        self._driver: Final = driver
        self._session: Final = driver.session
        self._stream: Final = stream
        self._state: Final = state

    def attach(self) -> None:
        self._stream.attach(self)

    def detach(self) -> None:
        self._stream.detach()

    def receive(self, max_bytes: int) -> bytes | None:
        state, driver = self._state, self._driver
        if state.lent:
            state.lend(0)
        if state.receive_queue:
            now = driver.turn.started
            data = self._session.read(state, max_bytes, driver.turn.now() if now is None else now, lend=False)
            if state.control_queued:  # it grants credit
                driver.wake_writer()
            return data
        return self._stream.receive_end()

    @property
    def drained(self) -> bool:
        # Once the peer's FIN, its reset or the end of the connection has come, no event announces it again.
        state = self._state
        return not state.receive_queue and state.may_receive and self._driver.failure is None

    def send(self, data: Bytes) -> bool:
        if self._session.send_early(self._state, data):
            self._driver.wake_writer()
        else:
            self._stream.put(data)
        return True

    @property
    def room(self) -> int:
        room = self._state.room
        self._state.writer_waits = not room
        return room

    @property
    def broken(self) -> bool:
        return not self._stream.usable

    def lend(self, amount: int) -> None:
        self._state.lend(amount)

    def send_eof(self) -> None:
        if self._session.send_fin_early(self._state):
            self._driver.wake_writer()
        else:
            self._stream.put_eof()

    def close(self) -> bool:
        self.detach()
        self._stream.close_soon()
        return True
