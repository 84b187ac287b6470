"""Transport `process`: programs that are ended, and nothing that survives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from process_rig import (
    FOR_EVER,
    LINUX,
    READY,
    REAL_PROGRAMS,
    STUBBORN,
    connected,
    failure_of,
    no_process_left,
    parent_of,
    programs_in,
    run_files,
    run_for,
)
from rig import eventually, nothing_left_behind, wait_until

from pioneer_tunnel._model.errors import ProcessExitedError
from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel.gateway.runtime_folder import load_instance

pytestmark = REAL_PROGRAMS


@LINUX
async def test_it_is_asked_first(tmp_path: Path) -> None:
    source = f"""
        def end(*_):
            os.write(1, b"bye\\n" * 100_000)
            open(sys.argv[1], "w").close()
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        {READY.strip()}
        time.sleep(600)
    """
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, source, str(tmp_path / "polite"), stop_grace_ms=60_000)):
            pass
    assert (tmp_path / "polite").exists()


@LINUX
async def test_one_that_does_not_listen_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        run = run_for(tmp_path, textwrap.dedent(STUBBORN) + FOR_EVER, stop_grace_ms=300)
        async with connected(run):
            await eventually(lambda: len(programs_in(tmp_path)) == 5)
            started = trio.current_time()
        assert trio.current_time() - started >= 0.3


@LINUX
async def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    source = textwrap.dedent(STUBBORN) + "print('gone', flush=True); os._exit(3)"
    with no_process_left(tmp_path):
        error = await failure_of(run_for(tmp_path, source, stop_grace_ms=200))
    assert "exit status 3, saying: gone" in str(error)


@LINUX
async def test_its_guardian_is_killed(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        run = run_for(tmp_path, textwrap.dedent(STUBBORN.replace("(1, True)", "(1, False)")) + FOR_EVER)

        async def kill_the_guardian() -> None:
            async with connected(run):
                os.kill(parent_of(min(programs_in(tmp_path))), signal.SIGKILL)
                await trio.sleep_forever()

        with pytest.raises(ProcessExitedError, match="guardian"), lone_error_bare():
            await kill_the_guardian()
        await eventually(lambda: not programs_in(tmp_path))


async def test_a_guardian_that_cannot_be_started_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tmp_path, FOR_EVER)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with nothing_left_behind():
        error = await failure_of(run)
    assert isinstance(error, ProcessExitedError)
    assert "the guardian of the tunnel program cannot be started" in str(error)
    assert "no-python" in str(error)


@LINUX
async def test_its_guardian_is_asked_to_end(tmp_path: Path) -> None:
    """As a service manager does that ends all processes of a service at once."""

    async def ask_the_guardian() -> None:
        async with connected(run_for(tmp_path, FOR_EVER)):
            os.kill(parent_of(min(programs_in(tmp_path))), signal.SIGTERM)
            await trio.sleep_forever()

    with no_process_left(tmp_path), pytest.raises(ProcessExitedError, match="ended by SIGTERM"), lone_error_bare():
        await ask_the_guardian()


@LINUX
async def test_cancelled_anywhere_nothing_is_left(tmp_path: Path) -> None:
    """Each checkpoint of the start, one after the other, until it is up."""
    run = run_for(tmp_path, FOR_EVER, "{config}", config_template="{key}", key_on_stdin=True)
    checkpoints = 0
    with no_process_left(tmp_path):
        while True:
            up = trio.Event()
            with trio.CancelScope() as scope:
                instrument = _CancelAt(checkpoints, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with connected(run):
                        up.set()
                finally:
                    if not instrument.spent:
                        trio.lowlevel.remove_instrument(instrument)
            assert programs_in(tmp_path) == {}
            assert run_files(tmp_path) == []
            if up.is_set():
                break
            checkpoints += 1
    assert checkpoints > 5


class _CancelAt(trio.abc.Instrument):
    """Cancels when tasks have been resumed so many times."""

    def __init__(self, steps: int, scope: trio.CancelScope) -> None:
        self._steps = steps
        self._scope = scope
        self.spent = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._steps == 0 and not self.spent:
            self.spent = True
            trio.lowlevel.remove_instrument(self)
            self._scope.cancel()
        self._steps -= 1


GATEWAY: Final = """
    import sys, threading, trio
    trio._core._thread_cache.IDLE_TIMEOUT = 0.2
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../support"]
    from pathlib import Path
    from process_rig import FOR_EVER, STUBBORN, connected, run_for
    import textwrap

    async def main():
        run = run_for(Path(sys.argv[2]), textwrap.dedent(STUBBORN) + FOR_EVER, "{key_file}")
        async with connected(run):
            print("up", flush=True)
            while threading.active_count() > 1:
                await trio.sleep(0.01)
            print("still", flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


@LINUX
def test_killed_ourselves_nothing_survives(tmp_path: Path) -> None:
    """The thread that has forked ends when it is idle; nobody may take that for our death."""
    gateway = [sys.executable, "-c", textwrap.dedent(GATEWAY), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(gateway, stdout=subprocess.PIPE, text=True) as us:
        assert us.stdout is not None
        assert us.stdout.readline() == "up\n"
        wait_until(lambda: len(living(tmp_path, us.pid)) == 5)
        before = living(tmp_path, us.pid)
        assert us.stdout.readline() == "still\n"
        assert living(tmp_path, us.pid) == before
        assert len(run_files(tmp_path)) == 1
        us.kill()
        us.wait()
        wait_until(lambda: not living(tmp_path, us.pid))
        wait_until(lambda: not run_files(tmp_path))


def living(folder: Path, us: int) -> set[int]:
    return set(programs_in(folder)) - {us}


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    instance = load_instance(folder)
    mine = ["process-0123456789abcdef.key", ".process-0123456789abcdef.conf.0a1b2c3d4e5f6071.pioneer-tmp"]
    others = ["process-of-mine.key", "frpc.toml", "process-0123456789abcdef.d", ".process.pioneer-tmp"]
    (folder / others[2]).mkdir()
    for name in [*mine, *others[:2], others[3]]:
        (folder / name).write_text("x")
    (folder / others[2]).rename(folder / "folder")
    assert load_instance(folder) == instance
    assert {path.name for path in folder.iterdir()} == {"instance", "instance.lock", "folder", *others[:2], others[3]}
