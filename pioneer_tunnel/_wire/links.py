"""The extension `links`: a gateway keeps several sessions of its tunnel at one relay.

    relay    {"most": N}               how many at most
    gateway  {"index": I, "of": N}     which one of how many this is, from 0
    relay    {}

Sessions of one gateway (`instance`) with the same `of` and different indexes stand side by side. Without the extension
the newest session of a tunnel replaces the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import attrs

from .._model.errors import RemoteProtocolError
from .messages import Choose, Message

__all__ = ["LINKS", "MOST_LINKS", "LinkPlace", "choose_links", "link_place", "offer_links"]

LINKS: Final = "links"
"""Its name."""

MOST_LINKS: Final = 8
"""Links that a gateway keeps at most."""


@final
@attrs.frozen
class LinkPlace:
    """Which of a gateway's links this is.

    Attributes:
        index: from 0.
        of: how many there are.
    """

    index: int
    of: int


def offer_links() -> Mapping[str, Any]:
    """What a relay says in the challenge."""
    return {"most": MOST_LINKS}


def choose_links(place: LinkPlace) -> Choose:
    """How a gateway chooses that has several links."""

    def choose(offered: Message) -> Mapping[str, Any] | None:
        return attrs.asdict(place) if place.of <= offered.whole_number("most") else None

    return choose


def link_place(chosen: Mapping[str, Message]) -> LinkPlace | None:
    """Which link of a gateway this is; None if it is the only one.

    Args:
        chosen: the extensions that the gateway chooses.

    Raises:
        RemoteProtocolError: the gateway's words are malformed.
    """
    if LINKS not in chosen:
        return None
    place = LinkPlace(chosen[LINKS].whole_number("index"), chosen[LINKS].whole_number("of"))
    if not 0 <= place.index < place.of <= MOST_LINKS:
        raise RemoteProtocolError(f"'index' is {place.index} and 'of' is {place.of}, of {MOST_LINKS} links at most")
    return place
