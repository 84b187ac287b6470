"""`run`, and the commands that speak to it: real processes, with a relay, a local server and a service manager."""

from __future__ import annotations

import json
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner
from programs import KEY, Program, Relay, run, running
from rig import HANG, wait_until

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    MissingBinaryError,
    MissingKeyError,
    RestartLimitError,
    StorageError,
    TunnelAuthError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._wire.json_rpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.exit_codes import EXIT_CODES, Failed, failures_explained

pytestmark = pytest.mark.usefixtures("user_config")

SECRET: Final = KEY.reveal()


def gateway(folder: Path, relay: str, local: str = "127.0.0.1:1", more: str = "") -> Path:
    """The configuration of a gateway."""
    folder.mkdir(exist_ok=True)
    config = folder / "gateway.toml"
    config.write_text(f'[gateway.remote_access]\nrelay_addr = "{relay}"\nlocal_addr = "{local}"\n{more}\n')
    return config


def command(*arguments: str | Path, config: Path, stdin: str | None = None) -> str:
    """Run a command to its end, which has to be a good one; returns its standard output."""
    result = CliRunner().invoke(pioneer_tunnel, [*map(str, arguments), "--config", str(config)], input=stdin)
    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    return result.output


def ready(config: Path) -> None:
    """Store the key, and switch remote access on."""
    command("key", "set", config=config, stdin=f"{SECRET}\n")
    command("enable", config=config)


def status(config: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command("status", "--json", config=config).splitlines()[-1])
    return found


def test_a_gateway_is_switched_while_it_runs(shared_relay: Relay, tmp_path: Path, local_gateway: str) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway)
    with running("run", "--config", config) as program:
        program.wait_for("disabled")
        assert status(config)["running"] is True
        command("key", "set", config=config, stdin=SECRET)
        said = command("enable", config=config)
        assert re.search(r"state: +connected +visitors come in at http://office.test", said)
        assert shared_relay.ask("/one").endswith(b"hello from /one")
        assert status(config)["remote_access"]["status"]["public_url"] == "http://office.test"
        assert "disabled" in command("disable", config=config)
        assert not shared_relay.ask("/two").endswith(b"hello from /two")
        command("enable", config=config)
        assert shared_relay.ask("/three").endswith(b"hello from /three")
        assert SECRET not in program.errors
        assert program.interrupt(signal.SIGTERM) == 0
    assert status(config)["running"] is False
    assert status(config)["remote_access"]["enabled"] is True


def test_settings_and_key_are_kept_in_files_while_nothing_runs(
    shared_relay: Relay, tmp_path: Path, local_gateway: str
) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway)
    before = status(config)
    assert before == {"running": False, "remote_access": before["remote_access"]}
    assert (before["remote_access"]["enabled"], before["remote_access"]["has_key"]) == (False, False)
    ready(config)
    assert command("key", "show-id", config=config) == f"{KEY.identity().public_key}\n"
    shown = json.loads(command("key", "show-id", "--json", config=config))
    assert shown == {"public_key": str(KEY.identity().public_key)}
    with running("run", "--config", config, "--json") as program:
        program.wait_for('"connected"')
        assert program.interrupt(signal.SIGINT) == 0
        states = [line["state"] for line in map(json.loads, program.err.decode().splitlines()) if "state" in line]
        assert (states[:3], states[-1]) == (["disabled", "starting", "connected"], "stopped")
    command("key", "clear", config=config)
    assert status(config)["remote_access"]["has_key"] is False
    result = CliRunner().invoke(pioneer_tunnel, ["key", "show-id", "--config", str(config)])
    assert (result.exit_code, "no relay key is stored" in result.output) == (32, True)


def test_a_log_in_json_and_an_access_log_that_a_rename_and_sighup_rotate(
    shared_relay: Relay, tmp_path: Path, local_gateway: str
) -> None:
    """As logrotate does it."""
    log = tmp_path / "access.log"
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway, more=f'access_log = "{log}"')
    ready(config)
    with running("run", "--config", config, "--log-format", "json") as program:
        program.wait_for("connected +visitors come in at")
        assert shared_relay.ask("/one").endswith(b"hello from /one")
        wait_until(lambda: log.exists() and "/one" in log.read_text())
        log.rename(tmp_path / "old.log")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for('"log": "SIGHUP: the configuration was read again"')
        assert shared_relay.ask("/two").endswith(b"hello from /two")
        wait_until(lambda: log.exists() and "/two" in log.read_text())
        assert "/two" not in (tmp_path / "old.log").read_text()
        assert program.interrupt(signal.SIGTERM) == 0


def test_a_key_that_is_deleted_on_request_is_no_failure_of_the_command(shared_relay: Relay, tmp_path: Path) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url)
    ready(config)
    with running("run", "--stay", "--config", config) as program:
        program.wait_for("connected")
        assert "no relay key is stored" in command("key", "clear", config=config)
        assert program.interrupt(signal.SIGTERM) == 0


def test_a_second_one_is_refused_and_a_killed_one_is_replaced(shared_relay: Relay, tmp_path: Path) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url)
    with running("run", "--config", config) as first:
        first.wait_for("disabled")
        second = run("run", "--config", config)
        assert second.process.returncode == EXIT_CODES[ErrorKind.IO] == 41
        assert "another process already runs with" in second.errors
        folder = config.parent / "remote-access"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "control.sock").stat().st_mode) == 0o600
        first.process.kill()
        first.process.wait()
    assert (folder / "control.sock").exists()
    assert status(config)["running"] is False
    with running("run", "--config", config) as again:
        again.wait_for("disabled")
        assert status(config)["running"] is True
        assert again.interrupt(signal.SIGTERM) == 0


def test_what_the_gateway_refuses_is_explained(shared_relay: Relay, tmp_path: Path) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url)
    for runs in (False, True):
        with running("run", "--config", config) if runs else running("version") as program:
            if runs:
                program.wait_for("disabled")
            arguments = ["key", "set", "--config", str(config)]
            for key, told in (
                ("too-short", "shorter than 20"),
                (str(KEY.identity().public_key), "public half"),
                ("", "empty"),
            ):
                result = CliRunner().invoke(pioneer_tunnel, arguments, input=key)
                assert result.exit_code == 1
                assert told in result.output
            result = CliRunner().invoke(pioneer_tunnel, [*arguments, SECRET])
            assert result.exit_code == 2
            assert SECRET not in result.output


@pytest.mark.slow
def test_sighup_reads_the_configuration_again(shared_relay: Relay, tmp_path: Path, local_gateway: str) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, "127.0.0.1:1")
    ready(config)
    with running("run", "--config", config) as program:
        program.wait_for("connected")
        good = config.read_text()
        config.write_text(good.replace("relay_addr", "relay_adr"))
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("the configuration stays: .*relay_adr: unknown key")
        config.write_text(f'{good}runtime_dir = "elsewhere"\n')
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("runtime_dir changes with a restart only")
        config.write_text(good.replace('"127.0.0.1:1"', f'"{local_gateway}"'))
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("the configuration was read again")
        shared_relay.ask_until("/one", b"hello from /one")
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for("SIGUSR1: checking the link")
        assert program.interrupt(signal.SIGTERM) == 0


@contextmanager
def service_manager(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.settimeout(HANG)
        notified.bind(str(folder / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "n"))
        yield notified


def heard_until(notified: socket.socket, wanted: str) -> list[str]:
    heard: list[str] = []
    while wanted not in "\n".join(heard):
        heard.append(notified.recv(4096).decode())
    return heard


def test_systemd_is_told_what_goes_on(
    shared_relay: Relay, tmp_path: Path, local_gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway)
    ready(config)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    with service_manager(monkeypatch, tmp_path) as notified, running("run", "--config", config) as program:
        first = heard_until(notified, "STATUS=connected: http://office.test")
        assert first[0] == "READY=1"
        assert len([heard for heard in heard_until(notified, "WATCHDOG=1") if heard == "WATCHDOG=1"]) == 1
        program.process.send_signal(signal.SIGHUP)
        reloading = next(heard for heard in heard_until(notified, "RELOADING=1") if "RELOADING" in heard)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
        assert int(reloading.rpartition("=")[2]) <= time.monotonic_ns() // 1000
        heard_until(notified, "READY=1")
        program.process.send_signal(signal.SIGTERM)
        heard_until(notified, "STOPPING=1")
        assert program.finish() == 0


# Exit codes


def test_each_error_kind_has_an_exit_code_of_its_own() -> None:
    assert EXIT_CODES.keys() == {*ErrorKind}
    assert len({*EXIT_CODES.values()}) == len(EXIT_CODES)
    assert not {*EXIT_CODES.values()} & {*range(21), *range(64, 79), *range(124, 256)}


def test_the_page_has_each_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    assert dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)) == {
        str(code): str(kind) for kind, code in EXIT_CODES.items()
    }


@pytest.mark.parametrize(
    "error",
    [
        InvalidSettingsError("x"),
        MissingKeyError("x"),
        MissingBinaryError("x"),
        StorageError("x"),
        TunnelAuthError("x"),
        RestartLimitError("x"),
        UnsupportedTransportError("x"),
    ],
)
def test_an_error_of_ours_becomes_its_exit_code(error: Any) -> None:
    with pytest.raises(Failed) as raised, failures_explained():
        raise error
    assert raised.value.exit_code == EXIT_CODES[error.kind]


@pytest.mark.parametrize(("code", "exit_code"), [(INVALID_PARAMS, 31), (INTERNAL_ERROR, 30)])
def test_what_a_running_gateway_refuses_becomes_an_exit_code(code: int, exit_code: int) -> None:
    with pytest.raises(Failed) as raised, failures_explained():
        raise RpcError(code, "x")
    assert raised.value.exit_code == exit_code


PROCESS: Final = 'transport = "process"\n[gateway.remote_access.process]\ncommand = ["/nonexistent/program"]'
FAILURES: Final[dict[ErrorKind, tuple[str, str]]] = {
    ErrorKind.INVALID_SETTINGS: ("ANOTHER NAME OF IT", ""),
    ErrorKind.MISSING_BINARY: ("h:1", PROCESS),
    ErrorKind.UNSUPPORTED_TRANSPORT: ("h:1", 'transport = "noise"'),
    ErrorKind.RESTART_LIMIT_REACHED: ("ws://127.0.0.1:1", "max_restarts = 1\nrestart_initial_ms = 1"),
    ErrorKind.IO: ("RELAY", 'access = { basic_auth = "gone" }'),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_that_is_final_ends_run_with_its_exit_code(
    shared_relay: Relay, tmp_path: Path, kind: ErrorKind
) -> None:
    relay, more = FAILURES[kind]
    url = shared_relay.url
    names = {"RELAY": url, "ANOTHER NAME OF IT": url.replace("127.0.0.1", "localhost")}
    config = gateway(tmp_path / "gateway", names.get(relay, relay), more=more)
    command("key", "set", config=config, stdin=SECRET)
    CliRunner().invoke(pioneer_tunnel, ["enable", "--config", str(config)])
    program = run("run", "--config", config, "--json")
    assert f'"error_kind": "{kind}"' in program.errors
    assert program.process.returncode == EXIT_CODES[kind]


def test_run_may_stay_after_a_failure_until_the_settings_change(
    shared_relay: Relay, tmp_path: Path, local_gateway: str
) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway)
    command("enable", config=config)
    with running("run", "--config", config, "--stay") as program:
        program.wait_for("failed .*no relay key is stored")
        result = CliRunner().invoke(pioneer_tunnel, ["enable", "--config", str(config)])
        assert result.exit_code == EXIT_CODES[ErrorKind.MISSING_KEY]
        command("key", "set", config=config, stdin=SECRET)
        program.wait_for("connected")
        assert program.interrupt(signal.SIGTERM) == 0


@pytest.mark.slow
def test_status_watches_a_running_gateway(shared_relay: Relay, tmp_path: Path, local_gateway: str) -> None:
    config = gateway(tmp_path / "gateway", shared_relay.url, local_gateway)
    ready(config)
    with running("run", "--config", config) as program:
        program.wait_for("connected")
        watcher = Program("status", "--watch", "--json", "--config", config)
        assert watcher.process.stdout is not None
        assert json.loads(watcher.process.stdout.readline())["running"] is True
        command("disable", config=config)
        assert json.loads(watcher.process.stdout.readline())["state"] == "disabled"
        assert program.interrupt(signal.SIGTERM) == 0
        assert watcher.finish() == 0
        assert "has ended" in watcher.errors


def test_a_configuration_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("[gateway.remote_access]\nrelay_adr = 1\n")
    for name in ("run", "status", "enable"):
        result = CliRunner().invoke(pioneer_tunnel, [name, "--config", str(config)])
        assert (result.exit_code, "relay_adr: unknown key" in result.output) == (31, True)
    program = run("run", "--json", "--config", config)  # the lowest click's `CliRunner` has one stream for both
    assert (program.process.returncode, program.out) == (31, b"")
    failure = json.loads(program.err)
    assert (failure["state"], failure["error_kind"]) == ("failed", "invalid_settings")
    assert "relay_adr: unknown key" in failure["message"]
    result = CliRunner().invoke(pioneer_tunnel, ["run"])
    assert (result.exit_code, "--config" in result.output) == (2, True)
    assert [*tmp_path.iterdir()] == [config], "nothing was made"
