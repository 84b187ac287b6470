"""The rules when a second gateway wants a tunnel. A decision, without I/O and without a clock.

A tunnel has one gateway at a time, with a session for each of its links: the holders. When a newcomer has proved a key
of the same tunnel, the verdict about each holder depends on both keys, on both instances, on their links, and on the
operator's `takeover`:

    the newcomer's key         its instance       verdict
    the same                   the same           BESIDE if it is another link of the same gateway; else
                                                  REPLACE: the gateway has reconnected; the holder is its dead session
    the same                   another, or none   REPLACE with `newest`, ASK with `first`
    a later one of `keys`      any                RETIRE: the key is being rotated
    an earlier one             any                ASK: a rotation does not go back while the newer key is in use

ASK pings the holder. If it answers, it keeps the tunnel, and the newcomer learns who has it. So two hosts do not take
the tunnel from each other in turn. If it does not answer, it is gone, and must not lock the tunnel.

A gateway without an instance cannot be recognised, not even after a reconnect.

Another link is one with another index of equally many (the extension `links`). So after a restart with fewer links, or
with one, the sessions from before the restart are replaced.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol, final

import attrs

from ..._wire.links import LinkPlace

__all__ = [
    "NEWEST_WINS",
    "Party",
    "Takeover",
    "TakeoverRules",
    "Verdict",
    "answer_timeout",
    "other_link",
    "same_gateway",
]

ANSWER_TIMEOUT: Final = 2.0
"""Seconds that a holder has to answer: enough for a round trip and a retransmission on a poor path."""

GHOST_TIMEOUT: Final = 0.5
"""The same if the newcomer is the same gateway: then the old session is most likely dead."""


@final
class Takeover(enum.StrEnum):
    """Which of two gateways with the same key has the tunnel."""

    NEWEST = "newest"
    """The last to connect. The other one learns which gateway replaced it, and stops."""
    FIRST = "first"
    """The first to connect, while it is connected. The other one learns who has the tunnel, and retries."""


@final
class Verdict(enum.Enum):
    """What happens to the holder."""

    REPLACE = "it ends, and its gateway learns which one replaced it"
    RETIRE = "it takes no new visitors, and ends when its last visitor has ended"
    ASK = "it keeps the tunnel if it answers a ping, else it ends"
    BESIDE = "it stays, and the newcomer has the tunnel too"


class Party(Protocol):
    """What the rules need to know of a session."""

    @property
    def instance(self) -> str:
        """The name that tells its gateway from others with the same key; empty if the gateway sent none."""

    @property
    def key_id(self) -> str:
        """The id of the key that its gateway has proved."""

    @property
    def place(self) -> LinkPlace | None:
        """Which of its gateway's links this is; None if it is the only one (the default)."""
        return None


@final
@attrs.frozen(kw_only=True)
class TakeoverRules:
    """The rules of one tunnel, from its registry entry.

    Attributes:
        takeover: the operator's choice for gateways with the same key.
        keys: the ids of the tunnel's keys, the oldest first. A key that is not in the list counts as older than all.
    """

    takeover: Takeover = Takeover.NEWEST
    keys: tuple[str, ...] = ()

    def verdict(self, *, holder: Party, newcomer: Party) -> Verdict:
        """What happens to `holder` when `newcomer` has proved its key."""
        if holder.key_id != newcomer.key_id:
            return Verdict.ASK if self._age(newcomer) < self._age(holder) else Verdict.RETIRE
        if other_link(holder, newcomer):
            return Verdict.BESIDE
        if self.takeover is Takeover.NEWEST or same_gateway(holder.instance, newcomer.instance):
            return Verdict.REPLACE
        return Verdict.ASK

    def _age(self, party: Party) -> int:
        return self.keys.index(party.key_id) if party.key_id in self.keys else -1


NEWEST_WINS: Final = TakeoverRules()
"""The rules of a tunnel with one key and the default `takeover`."""


def same_gateway(instance: str, other: str) -> bool:
    """Whether two instances are the same gateway. False if one of them is empty."""
    return bool(instance) and instance == other


def other_link(party: Party, other: Party) -> bool:
    """Whether two sessions are different links of one gateway, which stand side by side."""
    if party.place is None or other.place is None or not same_gateway(party.instance, other.instance):
        return False
    return party.place.of == other.place.of and party.place.index != other.place.index


def answer_timeout(instance: str, other: str) -> float:
    """Seconds that a session of `instance` has to answer, when a gateway of instance `other` wants its tunnel."""
    return GHOST_TIMEOUT if same_gateway(instance, other) else ANSWER_TIMEOUT
