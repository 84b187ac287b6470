"""Transport `process` with real programs, and what they leave behind."""

from __future__ import annotations

import functools
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import trio
import trio.testing
from rig import no_hang, nothing_left_behind

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import TunnelError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.proxies.choice import WITHOUT_PROXY, ProxyChoice
from pioneer_tunnel.transports.interface import Session, Target
from pioneer_tunnel.transports.process.config import ProcessConfig, TunnelProgram
from pioneer_tunnel.transports.process.program import ProcessTransport

SECRET: Final = "ptk1_the-key_of/the tests\"with'quotes-0123456789"
KEY: Final = RelayKey(SECRET)
READY: Final = "print('ready', flush=True)\n"
FOR_EVER: Final = READY + "time.sleep(600)\n"
LINUX: Final = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
REAL_PROGRAMS: Final = [
    pytest.mark.skipif(os.name != "posix", reason="needs process groups"),
    pytest.mark.usefixtures("run_folder"),
]
"""The `pytestmark` of a module that runs programs."""

Run: TypeAlias = functools.partial[Any]
"""A transport with its target."""


def write_program(folder: Path, source: str) -> list[str]:
    """A program that does as `source` says, as a command whose processes `programs_in` finds."""
    path = folder / "program.py"
    path.write_text("import json, os, signal, subprocess, sys, time\n" + textwrap.dedent(source))
    return [sys.executable, "-I", "-S", str(path)]


def run_for(
    folder: Path,
    source: str,
    *arguments: str,
    dial: Any = trio.open_tcp_stream,
    proxy: ProxyChoice = WITHOUT_PROXY,
    **changes: Any,
) -> Run:
    options: dict[str, Any] = {
        "command": [*write_program(folder, source), *arguments],
        "connected_pattern": "^ready$",
        "stop_grace_ms": 1500,
    }
    return run_of(ProcessConfig(**(options | changes)), folder, dial=dial, proxy=proxy)


def run_of(
    config: ProcessConfig,
    folder: Path,
    *,
    key: RelayKey = KEY,
    dial: Any = trio.open_tcp_stream,
    proxy: ProxyChoice = WITHOUT_PROXY,
) -> Run:
    program = TunnelProgram(config, local=Address("::1", 8080), runtime_folder=folder / "run", folder=folder)
    address = RelayAddress(None, "relay.test", 2333)
    target = Target(address=address, key=key, service="a service", dial=dial, proxy=proxy)
    return functools.partial(ProcessTransport(program=program), target)


def no_visitors(_: object) -> None:
    raise AssertionError("this transport has neither visitors nor events")


async def serve(run: Run, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    await run(no_visitors, no_visitors, task_status=task_status)


async def failure_of(run: Run) -> TunnelError:
    """What comes of a program that does not go on."""
    with no_hang(), pytest.raises(TunnelError) as error:
        await serve(run)
    return error.value


@asynccontextmanager
async def connected(run: Run) -> AsyncIterator[Session]:
    async with trio.open_nursery() as nursery:
        with no_hang():
            session: Session = await nursery.start(lambda task_status: serve(run, task_status=task_status))
        yield session
        nursery.cancel_scope.cancel()


def programs_in(folder: Path) -> dict[int, list[str]]:
    """The living processes that run something of `folder`, zombies left out, with their arguments."""
    found = {}
    for name in filter(str.isdigit, (path.name for path in Path("/proc").iterdir())):
        try:
            command = Path("/proc", name, "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX" and any(word.startswith(f"{folder}/") for word in command):
            found[int(name)] = command
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children() -> set[int]:
    """The processes that this one has started, zombies too."""
    found = set()
    for name in filter(str.isdigit, (path.name for path in Path("/proc").iterdir())):
        with suppress(OSError):
            if parent_of(int(name)) == os.getpid():
                found.add(int(name))
    return found


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def no_process_left(folder: Path) -> Iterator[None]:
    """Fail when the block leaves a process, a zombie, a file, a descriptor or a task behind."""
    before, children_before = descriptors(), children()  # such as the process that forks for other tests
    with nothing_left_behind():
        yield
    assert programs_in(folder) == {}
    assert run_files(folder) == []
    assert children() <= children_before
    assert descriptors() <= before


def run_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("*") if not path.name.startswith("instance"))


@pytest.fixture
def run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)


STUBBORN: Final = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def branch(depth, leave):
        if os.fork() == 0:
            if leave:
                os.setsid()
            if depth:
                branch(depth - 1, leave)
            time.sleep(600)
            os._exit(0)
    branch(1, False)
    branch(1, True)
"""
