"""Who has a tunnel when a second gateway knocks: a decision, without I/O and without a clock.

A tunnel has one session at a time. What happens to it when another gateway has proved a key of the same tunnel is
told by three things: the keys that both came with, their instances, and what the operator chose (`takeover`).

    the newcomer's key       its instance     then
    the same                 the same         REPLACE: it comes back, and what is here is its ghost
    the same                 another, none    REPLACE with `newest`, ASK with `first`
    a later one of `keys`    any              RETIRE: the key is being rotated
    an earlier one           any              ASK: a rotation does not go backwards while the newer key is in use

ASK is what keeps two hosts from fighting. The holder keeps the tunnel if it answers, and the newcomer is told who has
it; a holder that says nothing is gone, and must not lock the tunnel. A gateway that told no instance cannot be known
again: to every other one, and to its own ghost, it is a stranger.

Neighbours: a `Directory` asks for the verdict and carries it out; `config` has the operator's choice.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol, final

import attrs

__all__ = ["NEWEST_WINS", "Party", "Takeover", "TakeoverRules", "Verdict", "answer_timeout", "same_gateway"]

ANSWER_TIMEOUT: Final = 2.0
"""Seconds that a holder has to answer. A round trip and a retransmission fit in even on a poor path."""

GHOST_TIMEOUT: Final = 0.5
"""The same when it is its own gateway that comes back: then it is a ghost most likely, and soon gone."""


@final
class Takeover(enum.StrEnum):
    """Which of two gateways with one key has the tunnel."""

    NEWEST = "newest"
    """The one that came last; the other is told who took it over, and stops."""
    FIRST = "first"
    """The one that came first, for as long as it is there; the other is told who has it, and tries again."""


@final
class Verdict(enum.Enum):
    """What becomes of the session that is here."""

    REPLACE = "it is told, and ends"
    RETIRE = "it takes no new visitors, and ends when those it has are gone"
    ASK = "it stays if it answers, or else it is gone"


class Party(Protocol):
    """What is known of a session for the decision."""

    @property
    def instance(self) -> str:
        """What tells its gateway from another one with the same key; empty if it told nothing."""

    @property
    def key_id(self) -> str:
        """The key that it has proved."""


@final
@attrs.frozen(kw_only=True)
class TakeoverRules:
    """What a tunnel's registry entry says about it.

    Attributes:
        takeover: the operator's choice for gateways with the same key.
        keys: the ids of the tunnel's keys, the oldest first. One that is not among them is older than all.
    """

    takeover: Takeover = Takeover.NEWEST
    keys: tuple[str, ...] = ()

    def verdict(self, *, holder: Party, newcomer: Party) -> Verdict:
        """What becomes of `holder` now that `newcomer` has proved itself."""
        if holder.key_id != newcomer.key_id:
            return Verdict.ASK if self._age(newcomer) < self._age(holder) else Verdict.RETIRE
        if self.takeover is Takeover.NEWEST or same_gateway(holder.instance, newcomer.instance):
            return Verdict.REPLACE
        return Verdict.ASK

    def _age(self, party: Party) -> int:
        return self.keys.index(party.key_id) if party.key_id in self.keys else -1


NEWEST_WINS: Final = TakeoverRules()
"""The rules of a tunnel with one key that says nothing about takeover."""


def same_gateway(instance: str, other: str) -> bool:
    """Whether two sessions are of one gateway; of two that told no instance, nobody knows."""
    return bool(instance) and instance == other


def answer_timeout(instance: str, other: str) -> float:
    """Seconds to wait for the answer of a session of `instance` when one of `other` wants its place."""
    return GHOST_TIMEOUT if same_gateway(instance, other) else ANSWER_TIMEOUT
