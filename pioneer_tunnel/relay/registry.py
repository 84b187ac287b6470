"""Which tunnels there are (`Registry`), and where each is connected right now (`Directory`).

Both are asked, never reached into, and both may take time to answer: in a fleet of relays they are services. What
stands here is what a single relay needs, in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol, final

import trio

from .config import TunnelEntry

__all__ = ["Directory", "LiveSession", "LocalDirectory", "LocalRegistry", "Registry"]


class Registry(Protocol):
    """The tunnels that a relay serves."""

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        """The tunnel that the key `key_id` belongs to."""

    async def by_host(self, host: str) -> TunnelEntry | None:
        """The tunnel that visitors of `host` want: lower-case, without port or trailing dot."""


class LiveSession(Protocol):
    """A gateway that is connected."""

    @property
    def instance(self) -> str:
        """What tells it from another gateway with the same key; empty if it told nothing."""

    async def open_stream(self) -> trio.abc.HalfCloseableStream:
        """Open a stream to it. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the session is gone, or takes no more streams.
        """

    def replace(self, by: str) -> None:
        """The instance `by` takes over: say so and end. Does not wait."""


class Directory(Protocol):
    """Where each tunnel is connected. At any moment a tunnel has one session at the most."""

    async def enter(self, tunnel_id: str, session: LiveSession) -> None:
        """Make `session` the one of this tunnel; the one before it, if any, is replaced."""

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        """Forget `session`; nothing happens when another has taken its place."""

    async def find(self, tunnel_id: str) -> LiveSession | None:
        """The session of a tunnel, None while its gateway is not connected."""


@final
class LocalRegistry(Registry):
    """The tunnels of one configuration."""

    def __init__(self, tunnels: Iterable[TunnelEntry]) -> None:
        entries = tuple(tunnels)
        self._by_key_id: Final = {entry.key.key_id: entry for entry in entries}
        self._by_host: Final = {entry.url.host: entry for entry in entries if entry.bind_addr is None}

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        return self._by_key_id.get(key_id)

    async def by_host(self, host: str) -> TunnelEntry | None:
        return self._by_host.get(host)


@final
class LocalDirectory(Directory):
    """The sessions of one process."""

    def __init__(self) -> None:
        self._sessions: Final[dict[str, LiveSession]] = {}

    async def enter(self, tunnel_id: str, session: LiveSession) -> None:
        before = self._sessions.get(tunnel_id)
        self._sessions[tunnel_id] = session
        if before is not None:
            before.replace(session.instance)

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        if self._sessions.get(tunnel_id) is session:
            del self._sessions[tunnel_id]

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return self._sessions.get(tunnel_id)
