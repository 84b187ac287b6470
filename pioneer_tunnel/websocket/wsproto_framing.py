"""Framing by wsproto, the library without I/O that `trio-websocket` is built on. No I/O."""

from __future__ import annotations

from typing import Final, final

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.frame_protocol import XorMaskerSimple

from .._net.link import Bytes
from .framing import Framing

__all__ = ["WsprotoFraming"]


@final
class WsprotoFraming(Framing):
    """See `Framing`. It has no part in the opening: what it receives before `open` is dropped."""

    def __init__(self, *, is_client: bool) -> None:
        super().__init__(is_client=is_client)
        self._connection: Final = Connection(ConnectionType.CLIENT if is_client else ConnectionType.SERVER)
        self._in_opening = True

    @staticmethod
    def apply_mask(data: Bytes, key: bytes, /) -> Bytes:
        return XorMaskerSimple(key).process(data)  # type: ignore[arg-type]  # it copies any buffer

    def open(self) -> None:
        """The opening is over."""
        self._in_opening = False
        self.is_open = True

    def send_text(self, text: str) -> None:
        self._send(TextMessage(data=text))

    def close(self, code: int, reason: str) -> None:
        self._send(CloseConnection(code=code, reason=reason))

    def _send(self, event: Event) -> None:
        self.writes.append(self._connection.send(event))
        self.is_open = self._connection.state is ConnectionState.OPEN

    def _parse(self, data: Bytes) -> None:
        if self._in_opening:
            return
        self._connection.receive_data(data)  # type: ignore[arg-type]  # it copies any buffer
        for event in self._connection.events():
            match event:
                case TextMessage():
                    self._take_piece(event, event.data.encode())
                case BytesMessage():
                    self._take_piece(event, event.data)
                case Ping() if self.is_open:
                    self._send(event.response())
                case CloseConnection():
                    if self._connection.state is ConnectionState.REMOTE_CLOSING:
                        self._send(event.response())
                    # Otherwise the peer has answered our close frame, or has broken the protocol: `fail` knows which.
                    self.fail(event.code, event.reason or "")

    def _take_piece(self, event: TextMessage | BytesMessage, payload: Bytes) -> None:
        self._take(
            payload,
            is_text=isinstance(event, TextMessage),
            ends_frame=event.frame_finished,
            ends_message=event.message_finished,
        )
