"""The guardian: a small process between us and a tunnel program, so that nothing of the program outlives us.

    us ═ a socket pair ═ guardian ─ parent of ─ the program, in a session of its own ─ whatever it starts

We may be killed so that nothing in us gets to clean up. The kernel then closes our end of the socket pair, and the
guardian, who sees that, kills the program with all its descendants. (The kernel could kill a child at its parent's
death by itself, PDEATHSIG; but it follows the *thread* that forked, and the threads that Trio forks in end when they
are idle. The guardian has one thread, so it can have its program follow it that way, should it be killed first.)

This file is run by its path, in a process of its own, and imports nothing but the standard library's smallest parts:
it starts in 20 ms. What it is told comes over the socket pair, not in its arguments, which everybody can read:

    to it       one line of JSON, `Orders`; then "stop", or the end, which says the same with less patience
    from it     "started PID", or "refused ERRNO program" ("… folder", when that is what cannot be had); then "ended
                STATUS", minus a number for a signal's; then it ends, and all is gone

Neighbour: `process` starts it, and is the only one who talks to it.
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
"""Seconds that the program has to end politely when we are gone: nobody waits for it to say goodbye well."""
_KILL_SECONDS: Final = 5.0
"""How long the killed may take to be gone. What hangs in the kernel is left to it then."""


class Orders(TypedDict):
    """What is to be run.

    Keys:
        program: the path of the executable.
        arguments: its arguments, the name it goes by first.
        environment: all its variables.
        folder: where it is started.
        grace: seconds between asking it to end and killing it.
        leftovers: files to remove when we are not there to do it.
    """

    program: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    grace: float
    leftovers: list[str]


def main(descriptor: int) -> None:
    """Guard one program: start it, wait for its end or for ours, leave nothing behind."""
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
        prctl(_PR_SET_CHILD_SUBREAPER, 1)  # descendants that lose their parent become ours, not init's

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
    """The program, whose end can be seen without reaping it, where the system has that.

    Until it is reaped, its number, which is its process group's too, cannot become somebody else's.
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
        with contextlib.suppress(OSError):  # all gone, or not ours to end
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
    """The first line from us; None when we have thought better of it."""
    received = b""
    while not received.endswith(b"\n"):
        data = os.read(descriptor, 64 * 1024)
        if not data:
            return None
        received += data
    orders: Orders = json.loads(received)
    return orders


def _start(orders: Orders, descriptor: int, prctl: Any) -> _Program | None:
    """Start the program with our standard streams, and let go of them; None when the system refuses to."""
    told, tell = os.pipe()
    guardian = os.getpid()
    program = os.fork()
    if program == 0:
        _become(orders, guardian, tell, prctl)
    os.close(tell)
    # The program's output ends with the program, and not with us.
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
    """In the child: become the program. Everything of ours is closed when it is executed."""
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
                os._exit(127)  # it died before we asked to be told
        refused = "folder"
        os.chdir(orders["folder"])
        refused = "program"
        os.execve(orders["program"], orders["arguments"], orders["environment"])  # noqa: S606  # an operator's program
    except OSError as error:
        os.write(tell, f"{error.errno} {refused}".encode())
    finally:
        os._exit(127)


def _ignored() -> tuple[signal.Signals, ...]:
    """A terminal sends these to whole groups; how to end is our affair, and comes over the socket pair.

    A function, since Windows, which imports this module as well, lacks some of them.
    """
    return (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


def _also_ignored_by_python() -> list[int]:
    return [getattr(signal, name) for name in ("SIGXFSZ",) if hasattr(signal, name)]


def _wait_for_an_end(program: _Program, descriptor: int, woken: int, us: int, asked_to_end: list[int]) -> bool:
    """Wait until the program ends, or is to end; returns whether that is because we are gone."""
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(descriptor, select.POLLIN)
    # Whoever forked off us without executing anything holds our end of the socket pair too; so we are watched besides.
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
    """Ask the program and all its descendants to end, kill them when they do not, and reap them."""
    told = False
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        asked: set[int] = set()
        while True:
            if not told and program.has_ended():
                # Told as soon as it is known; whatever the program has left behind may take longer.
                _tell(descriptor, f"ended {program.status}")
                told = True
            descendants = _descendants(program.process)
            if told and not descendants:
                break
            by_group = number == signal.SIGKILL or not asked
            if by_group:
                program.send_to_group(number)
            # And those that have left the group, or have come since it was asked; each is asked once, killed at sight.
            for process in descendants if number == signal.SIGKILL else descendants - asked:
                with contextlib.suppress(OSError):
                    if not by_group or os.getpgid(process) != program.process:
                        os.kill(process, number)
            asked |= {program.process} | descendants
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # The end of what is not our own child is told to nobody, so look again soon.
            _sleep(woken, min(left, 0.02))
    program.send_to_group(signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(program: int) -> set[int]:
    """Who lives on below us, beside `program` itself; where there is no /proc nobody is known of.

    Our own children that have ended, and are not `program`, are reaped on the way.
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
                # The name may hold anything, and ends with the last parenthesis.
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
    with contextlib.suppress(OSError):  # there may be nobody left to tell
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
