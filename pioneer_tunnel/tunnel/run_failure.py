"""What it means for a tunnel that a run of its transport has raised something."""

from __future__ import annotations

import logging
from typing import Final

import trio

from .._model.errors import LocalGatewayError, RestartLimitError, TunnelError, UnknownError
from .._model.exception_groups import leaves
from .._model.log_fields import about

__all__ = ["failure_in"]

_log: Final = logging.getLogger("pioneer_tunnel.supervisor")


def failure_in(error: BaseException, *, bugs: tuple[type[Exception], ...]) -> TunnelError | None:
    """What `error`, or the group that nurseries made of several, means for the tunnel.

    None means that the supervisor does not handle it: a cancellation, the end of the program, or one of `bugs`. Of
    several failures a final one counts. Unexpected exceptions are logged with their traceback.
    """
    errors = [leaf for leaf in leaves(error) if not isinstance(leaf, trio.Cancelled)]
    if not errors or any(isinstance(leaf, bugs) or not isinstance(leaf, Exception) for leaf in errors):
        return None
    # A transport must not raise these: it counts no restarts and dials no local gateway.
    not_of_a_transport = (RestartLimitError, LocalGatewayError)
    expected = [leaf for leaf in errors if isinstance(leaf, TunnelError) and not isinstance(leaf, not_of_a_transport)]
    whole = errors[0] if len(errors) == 1 else error
    if len(expected) < len(errors):
        fields = about("unforeseen", reason=type(whole).__name__)
        _log.error("an unforeseen failure of the tunnel", exc_info=whole, extra=fields)
    final_ones = [failure for failure in expected if failure.final]
    if final_ones:
        return final_ones[0]
    if len(expected) == len(errors):
        return expected[0]
    unforeseen = next(leaf for leaf in errors if leaf not in expected)
    unknown = UnknownError(f"an unforeseen failure, see the log: {type(unforeseen).__name__}")
    unknown.__cause__ = whole
    return unknown
