"""Which relay each link of a tunnel dials. Decisions, without I/O and without a clock.

Links are spread over the relays evenly. A link goes to another relay when an attempt has failed, and to the one that
has failed the longest time ago. Two links dial one relay only if its sessions stand side by side (the extension
`links`), as a session there has shown: otherwise the newest session would end the others again and again. Such a link
has no relay for now.

A relay that has rejected the gateway comes last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final, final

from .._model.addresses import RelayAddress

__all__ = ["RelayChoice"]


@final
class RelayChoice:
    """The relays of one generation.

    Args:
        relays: their addresses, the preferred ones first.
        links: how many links there are.
    """

    def __init__(self, relays: Sequence[RelayAddress], links: int) -> None:
        self._relays: Final = tuple(dict.fromkeys(relays))
        self._links: Final = links
        self._of_link: Final[dict[int, RelayAddress]] = {}
        self._shared: Final[set[RelayAddress]] = set()  # where sessions stand side by side
        self._same: Final[dict[RelayAddress, RelayAddress]] = {}  # other addresses of a relay, by address
        self._was_up: Final[set[RelayAddress]] = set()
        self._failed: Final[dict[RelayAddress, int]] = {}  # in the order of failure
        self._rejected: Final[set[RelayAddress]] = set()
        self._clock: Final = itertools.count(1)

    def choose(self, link: int) -> RelayAddress | None:
        """The relay that a link dials next, which is its own until it chooses again; None if there is none for it."""
        own = self._of_link.pop(link, self._relays[link % len(self._relays)])
        candidates = self._open_to(link)
        if not candidates:
            return None
        chosen = min(
            candidates,
            key=lambda relay: (
                relay in self._rejected,
                self._failed.get(relay, 0),
                len(self._others_at(relay, link)),
                relay != own,
            ),
        )
        self._of_link[link] = chosen
        return chosen

    def is_only(self, link: int) -> bool:
        """Whether all relays that are open to a link have rejected the gateway."""
        return self._rejected.issuperset(self._open_to(link))

    def note_up(self, link: int, *, beside_others: bool) -> None:
        """A link is up. `beside_others` is what its session says."""
        relay = self._of_link[link]
        self._was_up.add(relay)
        self._failed.pop(relay, None)
        self._rejected.discard(relay)
        if beside_others:
            self._shared.add(relay)
        else:
            self._shared.discard(relay)

    def was_up(self, link: int) -> bool:
        """Whether any link was up at the relay of this link."""
        return self._of_link[link] in self._was_up

    def note_failed(self, link: int, *, rejected: bool = False) -> None:
        """An attempt of a link has failed. `rejected`: the relay rejects the gateway."""
        relay = self._of_link[link]
        self._failed[relay] = next(self._clock)
        if rejected:
            self._rejected.add(relay)

    def note_same(self, link: int, other: int) -> None:
        """The relay keeps only the newest of two links, whatever their addresses are: it is one relay."""
        one, another = self._relay_at(self._of_link[link]), self._relay_at(self._of_link[other])
        for relay in self._relays:
            if self._relay_at(relay) == one:
                self._same[relay] = another
        self._shared.difference_update({one, another})

    def _relay_at(self, address: RelayAddress) -> RelayAddress:
        """The same for all addresses that lead to one relay."""
        return self._same.get(address, address)

    def _others_at(self, address: RelayAddress, link: int) -> list[int]:
        relay = self._relay_at(address)
        return [other for other, at in self._of_link.items() if other != link and self._relay_at(at) == relay]

    def _open_to(self, link: int) -> list[RelayAddress]:
        most = math.ceil(self._links / len({self._relay_at(relay) for relay in self._relays}))
        return [
            relay
            for relay in self._relays
            if (others := len(self._others_at(relay, link))) == 0 or (others < most and relay in self._shared)
        ]
