"""Applies the access rules of a route to its visitors: what they do not let through is a `Refusal`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, final

from ..._http.head import RequestHead
from ...access.guard import Guard, guard_of
from ...access.rules import Access
from ..request_head import Refusal
from ..tunnels import Route
from .visit import Visit

__all__ = ["Rules", "check"]


@final
class Rules:
    """The access rules of all routes.

    Args:
        folder: where their relative paths start from: that of the configuration.
    """

    def __init__(self, folder: Path) -> None:
        self._folder: Final = folder
        self._located: Final[dict[Access, Access]] = {}

    def guard(self, route: Route) -> Guard | None:
        """What checks the visitors of a route; None if it has no rules."""
        access = route.access
        if access is None:
            return None
        if access not in self._located:
            self._located[access] = access.below(self._folder)
        return guard_of(self._located[access])

    def admit(self, visit: Visit, route: Route) -> None:
        """Check the address of a visitor in any protocol.

        Raises:
            Refusal: it is not admitted, or the rules want a password or a token, which only HTTP has.
        """
        guard = self.guard(route)
        if guard is not None and (guard.access.needs_http or not guard.admits(visit.host)):
            raise Refusal(403, "visitors from this address are not admitted here", reason="access_denied")


async def check(guard: Guard, visit: Visit, head: RequestHead) -> None:
    """Check a request against the rules of its route.

    Raises:
        Refusal: it is not let through.
    """
    denial = await guard.check(head, visit.host, visit.source)
    if denial is not None:
        reason = "access_denied" if denial.status < 500 else "access_unavailable"
        raise Refusal(denial.status, denial.text, headers=denial.headers, reason=reason)
