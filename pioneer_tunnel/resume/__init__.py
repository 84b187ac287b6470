"""A link that outlives its connection: both ends count its bytes and keep what the peer has not reported yet."""

from __future__ import annotations

from .link import Carrier, Loss, ResumableLink
from .tail import DEFAULT_WINDOW, Tail

__all__ = ["DEFAULT_WINDOW", "Carrier", "Loss", "ResumableLink", "Tail"]
