"""The command line explains what is wrong with arguments and files, and shows no key that stands in a wrong place."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner
from programs import KEY, Relay, key_file, running

from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.exit_codes import EXIT_CODES

pytestmark = pytest.mark.usefixtures("user_config")


EXPOSE: Final = ["expose", "127.0.0.1:1", "--key-file", "key"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*EXPOSE, "--relay", "ws://h", "--metrics", "9101"], "--metrics.*'9101'"),
        (["expose", "nonsense", "--relay", "ws://h", "--key-file", "key"], "LOCAL.*'nonsense'"),
        (["expose", "unix:relative", "--relay", "ws://h", "--key-file", "key"], "LOCAL.*'relative'"),
        (["expose", "unix:/s", "--relay", "ws://h", "--key-file", "key", "--local-ca-file", "key"], "LOCAL with https"),
        (["expose", "127.0.0.1:1", "--key-file", "key"], "--relay"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h"], "--key-file"),
        (["expose", "127.0.0.1:1", "--relay", "ftp://h", "--key-file", "key"], "ftp"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "nowhere"], "--key-file: there is no"),
        ([*EXPOSE, "--relay", "wss://h", "--ca-file", "nowhere"], "--ca-file.*'nowhere'"),
        ([*EXPOSE, "--relay", "wss://h", "--ca-file", "key"], "'key'.*no certificate"),
        ([*EXPOSE, "--relay", "ws://h", "--ca-file", "key"], "--ca-file is for TLS.*wss://"),
        ([*EXPOSE, "--relay", "WS://h", "--system-trust", "os"], "--system-trust is for TLS.*wss://"),
        (
            [*EXPOSE, "--relay", "h:1", "--transport", "tcp", "--ca-file", "key"],
            "--ca-file is for.*--transport tls",
        ),
        ([*EXPOSE, "--relay", "h", "--key-mode", "rathole"], "--key-mode is for"),
        ([*EXPOSE, "--relay", "h:1", "--transport", "tls", "--heartbeat", "20"], "--heartbeat is for"),
        ([*EXPOSE, "--relay", "h", "--heartbeat", "61"], "--heartbeat.*61"),
        ([*EXPOSE, "--relay", "h:1", "--transport", "tls", "--websocket-engine", "websockets"], "engine is for"),
        ([*EXPOSE, "127.0.0.1:2", "--relay", "h"], "LOCAL: name each service: NAME=LOCAL"),
        ([*EXPOSE, "web=nonsense", "--relay", "h"], "LOCAL.*'nonsense'"),
        ([*EXPOSE, "Web=8000", "--relay", "h"], "LOCAL: the service 'Web': allowed are 1 to 63 lower-case"),
        ([*EXPOSE, "web=1", "web=2", "--relay", "h"], "LOCAL: the service 'web' is there twice"),
        ([*EXPOSE, "web=1", "--relay", "h:1", "--transport", "tcp"], "NAME=LOCAL is for .*websocket"),
        (["relay", "new-key", "surplus"], "too many arguments; write"),
        ([*EXPOSE, "--relay", "ws://h", "--relay-identity", "x"], "--relay-identity: .*ed25519:"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "key", "--proxy-protocol", "v1"], "v2"),
        ([*EXPOSE, "--relay", "ws://h", "--proxy", "gopher://p"], "--proxy.*another scheme.*socks5"),
        (
            [*EXPOSE, "--relay", "ws://h", "--proxy", "http://u:p@h"],
            "to a file, and name it in --proxy-credentials-file",
        ),
        ([*EXPOSE, "--relay", "ws://h", "--proxy-credentials-file", "key"], "--proxy-credentials-file: it is for"),
        ([*EXPOSE, "--relay", "ws://h", "--proxy", "https://p", "--ca-file", "nowhere"], "there is no file 'nowhere'"),
        ([*EXPOSE, "--relay", "ws://h", "--host-header", "http://h"], "--host-header: the address"),
        ([*EXPOSE, "--relay", "ws://h", "--allow", "office"], r"allow\[0\]"),
        ([*EXPOSE, "--relay", "h:1", "--transport", "tcp", "--deny", "192.0.2.7"], "--transport websocket brings it"),
        ([*EXPOSE, "--relay", "ws://h", "--basic-auth", "nowhere"], "there is no"),
        ([*EXPOSE, "--relay", "ws://h", "--basic-auth", "key"], "line 1 is not user:hash"),
        ([*EXPOSE, "--relay", "ws://h", "--basic-auth", "key", "--bearer-tokens", "key"], "leave one of them out"),
        (["relay"], "--config FILE"),
        (["relay", "--config", "nowhere"], "nowhere"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_arguments_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    key_file(tmp_path, KEY.reveal())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(pioneer_tunnel, arguments)
    assert result.exit_code in {1, 2, EXIT_CODES[ErrorKind.INVALID_SETTINGS]}
    assert isinstance(result.exception, SystemExit), "explained, not thrown"
    assert re.search(told, " ".join(result.output.split())), result.output
    assert KEY.reveal() not in result.output


PLACES: Final[dict[str, list[str]]] = {
    "--allow": [*EXPOSE, "--relay", "ws://h", "--allow", "SECRET"],
    "--basic-auth": [*EXPOSE, "--relay", "ws://h", "--basic-auth", "SECRET"],
    "LOCAL": ["expose", "SECRET", "--relay", "ws://h", "--key-file", "key"],
    "NAME=LOCAL": ["expose", "web=SECRET", "--relay", "ws://h", "--key-file", "key"],
    "a second argument": [*EXPOSE, "SECRET", "--relay", "ws://h"],
    "an unknown option": [*EXPOSE, "--relay", "ws://h", "--key=SECRET"],
    "an unknown option and a value": [*EXPOSE, "--relay", "ws://h", "--key", "SECRET"],
    "a command": ["SECRET"],
    "a command of relay": ["relay", "SECRET"],
    "relay new-key": ["relay", "new-key", "SECRET"],
    "--config": ["relay", "--config", "SECRET"],
    "the relay": [*EXPOSE, "--relay", "SECRET"],
    "the relay's path": [*EXPOSE, "--relay", "h:1/SECRET"],
    "the relay's user": [*EXPOSE, "--relay", "ws://SECRET@h"],
    "the relay's query": [*EXPOSE, "--relay", "ws://h/?SECRET"],
    "--key-file": ["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "SECRET"],
    "--key-file=": ["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file=SECRET"],
    "--tls-private-key": [*EXPOSE, "--relay", "ws://h", "--tls-certificate", "key", "--tls-private-key", "SECRET"],
    "--ca-file": [*EXPOSE, "--relay", "wss://h", "--ca-file", "SECRET"],
    "--tls-certificate": [*EXPOSE, "--relay", "ws://h", "--tls-certificate", "SECRET"],
    "--relay-identity": [*EXPOSE, "--relay", "ws://h", "--relay-identity", "SECRET"],
    "--transport": [*EXPOSE, "--relay", "ws://h", "--transport", "SECRET"],
    "--key-mode": [*EXPOSE, "--relay", "ws://h", "--key-mode", "SECRET"],
    "--proxy-protocol": [*EXPOSE, "--relay", "ws://h", "--proxy-protocol", "SECRET"],
    "--system-trust": [*EXPOSE, "--relay", "ws://h", "--system-trust", "SECRET"],
    "--proxy": [*EXPOSE, "--relay", "ws://h", "--proxy", "SECRET"],
    "the user of --proxy": [*EXPOSE, "--relay", "ws://h", "--proxy", "http://SECRET@proxy"],
    "the password of --proxy": [*EXPOSE, "--relay", "ws://h", "--proxy", "http://user:SECRET@proxy:3128"],
    "--proxy-credentials-file": [*EXPOSE, "--relay", "ws://h", "--proxy-credentials-file", "SECRET"],
    "--websocket-engine": [*EXPOSE, "--relay", "ws://h", "--websocket-engine", "SECRET"],
}
"""Where a key may be pasted by mistake."""

TYPING_ERRORS: Final = {
    "LOCAL",
    "NAME=LOCAL",
    "a second argument",
    "a command",
    "a command of relay",
    "the relay",
    "--config",
    "--ca-file",
} | {"--tls-certificate", "--proxy", "--allow", "--basic-auth"}
"""Where a short word is rather a typing error, and is quoted."""

TOKEN: Final = "a-token-of-some-rathole"


@pytest.mark.parametrize(
    ("place", "secret"),
    [
        *((place, KEY.reveal()) for place in PLACES),
        *((place, TOKEN) for place in PLACES if place != "the relay's path"),
        *((place, "hunter2") for place in PLACES if place not in TYPING_ERRORS | {"the relay's path"}),
    ],
)
def test_a_key_in_the_wrong_place_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, secret: str
) -> None:
    key_file(tmp_path, KEY.reveal())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(pioneer_tunnel, [word.replace("SECRET", secret) for word in PLACES[place]])
    assert result.exit_code in {1, 2, EXIT_CODES[ErrorKind.INVALID_SETTINGS]}
    assert isinstance(result.exception, SystemExit), "explained, not thrown"
    assert secret not in result.output
    if secret == KEY.reveal():
        assert "name that file with --key-file" in result.output


def test_a_relay_key_as_the_service_is_refused_before_a_relay_hears_it(tmp_path: Path) -> None:
    arguments = ["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", str(key_file(tmp_path, KEY.reveal()))]
    result = CliRunner().invoke(pioneer_tunnel, [*arguments, "--service", KEY.reveal()])
    assert result.exit_code == 2
    assert KEY.reveal() not in result.output


@pytest.mark.parametrize(
    "text", ["", "  \n", "one\ntwo\n", "tab\tkey-that-is-long-enough", "short-key", f"ed25519:{'ab' * 32}"]
)
def test_a_key_file_that_cannot_be_used_is_named_without_what_it_holds(tmp_path: Path, text: str) -> None:
    key = key_file(tmp_path, text)
    arguments = ["expose", "127.0.0.1:1", "--relay", "ws://127.0.0.1:9", "--key-file", str(key)]
    result = CliRunner().invoke(pioneer_tunnel, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "key" in result.output
    for word in text.split():
        assert word not in result.output


def test_a_key_file_may_be_what_new_key_printed_but_others_should_not_read_it(
    shared_relay: Relay, tmp_path: Path, local_gateway: str
) -> None:
    key = key_file(tmp_path, f"{KEY.reveal()}\n{KEY.identity().public_key}\n")
    key.chmod(0o644)
    with running("expose", local_gateway, "--relay", shared_relay.url, "--key-file", key) as program:
        program.wait_for("connected")
        assert "can be read by others" in program.errors
        assert program.interrupt(signal.SIGINT) == 0


def test_every_problem_of_a_relays_file_is_shown(tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text('[relay]\ncontrol_adr = "x"\ningress_addr = "y"\nid = ""\npublic_names = []\n')
    result = CliRunner().invoke(pioneer_tunnel, ["relay", "--config", str(tmp_path / "relay.toml")])
    assert result.exit_code == EXIT_CODES[ErrorKind.INVALID_SETTINGS]
    for told in (
        "relay.toml",
        "control_adr",
        "nearest known one is 'control_addr'",
        "ingress_addr",
        "relay.id",
        "public_names",
    ):
        assert told in result.output


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "relay.toml").write_text(
            f'[relay]\ncontrol_addr = "{address}"\ningress_addr = "127.0.0.1:0"\nid = "r"\npublic_names = ["r.test"]\n'
        )
        result = CliRunner().invoke(pioneer_tunnel, ["relay", "--config", str(tmp_path / "relay.toml")])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: cannot listen at {address}")
    assert "in use" in result.output
