"""One attempt to bring a transport up, which can be given up until it is up."""

from __future__ import annotations

from typing import Final, final

import trio

from ..transports.interface import Session

__all__ = ["Opening"]


@final
class Opening(trio.TaskStatus[Session]):
    """The `task_status` of a transport that runs inside `scope`.

    Args:
        task_status: gets the session.

    Attributes:
        scope: cancelled by `give_up`.
        up: whether the transport is up, or was.
    """

    def __init__(self, task_status: trio.TaskStatus[Session]) -> None:
        self.scope: Final = trio.CancelScope()
        self._task_status: Final = task_status
        self.up: bool = False

    def started(self, value: Session | None = None) -> None:
        """The transport is up."""
        assert value is not None
        self.up = True
        self._task_status.started(value)

    def give_up(self) -> None:
        """End the attempt. Once the transport is up, this does nothing."""
        if not self.up:
            self.scope.cancel()
