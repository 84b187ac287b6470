"""The access log and the log of the commands: SIGHUP after a rename, and JSON."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest
from programs import KEY, Relay, relay_in, run, running
from rig import wait_until


def paths_in(log: Path) -> list[str]:
    return [json.loads(line)["path"] for line in log.read_text().splitlines()] if log.exists() else []


def test_both_ends_log_requests_and_go_on_in_a_new_file_after_a_rename(tmp_path: Path, local_gateway: str) -> None:
    """As logrotate does it: rename, then SIGHUP."""
    more = 'access_log = "relay.log"\naccess_log_format = "json"'
    with relay_in(tmp_path, more=more) as relay:
        here, there = tmp_path / "gateway.log", tmp_path / "relay.log"
        arguments: list[str | Path] = [
            "expose",
            local_gateway,
            "--relay",
            relay.url,
            "--key-file",
            relay.folder / "key",
        ]
        with running(*arguments, "--access-log", here, "--access-log-format", "json") as gateway:
            gateway.wait_for("connected .*http://office.test")
            assert relay.ask("/one?token=s3cret").endswith(b"hello from /one?token=s3cret")
            wait_until(lambda: paths_in(here) == paths_in(there) == ["/one"])
            assert stat.S_IMODE(here.stat().st_mode) == stat.S_IMODE(there.stat().st_mode) == 0o600
            for log, program in ((here, gateway), (there, relay.program)):
                log.rename(log.with_suffix(".old"))
                program.process.send_signal(signal.SIGHUP)
            wait_until(lambda: here.exists() and there.exists())
            assert relay.ask("/two").endswith(b"hello from /two")
            wait_until(lambda: paths_in(here) == paths_in(there) == ["/two"])
            assert gateway.interrupt(signal.SIGTERM) == 0
        assert paths_in(here.with_suffix(".old")) == paths_in(there.with_suffix(".old")) == ["/one"]


def test_an_access_log_that_cannot_be_written_stops_nobody(tmp_path: Path, local_gateway: str) -> None:
    with relay_in(tmp_path, more='access_log = "/dev/full"') as relay:
        arguments: list[str | Path] = [
            "expose",
            local_gateway,
            "--relay",
            relay.url,
            "--key-file",
            relay.folder / "key",
        ]
        with running(*arguments, "--access-log", tmp_path / "no folder" / "access.log") as gateway:
            gateway.wait_for("access log .* cannot be written.*No such file")
            gateway.wait_for("connected .*http://office.test")
            for _ in range(3):
                assert relay.ask("/one").endswith(b"hello from /one")
            relay.program.wait_for("access log /dev/full cannot be written.*No space left")
            assert gateway.interrupt(signal.SIGTERM) == 0


@pytest.mark.parametrize("option", ["--log-format=json", "--json"])
def test_log_lines_as_json(shared_relay: Relay, local_gateway: str, option: str) -> None:
    arguments: list[str | Path] = [
        "expose",
        local_gateway,
        "--relay",
        shared_relay.url,
        "--key-file",
        shared_relay.folder / "key",
        option,
    ]
    with running(*arguments) as gateway:
        gateway.wait_for("connected")
        gateway.process.send_signal(signal.SIGUSR1)
        gateway.wait_for("SIGUSR1")
        assert gateway.interrupt(signal.SIGTERM) == 0
    lines = [line for line in gateway.err.decode().splitlines() if "SIGUSR1" in line]
    assert json.loads(lines[0])["level"] == "INFO"
    assert KEY.reveal() not in gateway.err.decode()


def test_the_log_of_a_relay_as_json(tmp_path: Path) -> None:
    with relay_in(tmp_path) as first:
        config = (first.folder / "relay.toml").read_text()
    (tmp_path / "relay.toml").write_text(config)
    with running("relay", "--log-format", "json", "--config", tmp_path / "relay.toml") as program:
        program.wait_for('"event": "listening"')
        assert program.interrupt(signal.SIGTERM) == 0
    assert all("log" in json.loads(line) for line in program.err.decode().splitlines())


def test_options_of_an_access_log_need_one(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY.reveal())
    arguments: list[str | Path] = ["expose", "1", "--relay", "wss://relay.test", "--key-file", tmp_path / "key"]
    result = run(*arguments, "--access-log-format", "json")
    assert result.process.returncode == 2
    assert "are for --access-log" in result.errors
