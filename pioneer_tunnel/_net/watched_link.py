"""What a link knows of the connection below it: the same for every link over one connection."""

from __future__ import annotations

from typing import Final

from .adopted import Watched
from .delivery import Delivery
from .link import Link

__all__ = ["WatchedLink"]


class WatchedLink(Link):
    """A `Link` over one connection, which a `Watched` stream watches.

    Args:
        watched: the stream that records when bytes move, below everything else.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched: Final = watched

    @property
    def last_received(self) -> float:
        return self._watched.last_received

    @property
    def sending_since(self) -> float | None:
        return self._watched.sending_since

    def delivery(self) -> Delivery | None:
        return self._watched.delivery()

    def outlast(self, seconds: float) -> None:
        self._watched.outlast(seconds)

    @property
    def window_left(self) -> int:
        return self._watched.window_left

    def expect_bulk(self) -> None:
        self._watched.expect_bulk()

    def limit_unsent(self, limit: int) -> None:
        self._watched.limit_unsent(limit)

    @property
    def has_room(self) -> bool:
        return self._watched.has_room

    async def wait_room(self) -> None:
        await self._watched.wait_room()
