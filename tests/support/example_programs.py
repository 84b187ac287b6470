"""Programs that a user would run: they are started, heard, interrupted, and end in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, final

import trio
from rig import HOST, KEY, RelayRig, free_port, no_hang, relay_rig, tunnel_entry

__all__ = ["GREETING", "Program", "relay", "running", "running_program"]

ROOT: Final = Path(__file__).parents[2]
GREETING: Final = f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()


@final
class Program:
    """A program that runs, and what it has said so far."""

    def __init__(self, process: trio.Process) -> None:
        self.process: Final = process
        self.said = ""

    async def listen(self) -> None:
        assert self.process.stdout is not None
        async with self.process.stdout as stdout:
            async for data in stdout:
                self.said += bytes(data).decode()

    async def says(self, text: str) -> str:
        """Wait until it has said `text`; returns what follows on that line."""
        with no_hang():
            while "\n" not in self.said.partition(text)[2]:
                assert self.process.returncode is None, self.said
                await trio.sleep(0.01)
        return self.said.partition(text)[2].partition("\n")[0].strip()

    async def interrupt(self) -> int:
        """Press Ctrl-C, and wait for the end."""
        self.process.send_signal(signal.SIGINT)
        with no_hang():
            return await self.process.wait()


def running(*arguments: str | Path, cwd: Path | None = None) -> AbstractAsyncContextManager[Program]:
    """Run Python with `arguments`; at the end of the block it is terminated, if it still runs."""
    return running_program(sys.executable, *arguments, cwd=cwd)


@asynccontextmanager
async def running_program(*command: str | Path, cwd: Path | None = None) -> AsyncIterator[Program]:
    """Run a program; at the end of the block it is terminated, if it still runs."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
        )
        program = Program(process)
        nursery.start_soon(program.listen)
        try:
            yield program
        finally:
            process.terminate()
            with trio.CancelScope(shield=True):
                await process.wait()


@asynccontextmanager
async def relay(folder: Path) -> AsyncIterator[tuple[str, RelayRig]]:
    """A relay that programs find by its URL, with the key in `relay-key.txt` of `folder`."""
    (folder / "relay-key.txt").write_text(f"{KEY.reveal()}\n")
    control = f"127.0.0.1:{free_port()}"
    entry = tunnel_entry(bind_addr="127.0.0.1:0")
    async with relay_rig(control_addr=control, public_names=[control], tunnels=[entry]) as rig:
        yield f"ws://{control}", rig
