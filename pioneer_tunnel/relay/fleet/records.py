"""What the nodes of a fleet share about a tunnel: its record, with a holding for each session that has the tunnel."""

from __future__ import annotations

from typing import Final, final

import attrs

from ..._wire.links import LinkPlace
from ..gateways.takeover import Party

__all__ = ["LEAVING", "NOTHING_KNOWN", "Holding", "Record"]


@final
@attrs.frozen(kw_only=True)
class Holding(Party):
    """A session that has a tunnel, as all nodes see it. It holds no secret.

    Attributes:
        node: the name of the node that has the session.
        process: which process of that node: random, 16 hexadecimal digits. While a node is restarted it has two.
        session: the session's id.
        fence: orders the holdings of a tunnel: one that came later has a higher one. 0: the store has given none yet.
        key_id: the id of the key that its gateway has proved.
        instance: tells its gateway from others with the same key; empty if the gateway sent none.
        place: which of its gateway's links this is; None if it is the only one.
        since: when the gateway connected, in seconds since 1970, by the clock of its node.
    """

    node: str
    process: str
    session: str
    fence: int = 0
    key_id: str
    instance: str
    place: LinkPlace | None = None
    since: float


@final
@attrs.frozen
class Record:
    """The record of one tunnel.

    Attributes:
        version: changes with each write, and grows; 0 if there is no record.
        holdings: the sessions that have the tunnel. Those of dead processes are not among them.
        leaving: no process has it, since the process of its last session drains. Its gateway comes again in a moment.
            For some seconds only; the version is 0.
    """

    version: int
    holdings: tuple[Holding, ...] = ()
    leaving: bool = False

    @property
    def processes(self) -> frozenset[str]:
        """The ids of the processes that have one of the sessions."""
        return frozenset(holding.process for holding in self.holdings)


LEAVING: Final = Record(0, leaving=True)
"""The record of a tunnel whose last session has left with its process."""

NOTHING_KNOWN: Final = Record(0)
"""The record of a tunnel that no process has."""
