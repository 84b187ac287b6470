"""Where the options of `expose` come from: the command line, then the environment, then the client file."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

import click
import pytest
from click.testing import CliRunner, Result
from programs import KEY, PROGRAM, Relay, key_file, local_gateway, running, shared_relay
from rig import HANG

from pioneer_tunnel.cli.arguments import RelayText, local_servers
from pioneer_tunnel.cli.client_file import (
    ClientCommand,
    client_file_option,
    key_of,
    usual_client_file,
    variable_of,
)
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.expose import expose

pytestmark = pytest.mark.usefixtures("user_config")

__all__ = ["local_gateway", "shared_relay"]


@click.command(cls=ClientCommand)
@click.argument("local", nargs=-1)
@client_file_option
@click.option("--relay")
@click.option("--heartbeat", type=click.FloatRange(1, 60))
@click.option("--relays", type=RelayText(), multiple=True)
@click.option("--allow", multiple=True)
@click.option("--raw", is_flag=True)
@click.option("--ca-file", type=click.Path(path_type=Path))
@click.option("--key-file", type=click.Path(path_type=Path))
def shows(**values: object) -> None:
    """A command that says what it got."""
    click.echo("\n".join(f"{name}={value}" for name, value in sorted(values.items())))


def write(folder: Path, text: str) -> Path:
    path = folder / "pioneer-tunnel.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def shown(*arguments: str | Path) -> dict[str, str]:
    result = CliRunner().invoke(shows, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return dict(line.split("=", 1) for line in result.output.splitlines())


ALL: Final = """
[expose]
local = ["web=8000", "ssh=22"]
relay = "wss://from-file"
heartbeat = 20
allow = ["192.0.2.0/24"]
raw = true
ca_file = "certificates/ca.pem"
key_file = "~/key"
"""


def test_the_file_in_the_users_configuration_folder_is_read(user_config: Path) -> None:
    write(user_config, ALL)
    assert shown() == {
        "local": "('web=8000', 'ssh=22')",
        "relay": "wss://from-file",
        "relays": "()",
        "heartbeat": "20.0",
        "allow": "('192.0.2.0/24',)",
        "raw": "True",
        "ca_file": str(user_config / "certificates/ca.pem"),  # relative to the file
        "key_file": str(Path("~/key").expanduser()),
    }


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    user_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(user_config, ALL)
    monkeypatch.setenv("PIONEER_TUNNEL_RELAY", "wss://from-environment")
    monkeypatch.setenv("PIONEER_TUNNEL_ALLOW", "192.0.2.1 192.0.2.2")
    values = shown("--heartbeat", "30")
    assert (values["relay"], values["heartbeat"]) == ("wss://from-environment", "30.0")
    assert values["allow"] == "('192.0.2.1', '192.0.2.2')"
    assert shown("--relay", "wss://from-here", "9000")["relay"] == "wss://from-here"
    assert shown("9000")["local"] == "('9000',)"


@pytest.mark.parametrize("text", ["wss://one wss://other:1", "wss://one,wss://other:1", " wss://one ,\twss://other:1,"])
def test_a_variable_may_hold_several_relays(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PIONEER_TUNNEL_RELAYS", text)
    assert shown()["relays"] == "('wss://one', 'wss://other:1')"


def test_the_file_may_hold_several_relays(user_config: Path) -> None:
    write(user_config, '[expose]\nrelays = ["wss://one", "wss://other:1"]\n')
    assert shown()["relays"] == "('wss://one', 'wss://other:1')"
    write(user_config, '[expose]\nrelays = "wss://one"\n')
    assert shown()["relays"] == "('wss://one',)"


def test_another_file_can_be_named_and_the_current_folder_is_never_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, ALL)
    monkeypatch.chdir(tmp_path)
    assert shown()["relay"] == "None"
    assert shown("--config", path)["relay"] == "wss://from-file"
    monkeypatch.setenv("PIONEER_TUNNEL_CONFIG", str(path))
    assert shown()["relay"] == "wss://from-file"


def test_a_relative_xdg_config_home_counts_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", ".")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert shown()["relay"] == "None"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_this_user_may_not_look_into_has_no_file(user_config: Path) -> None:
    """As after `sudo -u somebody`, with the HOME of the user before."""
    write(user_config, ALL)
    user_config.chmod(0o700)
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            os._exit(usual_client_file() is not None)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_refused(user_config: Path, mode: int) -> None:
    path = write(user_config, ALL)
    path.chmod(mode)
    result = CliRunner().invoke(shows, [])
    assert result.exit_code == 41
    assert f"can be written by others; run: chmod go-w {path}" in result.output


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(user_config: Path) -> None:
    path = write(user_config, ALL)
    os.chown(path, 65534, 0)
    result = subprocess.run(
        [*PROGRAM, "expose"], env=os.environ, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert result.returncode == 41
    assert "belongs to another user (uid 65534)" in result.stderr


def test_every_problem_is_named_with_its_key(user_config: Path) -> None:
    path = write(
        user_config,
        '[expose]\nrelai = "x"\nheartbeat = 99\nallow = "192.0.2.1"\nraw = "yes"\nrelay = {}\n[relay]\n',
    )
    result = CliRunner().invoke(shows, [])
    assert result.exit_code == 31
    for told in (
        f"{path}: expose.relai: unknown key; the nearest known one is 'relay'",
        "expose.heartbeat = 99: ",
        "expose.raw = 'yes': allowed is true or false",
        "expose.relay = a table: allowed is one value",
        "relay: unknown table; the nearest known one is 'expose'",
    ):
        assert told in result.output
    assert "expose.allow" not in result.output, "one text is a list of one"


@pytest.mark.parametrize(
    "line", ['key = "hunter2-hunter2"', f'service = "{KEY.reveal()}"', 'token = "hunter2-hunter2"']
)
def test_a_key_in_the_file_is_refused_and_not_shown(user_config: Path, line: str) -> None:
    write(user_config, f"[expose]\n{line}\n")
    result = CliRunner().invoke(pioneer_tunnel, ["expose", "8000"])
    assert result.exit_code == 31
    assert "write it to a file of its own that only you can read, and name that one with key_file" in result.output
    assert "hunter2" not in result.output
    assert KEY.reveal() not in result.output


def test_a_key_in_the_environment_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIONEER_TUNNEL_SERVICE", KEY.reveal())
    result = CliRunner().invoke(pioneer_tunnel, ["expose", "8000", "--relay", "ws://h"])
    assert result.exit_code == 2
    assert "PIONEER_TUNNEL_SERVICE holds a relay key" in result.output
    assert KEY.reveal() not in result.output


def test_an_error_says_which_variable_or_file_it_is_about(user_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIONEER_TUNNEL_HEARTBEAT", "never")
    assert "(it is from the environment variable PIONEER_TUNNEL_HEARTBEAT)" in CliRunner().invoke(shows, []).output
    monkeypatch.setenv("PIONEER_TUNNEL_KEY_FILE", "nowhere")
    monkeypatch.delenv("PIONEER_TUNNEL_HEARTBEAT")
    result = CliRunner().invoke(pioneer_tunnel, ["expose", "8000", "--relay", "ws://h"])
    assert "(it is from the environment variable PIONEER_TUNNEL_KEY_FILE)" in result.output


def test_every_option_has_a_variable_that_is_named_like_it() -> None:
    found = {key_of(parameter): variable_of(parameter) for parameter in expose.params}
    assert found["relay"] == "PIONEER_TUNNEL_RELAY"
    assert found["key_file"] == "PIONEER_TUNNEL_KEY_FILE"
    assert found["json"] == "PIONEER_TUNNEL_JSON"
    assert found["local"] == "PIONEER_TUNNEL_LOCAL"
    assert all(parameter.envvar == variable_of(parameter) for parameter in expose.params if parameter.name != "config")


def refused(*arguments: str, stdin: str = "") -> Result:
    result = CliRunner().invoke(pioneer_tunnel, ["expose", *arguments], input=stdin)
    assert result.exit_code != 0
    return result


@pytest.mark.parametrize("address", ["relay.example.com:443", "192.0.2.1:443"])
def test_a_bare_address_that_is_not_of_this_machine_needs_a_scheme(tmp_path: Path, address: str) -> None:
    key = str(key_file(tmp_path, KEY.reveal()))
    result = refused("8000", "--relay", address, "--key-file", key)
    assert f"--relay '{address}' does not say how it is reached: write wss:// before it" in result.output


def test_of_several_relays_each_needs_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIONEER_TUNNEL_RELAY", "wss://relay.example.com,other.example.com:443")
    result = refused("8000", "--key-file", "-", stdin=KEY.reveal())
    assert "--relay 'other.example.com:443' does not say how it is reached" in result.output


@pytest.mark.parametrize("local", ["http://localhost:8000/path", ":http", ":", "http://"])
def test_a_local_address_that_cannot_be_read_is_explained(local: str) -> None:
    assert re.search("LOCAL", refused(local, "--relay", "ws://h", "--key-file", "-", stdin=KEY.reveal()).output)


@pytest.mark.parametrize("form", ["8000", ":8000", "http://localhost:8000", "http://127.0.0.1:8000/"])
def test_a_local_server_is_named_as_people_do(form: str) -> None:
    (local,) = local_servers([form]).values()
    assert str(local) == ("localhost:8000" if "localhost" in form else "127.0.0.1:8000")


def test_a_local_server_is_a_port_and_the_key_comes_from_standard_input(
    shared_relay: Relay, local_gateway: str
) -> None:
    arguments: list[str | Path] = [
        "expose",
        local_gateway.rpartition(":")[2],
        "--relay",
        shared_relay.url,
        "--key-file",
        "-",
    ]
    with (shared_relay.folder / "key").open() as stdin, running(*arguments, stdin=stdin) as program:
        program.wait_for("connected .*http://office.test")
        assert shared_relay.ask("/one").endswith(b"hello from /one")


def test_without_a_key_and_a_terminal_the_error_says_where_it_can_be() -> None:
    assert "--key-file FILE" in " ".join(refused("8000", "--relay", "ws://127.0.0.1:1").output.split())
