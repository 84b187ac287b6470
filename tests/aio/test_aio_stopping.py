"""A tunnel under asyncio ends in good order, however its block, its task, its loop or its process ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from aio_rig import URL, options, remote_access
from relay_thread import running_relay
from rig import HANG, KEY, RelayRig, free_port

from pioneer_tunnel import State
from pioneer_tunnel.aio import open_tunnel


@pytest.fixture(scope="module")
def control() -> str:
    return f"127.0.0.1:{free_port()}"


async def entered(relay: RelayRig, ready: asyncio.Event, ended: list[Any], **changes: Any) -> None:
    async with open_tunnel(URL, **options(relay, **changes)) as tunnel:
        await tunnel.wait_connected()
        ready.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(tunnel)


def test_cancelled_it_leaves_nothing(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        ready, ended = asyncio.Event(), list[Any]()
        task = asyncio.create_task(entered(relay_in_thread, ready, ended))
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert ended[0].status.state is State.STOPPED

    on_loop(main())


def test_cancelled_again_and_again_it_still_ends_in_good_order(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        ready, ended = asyncio.Event(), list[Any]()
        task = asyncio.create_task(entered(relay_in_thread, ready, ended))
        await ready.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()
        assert ended[0].status.state is State.STOPPED

    on_loop(main())


def test_cancelled_at_any_moment_of_entering_it_leaves_nothing(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        for turns in range(30):
            task = asyncio.create_task(entered(relay_in_thread, asyncio.Event(), []))
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    on_loop(main())


def test_a_timeout_around_it_is_a_timeout(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def refused(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread, dial=refused)) as tunnel:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await tunnel.wait_connected()
            current = asyncio.current_task()
            assert current is not None
            assert not current.cancelling()
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), open_tunnel(URL, **options(relay_in_thread, dial=refused)) as tunnel:
                await tunnel.wait_connected()

    on_loop(main())


def test_a_loop_that_ends_while_it_is_open_ends_it(relay_in_thread: RelayRig, on_loop: Any) -> None:
    """`asyncio.run` cancels the tasks that are left when the main one has returned."""
    ended: list[Any] = []

    async def main() -> None:
        ready = asyncio.Event()
        main.task = asyncio.create_task(entered(relay_in_thread, ready, ended))  # type: ignore[attr-defined]
        await ready.wait()

    on_loop(main())
    assert ended[0].status.state is State.STOPPED


@pytest.mark.parametrize("what", ["open_tunnel", "RemoteAccess"])
def test_a_loop_that_is_closed_under_it_ends_its_thread(relay_in_thread: RelayRig, tmp_path: Path, what: str) -> None:
    loop = asyncio.new_event_loop()
    ready = asyncio.Event()
    ended: list[Any] = []

    async def entered_remote() -> None:
        async with remote_access(relay_in_thread, tmp_path) as remote:
            ended.append(remote)
            ready.set()
            await asyncio.sleep(60)

    task = loop.create_task(entered(relay_in_thread, ready, ended) if what == "open_tunnel" else entered_remote())
    loop.run_until_complete(asyncio.wait_for(ready.wait(), 60))
    loop.call_exception_handler = lambda context: None  # type: ignore[method-assign]  # "Task was destroyed …"
    loop.close()
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    del task
    for thread in threading.enumerate():
        if thread.name == "pioneer-tunnel":
            thread.join(60)
            assert not thread.is_alive()
    assert ended[0].status.state is State.STOPPED


PROGRAM: Final = """
import asyncio, os, signal, sys, threading
from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel

relay, key, way = sys.argv[1:]

async def main():
    async with open_tunnel(relay, key=RelayKey(key)) as tunnel:
        try:
            print((await tunnel.wait_connected()).state, flush=True)
            if way == "exits":
                sys.exit(5)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(60)
        finally:
            print("left", flush=True)
    print("not reached")

if way == "forever":
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    try:
        loop.run_forever()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)   # asyncio complains of a task that was never awaited
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("way", "code", "says"),
    [
        ("ctrl-c", -2, ["connected", "left"]),
        pytest.param("exits", 5, ["connected", "left"], marks=pytest.mark.slow),
        ("forever", 0, ["connected", "interrupted", "left"]),
    ],
)
def test_a_process_ends_however_its_loop_ends(
    *, way: str, code: int, says: list[str], tmp_path: Path, control: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with running_relay(control_addr=control, public_names=[control]):
        done = subprocess.run(
            [sys.executable, program, f"ws://{control}", KEY.reveal(), way],
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert (done.returncode, done.stdout.splitlines()) == (code, says), done.stderr
    assert done.stderr.splitlines()[-1:] == (["KeyboardInterrupt"] if way == "ctrl-c" else [])
