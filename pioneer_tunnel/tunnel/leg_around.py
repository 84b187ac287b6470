"""A leg around another one, which passes everything on. A subclass overrides what it sees or changes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from .._model.callbacks import nothing
from .._net.leg import Bytes, Leg

__all__ = ["LegAround"]


class LegAround(Leg):
    """Passes everything on but `move_bulk`, which would move bytes past it.

    Args:
        leg: the leg inside.
    """

    def __init__(self, leg: Leg) -> None:
        super().__init__()
        self._leg: Final = leg

    @property
    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._leg.tasks

    def attach(self) -> None:
        self._leg.on_readable, self._leg.on_writable = self._on_leg_readable, self._on_leg_writable
        self._leg.attach()

    def detach(self) -> None:
        self._leg.detach()
        self._leg.on_readable = self._leg.on_writable = nothing

    def close(self) -> bool:
        closed = self._leg.close()
        self._leg.on_readable = self._leg.on_writable = nothing
        return closed

    def _on_leg_readable(self) -> None:
        self.on_readable()

    def _on_leg_writable(self) -> None:
        self.refusal = self.refusal or self._leg.refusal
        self.on_writable()

    def receive(self, max_bytes: int) -> Bytes | None:
        return self._leg.receive(max_bytes)

    def send(self, data: Bytes) -> bool:
        return self._leg.send(data)

    @property
    def drained(self) -> bool:
        return self._leg.drained

    @property
    def held(self) -> int:
        return self._leg.held

    @property
    def room(self) -> int:
        return self._leg.room

    @property
    def sent(self) -> bool:
        return self._leg.sent

    @property
    def broken(self) -> bool:
        return self._leg.broken

    @property
    def can_half_close(self) -> bool:
        return self._leg.can_half_close

    def lend(self, amount: int) -> None:
        self._leg.lend(amount)

    def send_eof(self) -> None:
        self._leg.send_eof()
