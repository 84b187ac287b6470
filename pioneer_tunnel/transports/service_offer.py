"""The services of a gateway in one session of the native protocol: what it has told the relay, and what it takes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, final

from .._model.log_fields import about
from .._model.services import FIRST_SERVICE
from .._net.log_limiter import LogLimiter
from .._wire import services as wire
from .._wire.handshake import Welcome
from .._wire.messages import Choose, Message
from .._wire.proxy_v2 import ProxyHeader
from .services import Services

__all__ = ["ServiceOffer"]

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.transports.native"))


@final
class ServiceOffer:
    """What a gateway offers in one session.

    Args:
        services: its services; None for a gateway that takes visitors of the tunnel's first service alone.

    Attributes:
        addresses: where visitors reach the services that it offers; None unless the relay knows services.
    """

    def __init__(self, services: Services | None) -> None:
        self._services: Final = services
        self._told: frozenset[str] = frozenset()
        self._located: wire.Located | None = None

    @property
    def choices(self) -> Mapping[str, Choose]:
        """For the handshake."""
        return {} if self._services is None else {wire.SERVICES: self._choose}

    def _choose(self, _offer: Message) -> Mapping[str, Any]:
        assert self._services is not None
        self._told = self._services.names
        return {"serves": sorted(self._told)}

    def accepted(self, welcome: Welcome) -> None:
        """Note what the relay says of services.

        Raises:
            RemoteProtocolError: it says that wrongly.
        """
        confirmed = welcome.extensions.get(wire.SERVICES)
        if confirmed is not None:
            self._note(wire.located(confirmed))

    def take(self, text: str) -> bool:
        """Take a text of the relay, if it says where visitors reach the services now. Raises as `accepted`."""
        if self._located is None or (message := Message.parse(text)).type != wire.SERVICES:
            return False
        self._note(wire.located(message))
        return True

    def _note(self, located: wire.Located) -> None:
        self._located = located
        for name, why in located.refused.items():
            line = f"the relay sends no visitors of the service {name!r}: {why}"
            _log_limiter.log((name, why), line, about=about("service_refused", service=name, reason=why))

    @property
    def addresses(self) -> Mapping[str, str] | None:
        if self._located is None:
            return None
        of_relay = self._located.addresses
        first = next(iter(of_relay), None)
        told = self._told
        return {
            name: address
            for name, address in of_relay.items()
            if name in told or (name == first and FIRST_SERVICE in told)
        }

    def takes(self, header: ProxyHeader) -> bool:
        """Whether a visitor with this header may be delivered."""
        if self._services is None or self._located is None:
            return header.service is None
        return (header.service or FIRST_SERVICE) in self._services

    async def keep_told(self, send: Callable[[str], Awaitable[None]], on_change: Callable[[], None]) -> NoReturn:
        """Tell the relay of each change. To be started once the relay is known to know services."""
        assert self._services is not None
        told = self._told  # here; a handshake that fails sets the attribute, too
        while True:
            told = self._told = await self._services.wait_changed(told)
            await send(wire.serves_text(told))
            on_change()
