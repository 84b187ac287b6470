"""The guardian: a small process between this one and a tunnel program, so that nothing of the program outlives us.

    us ═ a socket pair ═ guardian ─ parent of ─ the program, in a session of its own ─ its descendants

This process may be killed without any cleanup. The kernel then closes our end of the socket pair. The guardian sees
that, and kills the program with all its descendants. (The kernel can kill a child when its parent dies, by PDEATHSIG.
But that follows the *thread* that forked, and Trio's worker threads end when they are idle. The guardian has one
thread, so it sets PDEATHSIG for the program, in case the guardian itself is killed.)

This file is run by its path, in a process of its own, and imports only small parts of the standard library, so it
starts in 20 ms. It gets its orders over the socket pair, not in its arguments, which everyone can read:

    to it       one line of JSON, `Orders`; then "stop", or EOF, which means the same with a shorter grace
    from it     "started PID", or "refused ERRNO program" ("… folder" when the working folder is the reason); then
                "ended STATUS", for a signal minus its number; then EOF, when nothing is left
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import Any, Final, NoReturn, TypedDict, final

__all__ = ["Orders"]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_ORPHANED_GRACE: Final = 0.5
"""Seconds between SIGTERM and SIGKILL when this process is gone."""
_KILL_SECONDS: Final = 5.0
"""Seconds to wait for killed processes. A process that hangs in the kernel is then left to it."""


class Orders(TypedDict):
    """What to run.

    Keys:
        program: the path of the executable.
        arguments: its arguments, beginning with argv[0].
        environment: all its variables.
        folder: its working folder.
        grace: seconds between SIGTERM and SIGKILL.
        leftovers: files that the guardian removes when this process is gone.
    """

    program: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    grace: float
    leftovers: list[str]


def main(descriptor: int) -> None:
    """Guard one program: start it, wait until it or the parent ends, kill and reap what is left."""
    os.set_inheritable(descriptor, False)
    us = os.getppid()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else _pipe()
    for number in _ignored():
        signal.signal(number, signal.SIG_IGN)
    asked_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: asked_to_end.append(number))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    prctl = _find_prctl()
    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphaned descendants become children of the guardian, not of init

    orders = _read_orders(descriptor)
    if orders is None:
        return
    program = _start(orders, descriptor, prctl)
    if program is None:
        return
    orphaned = _wait_for_an_end(program, descriptor, woken, us, asked_to_end)
    _end_all(program, woken, _ORPHANED_GRACE if orphaned else orders["grace"], descriptor)
    if orphaned or os.getppid() != us:
        for path in orders["leftovers"]:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # pathlib would double the time to start


@final
class _Program:
    """The program. Where the system has `waitid`, its end is seen without reaping it.

    Until it is reaped, its PID, which is also the ID of its process group, cannot be reused.
    """

    def __init__(self, process: int) -> None:
        self.process: Final = process
        self.status: int | None = None
        """Once it has ended: its exit status, or minus the number of the signal that ended it."""

    def has_ended(self) -> bool:
        if self.status is None and hasattr(os, "waitid"):
            ended = os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self.status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        elif self.status is None:
            reaped, status = os.waitpid(self.process, os.WNOHANG)
            if reaped:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def send_to_group(self, number: int) -> None:
        with contextlib.suppress(OSError):  # all are gone, or belong to another user
            os.killpg(self.process, number)


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


def _find_prctl() -> Any:
    """The system call `prctl`, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None


def _read_orders(descriptor: int) -> Orders | None:
    """Read the orders; None at EOF."""
    received = b""
    while not received.endswith(b"\n"):
        data = os.read(descriptor, 64 * 1024)
        if not data:
            return None
        received += data
    orders: Orders = json.loads(received)
    return orders


def _start(orders: Orders, descriptor: int, prctl: Any) -> _Program | None:
    """Start the program with our standard streams, and close ours; None when the system refuses to execute it."""
    told, tell = os.pipe()
    guardian = os.getpid()
    program = os.fork()
    if program == 0:
        _become(orders, guardian, tell, prctl)
    os.close(tell)
    # The program's output must end with the program, not with the guardian.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.close(nothing)
    refusal = os.read(told, 64)
    os.close(told)
    if refusal:
        os.waitpid(program, 0)
        _tell(descriptor, f"refused {refusal.decode()}")
        return None
    _tell(descriptor, f"started {program}")
    return _Program(program)


def _become(orders: Orders, guardian: int, tell: int, prctl: Any) -> NoReturn:
    """In the child: become the program. Our descriptors close on exec."""
    refused = "program"
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (*_ignored(), signal.SIGTERM, signal.SIGCHLD, *_also_ignored_by_python()):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != guardian:
                os._exit(127)  # the guardian died before prctl
        refused = "folder"
        os.chdir(orders["folder"])
        refused = "program"
        os.execve(orders["program"], orders["arguments"], orders["environment"])  # noqa: S606  # an operator's program
    except OSError as error:
        os.write(tell, f"{error.errno} {refused}".encode())
    finally:
        os._exit(127)


def _ignored() -> tuple[signal.Signals, ...]:
    """Signals that a terminal sends to whole groups. The guardian is stopped over the socket pair instead.

    A function, since Windows imports this module and lacks some of them.
    """
    return (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


def _also_ignored_by_python() -> list[int]:
    return [getattr(signal, name) for name in ("SIGXFSZ",) if hasattr(signal, name)]


def _wait_for_an_end(program: _Program, descriptor: int, woken: int, us: int, asked_to_end: list[int]) -> bool:
    """Wait until the program ends or has to end; returns whether the parent is gone."""
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(descriptor, select.POLLIN)
    # A fork of the parent without exec also holds its end of the socket pair, so watch the parent itself too.
    life = _open_life(us)
    if life is not None:
        poll.register(life, select.POLLIN)
    while not program.has_ended() and not asked_to_end:
        if os.getppid() != us:
            return True
        for ready, _ in poll.poll():
            if ready == woken:
                _drain(woken)
            elif ready == life:
                return True
            elif ready == descriptor:
                try:
                    return not os.read(descriptor, 64)
                except OSError:
                    return True
    return False


def _open_life(process: int) -> int | None:
    """A descriptor that becomes readable when `process` ends."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor: int = os.pidfd_open(process)
    except OSError:
        return None
    return descriptor


def _end_all(program: _Program, woken: int, grace: float, descriptor: int) -> None:
    """Send SIGTERM to the program and all its descendants, then SIGKILL, and reap them."""
    told = False
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        asked: set[int] = set()
        while True:
            if not told and program.has_ended():
                # Report it now: descendants may take longer to end.
                _tell(descriptor, f"ended {program.status}")
                told = True
            descendants = _descendants(program.process)
            if told and not descendants:
                break
            by_group = number == signal.SIGKILL or not asked
            if by_group:
                program.send_to_group(number)
            # Also signal those that left the group or are new: SIGTERM once each, SIGKILL each time.
            for process in descendants if number == signal.SIGKILL else descendants - asked:
                with contextlib.suppress(OSError):
                    if not by_group or os.getpgid(process) != program.process:
                        os.kill(process, number)
            asked |= {program.process} | descendants
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # There is no SIGCHLD for processes that are not our children, so look again soon.
            _sleep(woken, min(left, 0.02))
    program.send_to_group(signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(program: int) -> set[int]:
    """The living descendants of the guardian, without `program`; empty where there is no /proc.

    Reaps children of the guardian that have ended, except `program`.
    """
    parents: dict[int, tuple[int, str]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208  # see above
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):
                descriptor = os.open(f"/proc/{name}/stat", os.O_RDONLY)
                try:
                    stat = os.read(descriptor, 4096)
                finally:
                    os.close(descriptor)
                # The name may hold any characters; it ends at the last parenthesis.
                state, its_parent = stat.rpartition(b")")[2].split()[:2]
                parents[int(name)] = (int(its_parent), state.decode())
    guardian = os.getpid()
    below = {guardian}
    found = True
    while found:
        found = False
        for process, (parent, _) in parents.items():
            if parent in below and process not in below:
                below.add(process)
                found = True
    ended = {process for process in below - {guardian} if parents[process][1] in "ZX"}
    for process in ended - {program}:
        if parents[process][0] == guardian:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
    return below - ended - {guardian, program}


def _tell(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):  # the parent may be gone
        os.write(descriptor, f"{line}\n".encode())


def _sleep(woken: int, seconds: float) -> None:
    select.select([woken], [], [], seconds)
    _drain(woken)


def _drain(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 512):
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
