"""`pioneer-tunnel diagnose`: the table, the JSON, and the exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
from click.testing import CliRunner, Result
from programs import KEY, Relay, key_file, running
from rig import HANG, free_port

from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.diagnosis.checks import Name

pytestmark = pytest.mark.usefixtures("user_config")

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "diagnose.md"


def diagnosed(*arguments: str | Path, columns: int = 80) -> Result:
    """What the command prints here, without a process of its own."""
    result = CliRunner().invoke(pioneer_tunnel, ["diagnose", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert KEY.reveal() not in result.output
    return result


def diagnosed_apart(*arguments: str | Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pioneer_tunnel", "diagnose", *map(str, arguments)]
    environment = {"COLUMNS": str(columns), "PATH": "/usr/bin:/bin"}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert KEY.reveal() not in completed.stdout + completed.stderr
    return completed


def test_the_table_fits_80_columns(shared_relay: Relay, local_gateway: str) -> None:
    gone = f"127.0.0.1:{free_port()}"
    completed = diagnosed_apart(gone, "--relay", shared_relay.url, "--key-file", shared_relay.folder / "key")
    table = re.sub(r"differs from the relay's by \d s", "differs from the relay's by 0 s", completed.stdout)
    table = re.sub(r"packets of \d+ bytes", "packets of 32768 bytes", table)
    assert (
        table
        == f"""\
relay {shared_relay.url}, transport websocket

names           ok       127.0.0.1 is an IP address, not a name
tcp             ok       127.0.0.1: connected
proxy           skipped  none is configured, and the environment names none
tls             skipped  the relay is dialled without TLS, on this host
interception    skipped  there is no TLS
captive portal  ok       a WebSocket answers, and no sign-in page
upgrade         ok       a relay answers (pioneer-tunnel.v1)
clock           ok       it differs from the relay's by 0 s
proof           ok       the relay accepts the key; visitors come in at
                         http://office.test
mtu             ok       packets of 32768 bytes reach the other end of the
                         connection
local gateway   failed   the local gateway at {gone} does not answer:
                         Connection refused
                         > Start the gateway, or correct its address.
"""
    )
    assert completed.returncode == 20
    assert completed.stderr == ""
    assert (
        diagnosed(local_gateway, "--relay", shared_relay.url, "--key-file", shared_relay.folder / "key").exit_code == 0
    )


def test_no_line_is_wider_than_the_terminal() -> None:
    for columns in (60, 80, 200):
        printed = diagnosed("--relay", "ws://127.0.0.1:1", columns=columns).stdout
        assert max(map(len, printed.splitlines())) <= columns


def schema() -> dict[str, Any]:
    [found] = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    loaded: dict[str, Any] = json.loads(found)
    return loaded


def test_the_json_has_the_documented_schema(shared_relay: Relay) -> None:
    completed = diagnosed("--relay", shared_relay.url, "--key-file", shared_relay.folder / "key", "--json")
    report = json.loads(completed.stdout)
    jsonschema.validate(report, schema())
    assert report["exit_status"] == completed.exit_code == 0
    assert [check["name"] for check in report["checks"]] == [*Name]
    failed = diagnosed("--relay", "ws://127.0.0.1:1", "--json")
    jsonschema.validate(json.loads(failed.stdout), schema())
    assert json.loads(failed.stdout)["exit_status"] == failed.exit_code == 11


def test_the_document_has_every_check_and_its_exit_status() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| .* \| (\d+)", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [(str(name), str(10 + position)) for position, name in enumerate(Name)]
    assert schema()["properties"]["checks"]["items"]["properties"]["name"]["enum"] == [*Name]
    help_text = " ".join(CliRunner().invoke(pioneer_tunnel, ["diagnose", "--help"]).output.split())
    assert all(f"{status} {name}" in help_text for name, status in rows)


def test_a_file_of_a_gateway_and_the_key_are_enough(shared_relay: Relay, local_gateway: str, tmp_path: Path) -> None:
    home = tmp_path / "gateway"
    (home / "remote-access").mkdir(parents=True)
    (home / "remote-access" / "instance").write_text("0123456789abcdef" * 2)
    (home / "gateway.toml").write_text(
        f'[gateway.remote_access]\nrelay_addr = "{shared_relay.url}"\nlocal_addr = "{local_gateway}"\n'
    )
    completed = diagnosed("--config", home / "gateway.toml", "--key-file", shared_relay.folder / "key", "--json")
    assert [check["outcome"] for check in json.loads(completed.stdout)["checks"]].count("ok") == 8
    assert [path.name for path in (home / "remote-access").iterdir()] == ["instance"]  # nothing is written


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name the relay with --relay"),
        (["--relay", "http://relay.test"], "relay_addr"),
        (["--relay", "ws://relay.test", "--ca-file", "gone.pem"], "there is no file 'gone.pem'"),
        (["--relay", "relay.test:1", "--transport", "tcp", "--relay-identity", "ed25519:" + "00" * 32], "identity"),
        (["nonsense", "--relay", "ws://relay.test"], "LOCAL"),
        (["1", "--relay", "ws://relay.test", "--local-ca-file", __file__], "--local-ca-file is for a LOCAL with https"),
    ],
)
def test_what_cannot_be_checked_is_refused_first(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(pioneer_tunnel, ["diagnose", *arguments])
    assert result.exit_code in {1, 2}
    assert told in " ".join(result.output.split())


def test_a_file_has_everything(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text("[gateway.remote_access]\n")
    arguments = ["diagnose", "--config", str(tmp_path / "gateway.toml"), "--relay", "ws://relay.test"]
    result = CliRunner().invoke(pioneer_tunnel, arguments)
    assert result.exit_code == 2
    assert "leave LOCAL and the other options out" in result.output


def test_a_gateway_that_runs_serves_on(shared_relay: Relay, local_gateway: str) -> None:
    arguments: list[str | Path] = ["--relay", shared_relay.url, "--key-file", shared_relay.folder / "key"]
    with running("expose", local_gateway, *arguments) as exposed:
        exposed.wait_for("connected .*http://office.test")
        assert diagnosed(local_gateway, *arguments).exit_code == 0
        assert shared_relay.ask("/after").endswith(b"hello from /after")
        exposed.process.terminate()
        exposed.finish()
        assert exposed.errors.count("connected") == 1


def test_a_key_that_cannot_be_used_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = key_file(tmp_path, "short-secret\n")
    result = CliRunner().invoke(pioneer_tunnel, ["diagnose", "--relay", "ws://127.0.0.1:1", "--key-file", str(path)])
    assert result.exit_code == 1
    assert "short-secret" not in result.output
