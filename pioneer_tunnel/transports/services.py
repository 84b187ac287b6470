"""The services that a gateway offers over one tunnel. A host adds and removes them while the tunnel is up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Final, final

import trio

from .._model.addresses import LocalAddress, local_address
from .._model.services import FIRST_SERVICE, MOST_SERVICES, SERVICE_NAMES, is_service_name

__all__ = ["Services"]


@final
class Services(MutableMapping[str, LocalAddress]):
    """Names of services, and where each of them listens on this host.

        services = Services({"web": "127.0.0.1:8000", "ssh": "127.0.0.1:22"})
        async with open_tunnel(relay, key=key, services=services) as tunnel:
            ...  # a handler calls `forward(stream, services)`
            services["grafana"] = "127.0.0.1:3000"
            del services["ssh"]

    The relay sends visitors of these services alone, and learns of a change at once. Visitors who are connected stay
    connected. Iteration is in the order in which the services were added.

    It may be changed from any thread.

    Args:
        services: by name, an address or the text of one, see `forward`. A name is what the relay's operator chose: 1 to
            63 lower-case letters, digits, `-`, `_` and `.`. The empty name stands for the tunnel's first service,
            whatever its name is.

    Raises:
        ValueError: a name or an address is not valid, or there are more than 64.
    """

    def __init__(self, services: Mapping[str, str | LocalAddress] | None = None) -> None:
        self._services: dict[str, LocalAddress] = {}
        self._watchers: Final[dict[trio.Event, trio.lowlevel.TrioToken]] = {}
        for name, address in (services or {}).items():
            self[name] = address

    def __getitem__(self, name: str) -> LocalAddress:
        return self._services[name]

    def __setitem__(self, name: str, address: str | LocalAddress) -> None:
        if name != FIRST_SERVICE and not is_service_name(name):
            raise ValueError(f"the service {name!r}: allowed are {SERVICE_NAMES}")
        changed = self._services | {name: local_address(address)}
        if len(changed) > MOST_SERVICES:
            raise ValueError(f"a tunnel has {MOST_SERVICES} services at most")
        self._change(changed)

    def __delitem__(self, name: str) -> None:
        changed = {**self._services}
        del changed[name]
        self._change(changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._services)

    def __len__(self) -> int:
        return len(self._services)

    def _change(self, services: dict[str, LocalAddress]) -> None:
        # Replaced as a whole, so that a reader in another thread sees the old state or the new one.
        self._services = services
        for changed, token in [*self._watchers.items()]:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(changed.set)

    @property
    def names(self) -> frozenset[str]:
        """The names now."""
        return frozenset(self._services)

    async def wait_changed(self, names: frozenset[str]) -> frozenset[str]:
        """Wait until the names are others than `names`, and return them. No deadline: most never change."""
        while True:
            changed = trio.Event()
            self._watchers[changed] = trio.lowlevel.current_trio_token()
            try:
                if self.names != names:
                    return self.names
                await changed.wait()
            finally:
                del self._watchers[changed]

    def __repr__(self) -> str:
        return f"Services({dict(zip(self._services, map(str, self._services.values()), strict=True))})"
