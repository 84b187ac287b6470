"""TLS as a leg over the leg of its connection: records are decrypted and encrypted in the callbacks of that one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio

from ..._model.callbacks import nothing
from ..fastpath.event_loop import Reactor
from ..leg import Bytes, Leg

if TYPE_CHECKING:
    from .stream import TlsStream

__all__ = ["TlsLeg"]

_WIRE_SIZE: Final = 64 * 1024
_RECORD_OVERHEAD: Final = 64
"""Bytes of a record beside its content, at the most."""


@final
class TlsLeg(Leg):
    """A TLS stream in an exchange.

    Args:
        stream: its handshake is over.
        below: the leg of its connection.
        half_close: False if `send_eof` ends both directions, as `TlsServerStream.send_eof` does.
    """

    __slots__ = ("_below", "_ended", "_half_close", "_stream")

    def __init__(self, stream: TlsStream, below: Leg, *, half_close: bool) -> None:
        super().__init__()
        self._stream: Final = stream
        self._below: Final = below
        self._half_close: Final = half_close
        self._ended = False
        if below.prefix:
            stream.take_received(below.prefix)
            below.prefix = b""

    def attach(self) -> None:
        self._below.on_readable, self._below.on_writable = self._on_below_readable, self._on_below_writable
        self._below.attach()

    def detach(self) -> None:
        self._forget()
        self._below.detach()

    def close(self) -> bool:
        if not (self._stream.end_sent and self._below.sent):
            return False  # a close_notify has to be sent, and to wait for
        self._forget()
        return self._below.close()

    def _forget(self) -> None:
        self._below.on_readable = self._below.on_writable = nothing

    def receive(self, max_bytes: int) -> bytes | None:
        stream, below = self._stream, self._below
        if self._ended:
            raise trio.ClosedResourceError("send_eof has ended both directions")
        while True:
            data = stream.take_decrypted(max_bytes)
            if data or stream.end_received:
                return data
            self._reply()
            received = below.receive(min(max_bytes + _RECORD_OVERHEAD, _WIRE_SIZE))
            if received is None:
                return None
            stream.take_received(received)

    @property
    def drained(self) -> bool:
        return self._below.drained and not self._stream.has_more

    def _reply(self) -> None:
        """Send OpenSSL's replies to what was read, if the connection takes something now."""
        if self._stream.owes_reply and self._below.room:
            self._send_outgoing()

    def send(self, data: Bytes) -> bool:
        if self._stream.end_sent:
            raise trio.ClosedResourceError("this stream has sent its end")
        self._stream.encrypt(data)
        self._send_outgoing()
        return self._below.sent

    def _send_outgoing(self) -> None:
        while data := self._stream.take_outgoing():
            self._below.send(data)

    @property
    def room(self) -> int:
        return self._below.room

    @property
    def sent(self) -> bool:
        return self._below.sent

    @property
    def broken(self) -> bool:
        return self._below.broken

    @property
    def can_half_close(self) -> bool:
        return self._half_close

    def lend(self, amount: int) -> None:
        self._below.lend(amount)

    def send_eof(self) -> None:
        if self._stream.end_sent:
            return
        ends_connection = self._stream.begin_end()
        self._send_outgoing()
        if ends_connection and self._below.can_half_close:
            self._below.send_eof()
        if not self._half_close:
            self._ended = True
            Reactor.current().queue(self._on_ended)

    def _on_ended(self) -> int:
        self.on_readable()
        return 0

    def _on_below_readable(self) -> None:
        self.on_readable()

    def _on_below_writable(self) -> None:
        self.refusal = self.refusal or self._below.refusal
        if self.refusal is None and self._stream.owes_reply:
            try:
                self._reply()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.refusal = error
        self.on_writable()
