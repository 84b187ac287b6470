"""The judge of statuses is judged: it passes what the contract has, and catches each kind of violation."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.testing import ContractBroken, StatusContract

NOW = 1_700_000_000

DISABLED = Status(state=State.DISABLED, updated_at_unix=NOW)
STARTING = Status(state=State.STARTING, attempt=1, updated_at_unix=NOW)
CONNECTED = Status(state=State.CONNECTED, attempt=1, updated_at_unix=NOW)
LOCAL_DOWN = attrs.evolve(CONNECTED, error_kind=ErrorKind.LOCAL_GATEWAY_UNAVAILABLE, message="connection refused")
RETRYING = Status(
    state=State.FAILED,
    error_kind=ErrorKind.RELAY_RESOLVE_FAILED,
    message="no such name",
    attempt=1,
    updated_at_unix=NOW,
    retry_at_unix=NOW + 2,
)
RECONNECTING = attrs.evolve(RETRYING, state=State.RECONNECTING, error_kind=ErrorKind.RELAY_CONNECT_FAILED)
REJECTED = Status(
    state=State.FAILED,
    error_kind=ErrorKind.TUNNEL_AUTH_FAILED,
    message="the relay rejects the key",
    attempt=1,
    updated_at_unix=NOW,
)
WAITING = attrs.evolve(REJECTED, retry_at_unix=NOW + 900)
MISSING_KEY = Status(
    state=State.FAILED, error_kind=ErrorKind.MISSING_KEY, message="no key is stored", updated_at_unix=NOW
)
STOPPED = Status(state=State.STOPPED, updated_at_unix=NOW)


def later(status: Status, attempt: int, **changes: Any) -> Status:
    return attrs.evolve(status, attempt=attempt, **changes)


KEPT = {
    "switched on, up, stopped": [DISABLED, STARTING, CONNECTED, STOPPED],
    "retries before it is up": [
        STARTING,
        RETRYING,
        later(RETRYING, 2, retry_at_unix=None),
        later(RETRYING, 2, retry_at_unix=NOW + 4),
        later(CONNECTED, 3),
    ],
    "the cause changes": [STARTING, RETRYING, later(RETRYING, 2, error_kind=ErrorKind.RELAY_CONNECT_FAILED)],
    "lost and back": [
        STARTING,
        CONNECTED,
        RECONNECTING,
        later(RECONNECTING, 2),
        later(CONNECTED, 2),
        later(RECONNECTING, 2),
    ],
    "the relay drains": [STARTING, CONNECTED, later(CONNECTED, 2)],
    "the relay drains, and no other session comes up": [
        *(STARTING, CONNECTED, later(CONNECTED, 2), later(RECONNECTING, 2), later(CONNECTED, 3)),
    ],
    "local gateway away and back": [STARTING, CONNECTED, LOCAL_DOWN, CONNECTED],
    "link lost while the local gateway is away": [CONNECTED, LOCAL_DOWN, RECONNECTING],
    "rejected": [STARTING, REJECTED],
    "rejected while it was up": [STARTING, CONNECTED, REJECTED],
    "rejected after it was up, and retried": [
        *(STARTING, CONNECTED, RECONNECTING, later(WAITING, 2), later(REJECTED, 3), later(WAITING, 3)),
        *(later(REJECTED, 4), later(RECONNECTING, 4), later(RECONNECTING, 5, retry_at_unix=None), later(CONNECTED, 5)),
    ],
    "rejected, retried, and a new key": [CONNECTED, WAITING, later(REJECTED, 2), STARTING],
    "rejected, and a new key": [STARTING, REJECTED, STARTING, CONNECTED],
    "switched off after a final failure": [STARTING, REJECTED, DISABLED],
    "nothing to start with": [DISABLED, MISSING_KEY, attrs.evolve(MISSING_KEY, error_kind=ErrorKind.INVALID_SETTINGS)],
    "the key is withdrawn": [STARTING, CONNECTED, MISSING_KEY, STARTING],
    "a new generation while up": [later(CONNECTED, 7), STARTING, CONNECTED],
    "a new generation while it retries": [later(RETRYING, 7), STARTING, RETRYING],
    "run again": [STARTING, STOPPED, STARTING, STOPPED, DISABLED],
    "a round trip": [STARTING, CONNECTED, attrs.evolve(CONNECTED, relay_rtt_ms=12.0), CONNECTED],
    "begins anywhere": [later(CONNECTED, 12)],
    "said twice": [STARTING, STARTING, REJECTED, REJECTED, STOPPED, STOPPED],
    "nothing but states, as an older gateway": [
        {"state": "starting"},
        {"state": "failed", "error_kind": "io"},
        {"state": "starting"},
        {"state": "connected", "transport_detail": "process"},
    ],
    "time passes": [STARTING, attrs.evolve(CONNECTED, updated_at_unix=NOW + 60)],
}

BROKEN = {
    # a status by itself
    "failed without a cause": ([attrs.evolve(REJECTED, error_kind=None)], "failed with no error_kind"),
    "reconnecting without a cause": ([attrs.evolve(RECONNECTING, error_kind=None)], "reconnecting with no error_kind"),
    "reconnecting for good": (
        [attrs.evolve(RECONNECTING, error_kind=ErrorKind.TUNNEL_AUTH_FAILED)],
        "reconnecting with tunnel_auth_failed",
    ),
    "reconnecting for the local gateway": (
        [attrs.evolve(RECONNECTING, error_kind=ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)],
        "reconnecting with local_gateway_unavailable",
    ),
    "connected in spite of the relay": (
        [attrs.evolve(CONNECTED, error_kind=ErrorKind.RELAY_CONNECT_FAILED)],
        "connected with relay_connect_failed",
    ),
    "starting with a cause": ([attrs.evolve(STARTING, error_kind=ErrorKind.UNKNOWN)], "starting with unknown"),
    "stopped with a cause": ([attrs.evolve(STOPPED, error_kind=ErrorKind.IO)], "stopped with io"),
    "disabled with a cause": ([attrs.evolve(DISABLED, error_kind=ErrorKind.MISSING_KEY)], "disabled with missing_key"),
    "a retry of what is final": ([attrs.evolve(MISSING_KEY, retry_at_unix=NOW + 1)], "nothing is retried"),
    "a rejection that is retried, but was never up": ([STARTING, WAITING], "does not follow 'starting'"),
    "a rejection without another attempt": (
        [CONNECTED, WAITING, REJECTED, later(CONNECTED, 2)],
        "does not follow 'failed for good'",
    ),
    "a retry of what is up": ([attrs.evolve(CONNECTED, retry_at_unix=NOW + 1)], "nothing is retried"),
    "a retry of what is stopped": ([attrs.evolve(STOPPED, retry_at_unix=NOW + 1)], "nothing is retried"),
    "a retry in the past": ([attrs.evolve(RETRYING, retry_at_unix=NOW - 1)], "lies before updated_at_unix"),
    "an attempt before the first": ([attrs.evolve(CONNECTED, attempt=0)], "attempts count from 1"),
    "no time": ([attrs.evolve(CONNECTED, relay_rtt_ms=-1.0)], "which is no time"),
    "no number": ([attrs.evolve(CONNECTED, relay_rtt_ms=float("nan"))], "which is no time"),
    "a limit without its cause": (
        [attrs.evolve(REJECTED, error_kind=ErrorKind.RESTART_LIMIT_REACHED, message=None)],
        "has to tell the last cause",
    ),
    # the form on the wire
    "a state of one's own": ([{"state": "paused"}], "'state' is 'paused'"),
    "an error kind of one's own": ([{"state": "failed", "error_kind": "tired"}], "'error_kind' is 'tired'"),
    "no state": ([{"message": "hello"}], "'state' is missing"),
    "a time with a fraction": ([{"state": "stopped", "updated_at_unix": 1.5}], "'updated_at_unix' is 1.5"),
    "an empty message": ([{"state": "stopped", "message": ""}], "message is empty"),
    "a null": ([{"state": "stopped", "error_kind": None}], "error_kind is empty"),
    "a long message": ([{"state": "stopped", "message": "x" * 301}], "301 characters"),
    "a second line": ([{"state": "stopped", "message": "a\nb"}], "control character"),
    "an escape": ([{"state": "stopped", "message": "a\x1b[31m"}], "control character"),
    # one after the other
    "up without having started": ([DISABLED, CONNECTED], "does not follow 'disabled'"),
    "up after it was stopped": ([CONNECTED, STOPPED, CONNECTED], "does not follow 'stopped'"),
    "up after a final failure": ([STARTING, REJECTED, CONNECTED], "does not follow 'failed for good'"),
    "retried after a final failure": ([STARTING, REJECTED, RETRYING], "does not follow 'failed for good'"),
    "reconnects after a final failure": ([STARTING, REJECTED, RECONNECTING], "does not follow 'failed for good'"),
    "another attempt after a final failure": ([STARTING, REJECTED, later(REJECTED, 2)], "another attempt, though"),
    "another final failure after the first": (
        [STARTING, REJECTED, later(REJECTED, 2, message="the relay rejects the key again")],
        "takes an attempt, and there was none",
    ),
    "rejected without having started": ([DISABLED, REJECTED], "takes an attempt, and there was none"),
    "back before it was up": ([STARTING, RECONNECTING], "does not follow 'starting'"),
    "reconnects what was never up": ([STARTING, RETRYING, RECONNECTING], "does not follow 'failed before the first"),
    "failed after it was up": ([STARTING, CONNECTED, RETRYING], "does not follow 'connected'"),
    "failed while it reconnects": ([CONNECTED, RECONNECTING, RETRYING], "does not follow 'reconnecting'"),
    "flaps to starting": ([STARTING, RETRYING, later(STARTING, 2)], "starting again"),
    "counts back": ([later(RETRYING, 5), later(RETRYING, 4)], "attempt 4 follows attempt 5"),
    "leaves one out": ([later(RETRYING, 5), later(RETRYING, 7)], "attempt 7 follows attempt 5"),
    "lost together with another attempt": ([CONNECTED, later(RECONNECTING, 2)], "another attempt, though"),
    # updated_at_unix
    "a time that goes back": ([STARTING, attrs.evolve(CONNECTED, updated_at_unix=NOW - 1)], "goes back by 1 s"),
    "a time that is lost": ([STARTING, attrs.evolve(CONNECTED, updated_at_unix=None)], "was there and is gone"),
    "a time that moves for a round trip": (
        [CONNECTED, attrs.evolve(CONNECTED, relay_rtt_ms=3.0, updated_at_unix=NOW + 1)],
        "though state, error_kind and message stay",
    ),
    "a time that moves for another attempt": (
        [RETRYING, later(RETRYING, 2, updated_at_unix=NOW + 2)],
        "though state, error_kind and message stay",
    ),
}


@pytest.mark.parametrize("statuses", KEPT.values(), ids=KEPT)
def test_what_the_contract_has_passes(statuses: list[Status | dict[str, Any]]) -> None:
    contract = StatusContract()
    for status in statuses:
        contract.see(status)
    assert len(contract.history) == len(statuses)


@pytest.mark.parametrize(("statuses", "rule"), BROKEN.values(), ids=BROKEN)
def test_a_violation_is_caught_when_it_comes_and_told_with_the_history(
    statuses: list[Status | dict[str, Any]], rule: str
) -> None:
    contract = StatusContract()
    for status in statuses[:-1]:
        contract.see(status)
    with pytest.raises(ContractBroken) as caught:
        contract.see(statuses[-1])
    assert rule in caught.value.rule
    assert len(caught.value.history) == len(statuses)
    lines = str(caught.value).splitlines()
    assert lines[0] == caught.value.rule
    assert len(lines) == 2 + len(statuses)


def test_it_is_an_assertion_that_fails() -> None:
    with pytest.raises(AssertionError):
        StatusContract().see({"state": "paused"})


def test_the_history_is_readable() -> None:
    contract = StatusContract()
    contract.see(STARTING)
    contract.see(REJECTED)
    with pytest.raises(ContractBroken) as caught:
        contract.see(CONNECTED)
    assert str(caught.value).splitlines() == [
        "'connected' does not follow 'failed for good'",
        "the statuses so far:",
        "     1  starting  updated_at_unix=1700000000 attempt=1",
        "     2  failed / tunnel_auth_failed  message='the relay rejects the key' updated_at_unix=1700000000 attempt=1",
        "     3  connected  updated_at_unix=1700000000 attempt=1",
    ]


def test_with_a_clock_the_time_has_to_move_when_something_is_said() -> None:
    now = NOW + 0.9
    contract = StatusContract(wall_clock=lambda: now)
    contract.see(STARTING)
    contract.see(CONNECTED)
    now = NOW + 5.9
    contract.see(attrs.evolve(CONNECTED, relay_rtt_ms=1.0))
    contract.see(attrs.evolve(RECONNECTING, updated_at_unix=NOW + 5, retry_at_unix=NOW + 8))
    now = NOW + 9
    with pytest.raises(ContractBroken, match=f"updated_at_unix is {NOW + 5} for what is said at {NOW + 9}"):
        contract.see(attrs.evolve(CONNECTED, updated_at_unix=NOW + 5))


def test_a_watcher_that_misses_statuses_judges_each_for_itself() -> None:
    contract = StatusContract(conflated=True)
    for status in (DISABLED, CONNECTED, later(RETRYING, 9), REJECTED, RECONNECTING, later(CONNECTED, 2)):
        contract.see(status)
    contract.see(attrs.evolve(later(CONNECTED, 4), updated_at_unix=NOW + 5))
    with pytest.raises(ContractBroken, match="goes back"):
        contract.see(CONNECTED)
    with pytest.raises(ContractBroken, match="nothing is retried"):
        contract.see(attrs.evolve(MISSING_KEY, retry_at_unix=NOW + 7, updated_at_unix=NOW + 6))
