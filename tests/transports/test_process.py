"""Transport `process`, with real programs: how they come up, or do not, and what a gateway sees of it."""

from __future__ import annotations

import functools
import logging
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from process_rig import (
    FOR_EVER,
    KEY,
    LINUX,
    REAL_PROGRAMS,
    Run,
    connected,
    failure_of,
    no_process_left,
    programs_in,
    run_for,
    run_of,
    write_program,
)
from rig import HANG, eventually

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    MissingBinaryError,
    RelayConnectError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import SettingsFile, SettingsUpdate
from pioneer_tunnel.transports.interface import Session, Target
from pioneer_tunnel.transports.process import program as program_module
from pioneer_tunnel.transports.process.config import ProbeUrl, ProcessConfig, TunnelProgram
from pioneer_tunnel.transports.process.http_probe import ask_for_status
from pioneer_tunnel.transports.process.program import ProcessTransport

pytestmark = REAL_PROGRAMS


async def failure_by_timeout(run: Run, clock: trio.testing.MockClock, condition: Callable[[], bool]) -> TunnelError:
    """What comes of a program when 60 seconds of its startup are over, which they are as soon as `condition` holds."""
    clock.rate = 1
    starting_up = trio.Event()
    until_connected = program_module._until_connected

    async def note(*arguments: Any) -> None:
        starting_up.set()
        await until_connected(*arguments)

    async def let_time_pass() -> None:
        await starting_up.wait()
        await eventually(condition)
        clock.jump(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "_until_connected", note)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_time_pass)
            return await failure_of(run)


# Coming up


@LINUX
async def test_connected_when_the_pattern_matches_a_line(tmp_path: Path) -> None:
    source = "sys.stderr.write('not ready\\n\\x1b[32mready\\x1b[0m\\r\\n'); sys.stderr.flush(); time.sleep(600)"
    with no_process_left(tmp_path):
        run = run_for(tmp_path, source, public_url="https://office.example.com")
        async with connected(run) as session:
            assert session == Session(public_url="https://office.example.com")
            assert len(programs_in(tmp_path)) == 1


@LINUX
async def test_connected_when_it_has_run_for_a_while(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        started = trio.current_time()
        async with connected(run_for(tmp_path, FOR_EVER, connected_pattern=None, settle_ms=150)):
            assert trio.current_time() - started >= 0.15


@pytest.mark.parametrize(("status", "accepted"), [(404, ()), (502, (200,)), (401, (200, 401))])
async def test_connected_when_the_probe_is_answered(
    tmp_path: Path, status: int, accepted: tuple[int, ...], mock_clock: trio.testing.MockClock
) -> None:
    """The site answers badly, then with the status."""
    asked: list[bytes] = []
    mock_clock.rate = 1

    async def site(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append(bytes(await stream.receive_some(4096)))
            answer = {1: b"", 2: b"SSH-2.0-x\r\n"}.get(len(asked), f"HTTP/1.1 {status} Whatever\r\n\r\n".encode())
            await stream.send_all(answer)

    async def dial(host: str, port: int) -> trio.SocketStream:
        assert (host, port) == ("office.test", 8000)
        return await trio.testing.open_stream_to_socket_listener(listener)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    run = run_for(
        tmp_path,
        FOR_EVER,
        connected_pattern=None,
        probe_url="http://office.test:8000/health",
        probe_interval_ms=10,
        probe_statuses=accepted,
        startup_timeout_ms=60_000,
        dial=dial,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, site, [listener])
        if accepted == (200,):
            error = await failure_by_timeout(run, mock_clock, lambda: len(asked) > 3)
            assert isinstance(error, RelayConnectError)
            assert "answers with HTTP status 502" in str(error)
        else:
            async with connected(run):
                assert asked[0].startswith(b"GET /health HTTP/1.1\r\nHost: office.test:8000\r\n")
                assert len(asked) == 3
        nursery.cancel_scope.cancel()


async def test_a_probe_inside_tls() -> None:
    authority = trustme.CA()
    server, client, stranger = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), *(client_tls() for _ in range(2))
    authority.issue_cert("office.test").configure_cert(server)
    authority.configure_trust(client)

    async def site(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.0 204\r\n\r\n")

    async def dial(host: str, port: int) -> trio.SocketStream:
        return await trio.testing.open_stream_to_socket_listener(listener)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = ProbeUrl.parse("https://office.test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, site, [trio.SSLListener(listener, server)])
        assert await ask_for_status(url, dial=dial, make_tls=lambda: client, timeout=HANG) == 204
        refused = await ask_for_status(url, dial=dial, make_tls=lambda: stranger, timeout=HANG)
        assert "not trusted" in str(refused)
        nursery.cancel_scope.cancel()


async def test_the_startup_is_bounded(
    tmp_path: Path, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run = run_for(tmp_path, "print('login failed', flush=True); time.sleep(600)", startup_timeout_ms=60_000)
    with no_process_left(tmp_path):
        error = await failure_by_timeout(run, mock_clock, lambda: "says: login failed" in caplog.text)
    assert isinstance(error, RelayConnectError)
    assert not error.final
    assert "after 60 seconds: no line of its output matches connected_pattern; it says: login failed" in str(error)


# Not there, not executable


@pytest.mark.parametrize(
    ("make", "command", "says"),
    [
        (None, "no-such-program", "is not installed"),
        (None, "./no-such-program", "no-such-program is not there"),
        (None, "run/", "is a folder"),
        (0o600, "./program", "not executable by this user"),
        (0o755, "./program", "no program for this machine"),
    ],
)
async def test_a_missing_program(tmp_path: Path, make: int | None, command: str, says: str) -> None:
    if make is not None:
        (tmp_path / "program").write_bytes(b"\x00\x01")
        (tmp_path / "program").chmod(make)
    config = ProcessConfig(command=[command, "{config}"], config_template="{key}")
    with no_process_left(tmp_path):
        error = await failure_of(run_of(config, tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert says in str(error)
    if command == "no-such-program":
        assert str(error).endswith(os.environ["PATH"])


async def test_a_script_without_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program").write_text("#!/no/such/interpreter\n")
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = await failure_of(run_of(ProcessConfig(command=["program"]), tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert "interpreter" in str(error)
    (tmp_path / "program").chmod(0o644)
    error = await failure_of(run_of(ProcessConfig(command=["program"]), tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert f"{tmp_path}/program is not executable" in str(error)


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    config = ProcessConfig(command=[sys.executable])
    program = TunnelProgram(config, local=Address("::1", 1), runtime_folder=tmp_path, folder=tmp_path / "none")
    error = await failure_of(
        functools.partial(
            ProcessTransport(program=program), Target(address=RelayAddress(None, "relay.test", 1), key=KEY)
        )
    )
    assert isinstance(error, InvalidSettingsError)
    assert str(tmp_path / "none") in str(error)


async def test_where_a_program_cannot_be_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_for(tmp_path, FOR_EVER)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert isinstance(await failure_of(run), UnsupportedTransportError)
    monkeypatch.setattr(program_module, "_IS_POSIX", False)
    error = await failure_of(run)
    assert isinstance(error, UnsupportedTransportError)
    assert "POSIX" in str(error)


# As a gateway sees it


@asynccontextmanager
async def gateway(folder: Path, source: str, **changes: Any) -> AsyncIterator[RemoteAccess]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    config = RemoteAccessConfig(
        transport="process",
        runtime_dir="run",
        base_dir=folder,
        local_addr=f"127.0.0.1:{listener.socket.getsockname()[1]}",
        restart_initial_ms=50,
        process={"command": write_program(folder, source), "connected_pattern": "^ready$", **changes},
    )
    keystore = MemoryKeystore()
    remote_access = RemoteAccess(config, settings=SettingsFile(folder / "settings.toml"), keystore=keystore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, lambda stream: stream.aclose(), [listener])
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        yield remote_access
        nursery.cancel_scope.cancel()


async def test_as_a_gateway_sees_it(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        async with gateway(tmp_path, FOR_EVER, public_url="https://office.example.com") as remote_access:
            await eventually(lambda: remote_access.status.state is State.CONNECTED)
            wire = (await remote_access.snapshot()).to_wire()
            assert (wire["transport"], wire["transport_detail"]) == ("tcp", "process")
            assert wire["status"]["public_url"] == "https://office.example.com"
            (tmp_path / "run" / "frpc.log").touch()
            await remote_access.apply(SettingsUpdate(enabled=False))
            await eventually(lambda: remote_access.status.state is State.DISABLED)
            assert programs_in(tmp_path) == {}
        (tmp_path / "run" / "frpc.log").unlink()  # the program's own, and not ours to remove


async def test_a_program_that_ends_is_started_again(tmp_path: Path) -> None:
    source = """
        runs = os.path.join(os.path.dirname(__file__), "runs")
        with open(runs, "a") as file:
            file.write("x")
        if os.path.getsize(runs) != 2:
            sys.exit("no")
        print("ready", flush=True)
        while not os.path.exists(runs + "-end"):
            time.sleep(0.01)
        sys.exit("enough")
    """
    async with gateway(tmp_path, source) as remote_access:
        await eventually(lambda: remote_access.status.state is State.CONNECTED)
        (tmp_path / "runs-end").touch()
        await eventually(lambda: remote_access.status.state is State.RECONNECTING)
        seen = [(status.state, status.error_kind) for status in remote_access.history]
        message = remote_access.status.message
    for moment in (
        (State.FAILED, ErrorKind.PROCESS_EXITED),
        (State.CONNECTED, None),
        (State.RECONNECTING, ErrorKind.PROCESS_EXITED),
    ):
        assert moment in seen
    assert message is not None
    assert message.endswith("ended with exit status 1, saying: ready | enough")


async def test_a_missing_program_is_final(tmp_path: Path) -> None:
    async with gateway(tmp_path, "", command=["no-such-program"]) as remote_access:
        await eventually(lambda: remote_access.status.state is State.FAILED)
        status = remote_access.status
    assert status.error_kind is ErrorKind.MISSING_BINARY
    assert status.retry_at_unix is None
    assert status.message is not None
    assert "'no-such-program' is not installed" in status.message
