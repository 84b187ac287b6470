"""What is known of each link, and the status of the tunnel that follows. Values, without I/O and without a clock.

    connected      a link is up, or its relay drains and the next session is not overdue
    starting       no link was up, and one still makes its first attempt
    failed         no link was up, or every relay rejects the gateway
    reconnecting   else

So one link that is lost, and one relay that rejects the gateway, is no outage while another link is up. With several
links down, the status has the error of the first one that is retried, and the earliest retry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import attrs

from .._model.addresses import RelayAddress
from .._model.errors import LocalGatewayError, RelayConnectError, TunnelError
from .._model.status import LinkStatus, State, Status
from ..transports.interface import Session

__all__ = ["Standing", "common_failure", "status_of", "status_of_failure"]


@final
@attrs.define(kw_only=True, eq=False)
class Standing:
    """One link now.

    Attributes:
        relay: which it dials or has dialled last; None before.
        attempts: how many it has begun.
        session: of the run that was up last; None before.
        up: whether a run carries visitors. It may be lost.
        lost: why the connection of that run is lost, while it is being restored.
        round_trip: of that run, in seconds; None while it is unknown.
        cause: why the last run has ended; None for one that is up, and before.
        rejected: the relay has rejected the gateway, and is asked again much later.
        hopeless: the cause is final, so this link alone would end the tunnel.
        without_relay: there is no relay for it now; see `RelayChoice`.
        retry_at_unix: when it is retried; None while it is not planned.
    """

    relay: RelayAddress | None = None
    attempts: int = 0
    session: Session | None = None
    up: bool = False
    lost: TunnelError | None = None
    round_trip: float | None = None
    cause: TunnelError | None = None
    rejected: bool = False
    hopeless: bool = False
    without_relay: bool = False
    retry_at_unix: int | None = None

    @property
    def serves(self) -> bool:
        """Whether visitors get through."""
        return self.up and self.lost is None

    @property
    def problem(self) -> TunnelError | None:
        """Why visitors do not get through; None if that is not known, or if they do."""
        return self.lost if self.up else self.cause


def common_failure(standings: Sequence[Standing]) -> TunnelError | None:
    """The final failure of the tunnel: no link can be up. None while one can."""
    ended = [standing for standing in standings if not standing.without_relay]
    return ended[0].cause if ended and all(standing.hopeless for standing in ended) else None


def status_of(standings: Sequence[Standing], *, last: Status, local_error: LocalGatewayError | None) -> Status:
    """The status of a tunnel that has not failed for good, without its time.

    Args:
        standings: of its links.
        last: the last status of this generation.
        local_error: why visitors do not reach the local gateway; None if they do.
    """
    shown = next((each for each in standings if each.serves), None) or next(
        (each for each in standings if each.up), None
    )
    state = _state(standings, last)
    error: TunnelError | None = None
    if state is State.CONNECTED:
        error = local_error
    elif state is not State.STARTING:
        shown = _most_hopeful(standings)
        error = shown.problem
        if error is not None and error.final and not (shown.rejected and _was_up(standings)):
            error = RelayConnectError(str(error))  # another attempt is made, so the tunnel has not failed for good
    session = None if shown is None else shown.session
    retries = [each.retry_at_unix for each in standings if each.retry_at_unix is not None]
    several = len(standings) > 1
    status = Status(
        state=state,
        error_kind=None if error is None else error.kind,
        message=None if error is None else _message(error, None if shown is None or not several else shown.relay),
        public_url=last.public_url if session is None or state is not State.CONNECTED else session.public_url,
        services=last.services if session is None or state is not State.CONNECTED else session.services,
        attempt=1 if state is State.STARTING else _attempt(standings),
        retry_at_unix=min(retries) if retries and state not in {State.CONNECTED, State.STARTING} else None,
        relay_rtt_ms=None if shown is None or shown.round_trip is None else round(shown.round_trip * 1000, 3),
    )
    return _with_links(status, standings)


def status_of_failure(standings: Sequence[Standing], failure: TunnelError) -> Status:
    """The status of a tunnel that has failed for good, without its time."""
    status = Status(state=State.FAILED, error_kind=failure.kind, message=str(failure), attempt=_attempt(standings))
    return _with_links(status, standings)


def _with_links(status: Status, standings: Sequence[Standing]) -> Status:
    if len(standings) == 1:
        return status
    return attrs.evolve(
        status,
        links_up=sum(each.serves for each in standings),
        links_wanted=len(standings),
        links=[_link_status(each) for each in standings],
    )


def _attempt(standings: Sequence[Standing]) -> int:
    """The first attempts of all links count as one."""
    return 1 + sum(max(0, each.attempts - 1) for each in standings)


def _state(standings: Sequence[Standing], last: Status) -> State:
    if any(each.serves for each in standings):
        return State.CONNECTED
    if _was_up(standings):
        return State.FAILED if _most_hopeful(standings).rejected else State.RECONNECTING
    first_attempt = any(each.cause is None and not each.without_relay for each in standings)
    return State.STARTING if first_attempt and last.state is State.STARTING else State.FAILED


def _was_up(standings: Sequence[Standing]) -> bool:
    return any(each.session is not None for each in standings)


def _most_hopeful(standings: Sequence[Standing]) -> Standing:
    """Of the links that are down, the first one that is retried soonest."""
    return min(
        (each for each in standings if each.problem is not None), key=lambda each: (each.hopeless, each.rejected)
    )


def _message(error: TunnelError, relay: RelayAddress | None) -> str:
    text = str(error)
    return text if relay is None or relay.host in text else f"{relay}: {text}"


def _link_status(standing: Standing) -> LinkStatus:
    if standing.without_relay:
        return LinkStatus(up=False, message="there is no further relay, or it keeps one link of a gateway at most")
    problem = standing.problem
    return LinkStatus(
        up=standing.serves,
        relay=None if standing.relay is None else str(standing.relay),
        public_url=standing.session.public_url if standing.serves and standing.session is not None else None,
        error_kind=None if problem is None else problem.kind,
        message=None if problem is None else str(problem),
    )
