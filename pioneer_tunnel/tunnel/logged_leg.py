"""A leg that passes everything on, and shows it to the access log."""

from __future__ import annotations

from typing import Final, final

from .._net.leg import Bytes, Leg
from ..access_log.watching import Watch
from .leg_around import LegAround

__all__ = ["LoggedLeg"]


@final
class LoggedLeg(LegAround):
    """The visitor's side of an exchange.

    Args:
        leg: the visitor's stream.
        watch: sees the bytes.
    """

    def __init__(self, leg: Leg, watch: Watch) -> None:
        super().__init__(leg)
        self._watch: Final = watch
        self.prefix, leg.prefix = leg.prefix, b""
        watch.from_visitor(self.prefix)

    def receive(self, max_bytes: int) -> Bytes | None:
        data = super().receive(min(max_bytes, self._watch.read_size))
        if data:
            self._watch.from_visitor(bytes(data))
        return data

    def send(self, data: Bytes) -> bool:
        sent = super().send(data)
        self._watch.to_visitor(bytes(data))
        return sent
