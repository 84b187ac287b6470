"""Name resolution of a test's own, for all that resolves by Trio."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import trio


@final
class Resolver(trio.abc.HostnameResolver):
    """Every name has these addresses, in this order, `after` so many seconds. Without one, no answer comes.

    Attributes:
        asked: the names that were resolved.
    """

    def __init__(self, *addresses: str, after: float = 0) -> None:
        self.asked: list[str] = []
        self._addresses = addresses
        self._after = after

    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> list[Any]:
        self.asked.append(host.decode() if isinstance(host, bytes) else host)
        await (trio.sleep(self._after) if self._addresses else trio.sleep_forever())
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, int(port), 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port)))
            for address in self._addresses
        ]

    async def getnameinfo(self, *_: Any) -> tuple[str, str]:
        raise NotImplementedError


@contextmanager
def resolving(*addresses: str, after: float = 0) -> Iterator[Resolver]:
    resolver = Resolver(*addresses, after=after)
    before = trio.socket.set_custom_hostname_resolver(resolver)
    try:
        yield resolver
    finally:
        trio.socket.set_custom_hostname_resolver(before)
