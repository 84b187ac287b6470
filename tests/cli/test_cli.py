"""The command line: what it prints, how it ends, and that the key is nowhere to be seen.

Whatever connects runs as a process of its own, the rest in the process of the tests.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import sys
import threading
import time
import urllib.request
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


# Every command


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
