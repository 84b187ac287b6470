"""The command line: what it prints, how it ends, and that the key is nowhere to be seen.

Whatever connects runs as a process of its own, the rest in the process of the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest
from access_rig import htpasswd_file
from click.testing import CliRunner
from programs import KEY, Gateway, Program, Relay, key_file, relay_in, run, running
from rig import HANG, free_port
from statuses import states_of

from pioneer_tunnel import cli
from pioneer_tunnel._model.errors import InvalidSettingsError, TunnelAuthError
from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.exit_codes import EXIT_CODES
from pioneer_tunnel.cli.status_lines import StatusLines
from pioneer_tunnel.tunnel.status_feed import StatusFeed

pytestmark = pytest.mark.usefixtures("user_config")

# relay new-key


def test_new_key_prints_the_secret_and_what_the_registry_needs() -> None:
    result = CliRunner().invoke(pioneer_tunnel, ["relay", "new-key"])
    assert result.exit_code == 0
    secret, public = result.output.splitlines()  # and nothing else, at standard error neither
    assert RelayKey(secret).identity().public_key == PublicKey.parse(public)
    assert len(secret) >= 43, "256 bits in base64"
    assert CliRunner().invoke(pioneer_tunnel, ["relay", "new-key"]).output != result.output


def test_new_identity_prints_the_seed_and_what_gateways_pin() -> None:
    result = CliRunner().invoke(pioneer_tunnel, ["relay", "new-identity"])
    assert result.exit_code == 0
    seed, public = result.output.splitlines()
    assert SigningIdentity.from_seed(bytes.fromhex(seed)).public_key == PublicKey.parse(public)


# relay and expose


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_gateway_is_exposed_until_it_is_interrupted(relay: Relay, local_gateway: str, by: signal.Signals) -> None:
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments, started=True) as program:
        program.wait_for("connected .*http://office.test")
        assert relay.ask("/one").endswith(b"hello from /one")
        shown = Path(f"/proc/{program.process.pid}/cmdline").read_bytes()
        assert KEY.reveal().encode() not in shown
        assert program.interrupt(by) == 0
        assert program.errors.endswith(f"stopping: {by.name} stopped")
        assert program.out == b""
        assert KEY.reveal().encode() not in program.err
    assert relay.ask("/two").startswith(b"HTTP/1.1 503 ")
    assert relay.program.interrupt(by) == 0
    assert relay.program.errors.endswith(f"stopping: {by.name}")


def test_sigusr1_checks_the_link_and_then_ends_the_wait(tmp_path: Path, local_gateway: str) -> None:
    """The relay stops: its system answers, and its process does not.

    Without sessions that resume: with them, the link is kept until another one is up.
    """
    with relay_in(tmp_path, more="resume_timeout_ms = 0") as relay:
        check_the_link(relay, local_gateway)


def check_the_link(relay: Relay, local_gateway: str) -> None:
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments) as program:
        program.wait_for("connected .*http://office.test")
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for("SIGUSR1")
        relay.program.process.send_signal(signal.SIGSTOP)
        try:
            stopped_at = time.monotonic()
            program.process.send_signal(signal.SIGUSR1)
            program.wait_for("reconnecting .*did not answer a check")
            assert time.monotonic() - stopped_at < 14, "the heartbeat takes 15 seconds to ask, and 30 to give up"
        finally:
            relay.program.process.send_signal(signal.SIGCONT)
        program.wait_for("(?s)reconnecting .*connected .*http://office.test")
        assert program.interrupt(signal.SIGTERM) == 0


def statuses_of(program: Program) -> list[Status]:
    lines = [json.loads(line) for line in program.err.decode().splitlines()]
    return [Status.from_wire(line) for line in lines if "state" in line]


def test_status_lines_for_machines(shared_relay: Relay, local_gateway: str) -> None:
    arguments: list[str | Path] = [
        "expose",
        local_gateway,
        "--relay",
        shared_relay.url,
        "--key-file",
        shared_relay.folder / "key",
        "--json",
    ]
    with running(*arguments) as program:
        program.wait_for('"connected"')
        shared_relay.ask("/")
        assert program.interrupt(signal.SIGINT) == 0
    statuses = statuses_of(program)
    assert [status.state for status in statuses] == [State.STARTING, State.CONNECTED, State.STOPPED]
    assert statuses[1].public_url == "http://office.test"


def test_messages_name_options_as_the_command_line_writes_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StatusLines(as_json=False)
    lines.show_failure(InvalidSettingsError("the ca_file '/etc/ca_file/ca_file.pem'; key_mode has to be rathole"))
    assert "the --ca-file '/etc/ca_file/ca_file.pem'; --key-mode has to be rathole" in capsys.readouterr().err


def test_messages_about_a_file_name_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    StatusLines(as_json=False, of_options=False).show_failure(InvalidSettingsError("the ca_file 'x'"))
    assert "the ca_file 'x'" in capsys.readouterr().err


def test_a_round_trip_does_not_print_every_status_again(capsys: pytest.CaptureFixture[str]) -> None:
    feed = StatusFeed(Status(state=State.STARTING))
    lines = StatusLines(as_json=True)
    for status in (
        Status(state=State.CONNECTED, public_url="http://office.test"),
        Status(state=State.CONNECTED, public_url="http://office.test", relay_rtt_ms=1.5),
        Status(state=State.CONNECTED, public_url="http://office.test", relay_rtt_ms=2.5),
        Status(state=State.STOPPED),
    ):
        feed.publish(status)
        lines.catch_up(feed.history, feed.dropped)
        lines.catch_up(feed.history, feed.dropped)
    printed = [json.loads(line)["state"] for line in capsys.readouterr().err.splitlines()]
    assert printed == ["starting", "connected", "stopped"]


def test_a_final_failure_is_the_last_line_and_is_there_once(capsys: pytest.CaptureFixture[str]) -> None:
    error = TunnelAuthError("the relay rejected the key")
    feed = StatusFeed(Status(state=State.STARTING))
    lines = StatusLines(as_json=True)
    for status in (
        Status(state=State.FAILED, error_kind=error.kind, message=str(error)),
        Status(state=State.STOPPED),
    ):
        feed.publish(status)
        lines.catch_up(feed.history, feed.dropped)
    lines.show_failure(error)
    printed = [json.loads(line)["state"] for line in capsys.readouterr().err.splitlines()]
    assert printed == ["starting", "failed"]


@pytest.mark.parametrize(
    ("public_url", "services", "expected"),
    [
        ("http://office.test", None, "visitors come in at http://office.test\n"),
        ("http://office.test", {"": "http://office.test"}, "visitors come in at http://office.test\n"),
        ("http://office.test", {"ssh": "tcp://office.test:22"}, "visitors come in at tcp://office.test:22 (ssh)\n"),
        ("http://office.test", {}, "no visitors come in: the relay has none of the services\n"),
        ("http://*.box.test", None, "in http://*.box.test, so write NAME=LOCAL\n"),
    ],
)
def test_only_addresses_that_lead_here_are_shown(
    capsys: pytest.CaptureFixture[str], public_url: str, services: dict[str, str] | None, expected: str
) -> None:
    status = Status(state=State.CONNECTED, public_url=public_url, services=services)
    StatusLines(as_json=False).catch_up([status], 0)
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.slow
def test_a_relay_that_goes_away_is_waited_for(relay: Relay, local_gateway: str) -> None:
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments) as program:
        program.wait_for("connected")
        assert relay.program.interrupt(signal.SIGINT) == 0
        program.wait_for("reconnecting")
        with running("relay", "--config", relay.folder / "relay.toml") as again:
            again.wait_for("gateways at")
            program.wait_for(r"reconnecting[\s\S]*\nconnected")
            assert relay.ask("/again").endswith(b"hello from /again")
            assert program.interrupt(signal.SIGINT) == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_key_has_an_exit_status_of_its_own(
    shared_relay: Relay, tmp_path: Path, local_gateway: str, as_json: bool
) -> None:
    wrong = "ptk1_a-key-that-nobody-has-registered-here"
    key = key_file(tmp_path, wrong)
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", shared_relay.url, "--key-file", key]
    program = run(*arguments, *["--json"] * as_json)
    assert program.process.returncode == EXIT_CODES[ErrorKind.TUNNEL_AUTH_FAILED] == 37
    assert "rejected the key" in program.errors
    assert wrong not in program.errors
    if as_json:
        statuses = [Status.from_wire(json.loads(line)) for line in program.err.decode().splitlines()]
        assert State.FAILED in [status.state for status in statuses]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--proxy-protocol", "v2"], b"\r\n\r\n\0\r\nQUIT\n"),
        (
            ["--forwarded-headers", "--host-header", "localhost:3000"],
            b"GET / HTTP/1.1\r\nHost: localhost:3000\r\nX-Forwarded-For: 127.0.0.1\r\n",
        ),
    ],
)
def test_what_the_local_server_is_told_of_visitors(
    shared_relay: Relay, options: list[str | Path], expected: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as local:
        local.settimeout(HANG)
        address = f"127.0.0.1:{local.getsockname()[1]}"
        key = shared_relay.folder / "key"
        arguments: list[str | Path] = ["expose", address, "--relay", shared_relay.url, "--key-file", key]
        with running(*arguments, *options) as program:
            program.wait_for("connected")
            with socket.create_connection(("127.0.0.1", shared_relay.ingress)) as visitor:
                visitor.sendall(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
                said = b""
                while not said:  # a probe connects and says nothing
                    connection, _ = local.accept()
                    with connection:
                        connection.settimeout(HANG)
                        with contextlib.suppress(ConnectionResetError):
                            while len(said) < len(expected) and (data := connection.recv(len(expected))):
                                said += data
                assert said.startswith(expected)
            program.interrupt(signal.SIGINT)


def test_visitors_need_the_password_of_a_file(shared_relay: Relay, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["expose", f"127.0.0.1:{free_port()}", "--relay", shared_relay.url]
    key = shared_relay.folder / "key"
    with running(*arguments, "--key-file", key, "--basic-auth", htpasswd_file(tmp_path)) as program:
        program.wait_for("connected")
        with socket.create_connection(("127.0.0.1", shared_relay.ingress)) as visitor:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
            visitor.settimeout(HANG)
            assert visitor.recv(100).startswith(b"HTTP/1.1 401 ")


def test_expose_has_metrics(shared_relay: Relay) -> None:
    port = free_port()
    key = shared_relay.folder / "key"
    arguments = ["expose", f"127.0.0.1:{free_port()}", "--relay", shared_relay.url, "--key-file", str(key)]
    with running(*arguments, "--metrics", f"127.0.0.1:{port}") as program:
        program.wait_for("connected")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG) as answer:
            metrics = answer.read().decode()
        assert 'pioneer_tunnel_gateway_state="connected"} 1.0' in metrics
        with running(*arguments, "--metrics", f"127.0.0.1:{port}") as again:
            assert again.finish() == 1
            assert f"cannot listen at 127.0.0.1:{port}: " in again.errors
        program.interrupt(signal.SIGTERM)


@pytest.mark.slow
def test_expose_connects_before_the_local_gateway_is_there(relay: Relay) -> None:
    port = free_port()
    arguments: list[str | Path] = ["expose", f"127.0.0.1:{port}", "--relay", relay.url]
    with running(*arguments, "--key-file", relay.folder / "key", "--json") as program:
        program.wait_for('"connected".*"local_gateway_unavailable"')
        server = ThreadingHTTPServer(("127.0.0.1", port), Gateway)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            program.wait_for(r'local_gateway_unavailable[\s\S]*\n\{"state": "connected", "updated')
            assert relay.ask("/one").endswith(b"hello from /one")
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
        assert program.interrupt(signal.SIGINT) == 0
    statuses = statuses_of(program)
    assert states_of(statuses) == [State.STARTING, State.CONNECTED, State.STOPPED]


# What is wrong, explained


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


def test_verbose_logs_more_and_never_the_key(shared_relay: Relay, local_gateway: str) -> None:
    arguments: list[str | Path] = [
        "-v",
        "expose",
        local_gateway,
        "--relay",
        shared_relay.url,
        "--key-file",
        shared_relay.folder / "key",
    ]
    with running(*arguments) as program:
        program.wait_for("connected")
        shared_relay.ask("/secret-path")
        assert program.interrupt(signal.SIGINT) == 0
    assert KEY.reveal() not in program.errors
    assert "secret-path" not in program.errors
    assert '"proof"' not in program.errors


def test_each_command_raises_its_limit_of_descriptors(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        with relay_in(tmp_path, started=True) as relay:
            arguments: list[str | Path] = ["expose", "1", "--relay", relay.url, "--key-file", relay.folder / "key"]
            with running(*arguments, started=True) as gateway:
                gateway.wait_for("connected")
                for program in (relay.program, gateway):
                    assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
                assert gateway.interrupt(signal.SIGINT) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


GARBAGE_IS_LOOKED_FOR: Final = """
import atexit, gc
from pioneer_tunnel.cli import main
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000, gc.get_threshold()[0] > 10_000))
main()
"""


def test_the_version_is_told() -> None:
    from pioneer_tunnel._version import __version__

    program = Program("--version", command=[sys.executable, "-c", GARBAGE_IS_LOOKED_FOR])
    assert program.finish() == 0
    version, looked_for = program.out.decode().splitlines()
    assert version.endswith(__version__)
    assert looked_for == "True True True"


def test_without_click_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "queue_standard_error", lambda: None)
    monkeypatch.delitem(sys.modules, "pioneer_tunnel.cli.commands")
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit, match=r"pip install 'pioneer-tunnel\[cli\]'"):
        cli.main()


# Standard error that takes nothing


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
