"""What several processes of one relay let each other know: names below wildcards, certificates, answers to authorities.

The files are the truth. A message says that something in them has changed, and is awaited until the others know it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from .names import NameBook

if TYPE_CHECKING:
    from ..certificates.keeper import AcmeCertificates

__all__ = ["Announce", "Sharing"]

Announce: TypeAlias = Callable[[Any], Awaitable[object]]
"""Sends a message, of what JSON can hold, to the other processes. Returns when they have it, or are stuck."""

_NAMES: Final = "names"
_ACME: Final = "acme"


@final
class Sharing:
    """What a process lets the others know, and what it does when others do.

    Args:
        announce: sends a message to the others.
        names: the names below wildcards; None if they are kept elsewhere.
        acme: the certificates that are ordered; None if there are none.
    """

    def __init__(self, announce: Announce, names: NameBook | None, acme: AcmeCertificates | None) -> None:
        self._announce: Final = announce
        self._names: Final = names
        self._acme: Final = acme
        if names is not None:
            names.let_others_know = self._tell_of_names
        if acme is not None:
            acme.let_others_know = self._tell_of_certificates

    async def hear(self, message: Any) -> None:
        """Another process has announced this."""
        match message:
            case {"about": "names"} if self._names is not None:
                await self._names.read_again()
            case {"about": "acme", "what": what, "told": told} if self._acme is not None:
                await self._acme.hear(what, told)

    async def _tell_of_names(self) -> None:
        await self._announce({"about": _NAMES})

    async def _tell_of_certificates(self, what: str, told: Any) -> None:
        await self._announce({"about": _ACME, "what": what, "told": told})
