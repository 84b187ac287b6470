"""Framing by the package `websockets`: its public sans-I/O classes, with masking in C. No I/O."""

from __future__ import annotations

from typing import Final, final

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.speedups import apply_mask

from .._net.link import Bytes
from .framing import Framing

__all__ = ["WebsocketsFraming"]

_FED_AT_ONCE: Final = 64 * 1024
"""Bytes that the protocol gets at once. With 256 KiB it takes three times as long for each byte."""


@final
class WebsocketsFraming(Framing):
    """See `Framing`. It has the opening, too.

    Attributes:
        request: the client's request, once it has come; without its headers after `accept`.
        date: the `Date` header of the server's response, as it was sent.
    """

    apply_mask = staticmethod(apply_mask)

    def __init__(self, protocol: ClientProtocol | ServerProtocol) -> None:
        super().__init__(is_client=isinstance(protocol, ClientProtocol))
        self.request: Request | None = None
        self.date: str | None = None
        self._protocol: Final = protocol
        self._in_text = False  # whether the current message is text

    def send_text(self, text: str) -> None:
        self._protocol.send_text(text.encode())
        self.update()

    def close(self, code: int, reason: str) -> None:
        self._protocol.send_close(code, reason)
        self.update()

    def receive_eof(self) -> None:
        self._protocol.receive_eof()
        self.update()

    def update(self) -> None:
        """Take what the protocol has queued. To be called after each call of the protocol that is not made here."""
        self.writes += filter(None, self._protocol.data_to_send())  # an empty one means the end of the connection
        self.is_open = self._protocol.state is State.OPEN

    def _parse(self, data: Bytes) -> None:
        protocol = self._protocol
        for start in range(0, len(data), _FED_AT_ONCE):
            # The protocol copies it, so the buffer can be reused.
            protocol.receive_data(data[start : start + _FED_AT_ONCE])  # type: ignore[arg-type]  # any buffer
        self.update()
        for event in protocol.events_received():
            if isinstance(event, Frame):
                self._take_frame(event)
            elif isinstance(event, Request):
                self.request = event
            elif isinstance(event, Response):
                self.date = event.headers.get("Date")
        if protocol.parser_exc is not None:
            sent = protocol.close_sent
            self.fail(1002 if sent is None else sent.code, str(protocol.parser_exc))

    def _take_frame(self, frame: Frame) -> None:
        match frame.opcode:
            case Opcode.TEXT | Opcode.BINARY | Opcode.CONT:
                if frame.opcode is not Opcode.CONT:
                    self._in_text = frame.opcode is Opcode.TEXT
                self._take(frame.data, is_text=self._in_text, ends_frame=True, ends_message=frame.fin)
            case Opcode.CLOSE:
                close = self._protocol.close_rcvd
                assert close is not None
                self.fail(close.code, close.reason)
