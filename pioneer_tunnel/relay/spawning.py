"""Start the command of this process again, in a child that inherits descriptors; wait for the end of a child."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import trio

__all__ = ["WORKER_VARIABLE", "end_child", "own_command", "spawn"]

WORKER_VARIABLE: Final = "PIONEER_TUNNEL_WORKER"
"""The environment variable of a worker, see `workers.process`: the descriptor of its end of its channel."""

END_LOOK: Final = 0.02


def own_command() -> list[str]:
    """How this process was started."""
    return [sys.executable, *sys.orig_argv[1:]]


def spawn(command: Sequence[str], environment: Mapping[str, str], inherited: Sequence[int]) -> int:
    """Start a command; returns its process id. The caller has to wait for its end with `end_child`, if it outlives it.

    It is no `subprocess.Popen`, which would complain of a child that outlives this process.

    Args:
        command: the command.
        environment: its environment.
        inherited: the descriptors that it gets, under the same numbers.

    Raises:
        OSError: it cannot be started.
    """
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    try:
        return os.posix_spawn(command[0], [*command], environment)
    finally:
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)


async def end_child(pid: int, timeout: float) -> int:
    """Wait for the end of a child, and kill it if that takes longer than `timeout` seconds; returns its exit status."""
    ended, status = 0, 0
    with trio.CancelScope(shield=True):
        deadline = trio.current_time() + timeout
        while not ended:
            if trio.current_time() >= deadline:
                os.kill(pid, signal.SIGKILL)
            await trio.sleep(END_LOOK)
            ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)
