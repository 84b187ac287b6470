"""Standard error that takes nothing: it is lost, and no traffic waits for it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from programs import KEY, Relay, key_file, run, running

pytestmark = pytest.mark.usefixtures("user_config")


PIPE_SIZE: Final = 4096


def small_pipe() -> tuple[int, int]:
    """A pipe that is soon full."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer


NO_STANDARD_ERROR: Final[dict[str, Callable[[], int | None]]] = {
    "closed": lambda: None,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "a pipe without a reader": lambda: without_reader(*small_pipe()),
}


def without_reader(reader: int, writer: int) -> int:
    os.close(reader)
    return writer


@pytest.mark.slow
@pytest.mark.parametrize("open_stderr", NO_STANDARD_ERROR.values(), ids=[*NO_STANDARD_ERROR])
def test_standard_error_that_takes_nothing_stops_no_traffic(
    relay: Relay, local_gateway: str, open_stderr: Callable[[], int | None]
) -> None:
    stderr = open_stderr()
    try:
        key = relay.folder / "key"
        arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", key]
        with running("-v", *arguments, stderr=stderr) as program:
            relay.ask_until("/one", b"hello from /one")
            # A relay that goes away makes it write more statuses.
            assert relay.program.interrupt(signal.SIGTERM) == 0
            with running("-v", "relay", "--config", relay.folder / "relay.toml", stderr=stderr) as again:
                relay.ask_until("/two", b"hello from /two")
                assert program.interrupt(signal.SIGTERM) == 0
                assert again.interrupt(signal.SIGTERM) == 0
    finally:
        if stderr is not None:
            os.close(stderr)


def test_a_pipe_that_is_not_read_stops_no_traffic(relay: Relay, local_gateway: str) -> None:
    reader, writer = small_pipe()
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with os.fdopen(reader, "rb") as pipe, running(*arguments, stderr=writer) as program:
        os.close(writer)
        relay.ask_until("/0", b"hello from /0")
        for number in range(1, 150):
            program.process.send_signal(signal.SIGHUP)  # it answers with a line, and these fill the pipe
            assert relay.ask(f"/{number}").endswith(f"hello from /{number}".encode())
        said: list[bytes] = []
        read = threading.Thread(target=lambda: said.append(pipe.read()))
        read.start()
        # Once the pipe is read, what was queued arrives, and how much was not.
        assert program.interrupt(signal.SIGTERM) == 0
        read.join()
    assert len(said[0]) > 2 * PIPE_SIZE
    lines = said[0].decode().splitlines()
    assert any(line.startswith("connected ") for line in lines)
    assert lines[-1].startswith("stopped")


@pytest.mark.slow
def test_a_pipe_that_is_never_read_does_not_keep_it_from_ending(relay: Relay, local_gateway: str) -> None:
    reader, writer = small_pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(512)):
            pass
    os.set_blocking(writer, True)
    try:
        key = relay.folder / "key"
        arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", key]
        with running(*arguments, stderr=writer) as program:
            relay.ask_until("/", b"hello from /")
            assert os.get_blocking(writer), "other processes share the descriptor"
            assert program.interrupt(signal.SIGTERM) == 0
        assert run("relay", "--config", "nowhere", stderr=writer).process.returncode == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_the_log_is_there_for_machines_too(shared_relay: Relay, tmp_path: Path, local_gateway: str) -> None:
    key = key_file(tmp_path, KEY.reveal())
    key.chmod(0o644)
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", shared_relay.url, "--key-file", key]
    with running(*arguments, "--json") as program:
        program.wait_for('"connected"')
        assert program.interrupt(signal.SIGINT) == 0
    lines = [json.loads(line) for line in program.err.decode().splitlines()]
    logged = [line for line in lines if "log" in line]
    assert [line["state"] for line in lines if line not in logged] == ["starting", "connected", "stopped"]
    assert [(line["level"], line["logger"]) for line in logged] == [
        ("WARNING", "pioneer_tunnel.cli"),
        ("INFO", "pioneer_tunnel.cli"),
    ]
    assert "can be read by others" in logged[0]["log"]
    assert logged[1]["log"] == "stopping: SIGINT"
