"""A session at another node, as visitors of this one use it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, final

import trio

from ..._model.callbacks import nothing
from ..._net.streams import ByteStream
from ..._wire.links import LinkPlace
from ..gateways.registry import Holder
from .peers import Peers
from .records import Holding

__all__ = ["RemoteSession"]


@final
class RemoteSession(Holder):
    """The holder of a tunnel that is at another node. Equal to others for the same session.

    Args:
        tunnel_id: its tunnel.
        holding: the session.
        peers: reach its node.
        on_gone: called with the holding, when its node cannot be reached or does not have the session.

    `services` is what the gateway takes since the last `open_stream`; None before it.
    """

    def __init__(
        self, tunnel_id: str, holding: Holding, peers: Peers, on_gone: Callable[[Holding], object] = nothing
    ) -> None:
        self.tunnel_id: Final = tunnel_id
        self.holding: Final = holding
        self._peers: Final = peers
        self._on_gone: Final = on_gone
        self._services: Collection[str] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteSession) and other.holding.session == self.holding.session

    def __hash__(self) -> int:
        return hash(self.holding.session)

    @property
    def instance(self) -> str:
        return self.holding.instance

    @property
    def key_id(self) -> str:
        return self.holding.key_id

    @property
    def place(self) -> LinkPlace | None:
        return self.holding.place

    @property
    def since(self) -> float:
        return self.holding.since

    @property
    def services(self) -> Collection[str] | None:
        return self._services

    async def open_stream(self) -> ByteStream:
        try:
            hop = await self._peers.open_stream(self.tunnel_id, self.holding)
        except trio.BrokenResourceError:
            self._on_gone(self.holding)
            raise
        self._services = hop.services
        return hop.stream
