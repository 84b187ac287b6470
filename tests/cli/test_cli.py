"""The real program, as a process of its own: what it prints, how it ends, and that the key is nowhere to be seen."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner
from programs import KEY, Gateway, Relay, key_file, run, running
from rig import HANG, free_port
from statuses import states_of

from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity
from pioneer_tunnel._model.status import State, Status
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.status_lines import StatusLines
from pioneer_tunnel.tunnel.status_feed import StatusFeed

# relay new-key


def test_new_key_prints_the_secret_and_what_the_registry_needs() -> None:
    program = run("relay", "new-key")
    assert program.process.returncode == 0
    assert program.err == b""
    secret, public = program.out.decode().splitlines()
    assert RelayKey(secret).identity().public_key == PublicKey.parse(public)
    assert len(secret) >= 43, "256 bits in base64"
    assert run("relay", "new-key").out != program.out


def test_new_identity_prints_the_seed_and_what_gateways_pin() -> None:
    program = run("relay", "new-identity")
    assert program.process.returncode == 0
    seed, public = program.out.decode().splitlines()
    assert SigningIdentity.from_seed(bytes.fromhex(seed)).public_key == PublicKey.parse(public)


# relay and expose


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_gateway_is_exposed_until_it_is_interrupted(relay: Relay, gateway: str, by: signal.Signals) -> None:
    arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments) as program:
        program.wait_for("connected .*http://office.test")
        assert relay.ask("/one").endswith(b"hello from /one")
        shown = Path(f"/proc/{program.process.pid}/cmdline").read_bytes()
        assert KEY.reveal().encode() not in shown
        assert program.interrupt(by) == 0
        assert program.errors.endswith("stopped")
        assert program.out == b""
        assert KEY.reveal().encode() not in program.err
    assert relay.ask("/two").startswith(b"HTTP/1.1 503 ")
    assert relay.program.interrupt(by) == 0


def test_status_lines_for_machines(relay: Relay, gateway: str) -> None:
    arguments: list[str | Path] = [
        "expose",
        gateway,
        "--relay",
        relay.url,
        "--key-file",
        relay.folder / "key",
        "--json",
    ]
    with running(*arguments) as program:
        program.wait_for('"connected"')
        relay.ask("/")
        assert program.interrupt(signal.SIGINT) == 0
    statuses = [Status.from_wire(json.loads(line)) for line in program.err.decode().splitlines()]
    assert [status.state for status in statuses] == [State.STARTING, State.CONNECTED, State.STOPPED]
    assert statuses[1].public_url == "http://office.test"


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


@pytest.mark.slow
def test_a_relay_that_goes_away_is_waited_for(relay: Relay, gateway: str) -> None:
    arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
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
def test_a_wrong_key_is_exit_status_1(relay: Relay, gateway: str, as_json: bool) -> None:
    wrong = "ptk1_a-key-that-nobody-has-registered-here"
    arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", key_file(relay.folder, wrong)]
    program = run(*arguments, *["--json"] * as_json)
    assert program.process.returncode == 1
    assert "rejected the key" in program.errors
    assert wrong not in program.errors
    if as_json:
        statuses = [Status.from_wire(json.loads(line)) for line in program.err.decode().splitlines()]
        assert State.FAILED in [status.state for status in statuses]


def test_proxy_protocol_is_passed_on(relay: Relay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as local:
        local.settimeout(HANG)
        address = f"127.0.0.1:{local.getsockname()[1]}"
        arguments: list[str | Path] = ["expose", address, "--relay", relay.url, "--key-file", relay.folder / "key"]
        with running(*arguments, "--proxy-protocol", "v2") as program:
            program.wait_for("connected")
            with socket.create_connection(("127.0.0.1", relay.ingress)) as visitor:
                visitor.sendall(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
                said = b""
                while not said:  # a probe connects and says nothing
                    connection, _ = local.accept()
                    with connection:
                        connection.settimeout(HANG)
                        with contextlib.suppress(ConnectionResetError):
                            said = connection.recv(12)
                assert said == b"\r\n\r\n\0\r\nQUIT\n"
            program.interrupt(signal.SIGINT)


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
    statuses = [Status.from_wire(json.loads(line)) for line in program.err.decode().splitlines()]
    assert states_of(statuses) == [State.STARTING, State.CONNECTED, State.STOPPED]


# What is wrong, explained


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["expose", "nonsense", "--relay", "ws://h", "--key-file", "key"], "LOCAL.*'nonsense'"),
        (["expose", "unix:relative", "--relay", "ws://h", "--key-file", "key"], "LOCAL.*'relative'"),
        (["expose", "unix:/s", "--relay", "ws://h", "--key-file", "key", "--local-ca-file", "key"], "LOCAL with https"),
        (["expose", "127.0.0.1:1", "--key-file", "key"], "--relay"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h"], "--key-file"),
        (["expose", "127.0.0.1:1", "--relay", "ftp://h", "--key-file", "key"], "ftp"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "nowhere"], "'nowhere' cannot be read"),
        (["expose", "127.0.0.1:1", "--relay", "wss://h", "--key-file", "key", "--ca-file", "nowhere"], "CA file"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "key", "--relay-identity", "x"], "ed25519:"),
        (["expose", "127.0.0.1:1", "--relay", "ws://h", "--key-file", "key", "--proxy-protocol", "v1"], "v2"),
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
    assert result.exit_code in {1, 2}
    assert isinstance(result.exception, SystemExit), "explained, not thrown"
    assert re.search(told, " ".join(result.output.split())), result.output
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


def test_a_key_file_may_be_what_new_key_printed_but_others_should_not_read_it(relay: Relay, gateway: str) -> None:
    key = key_file(relay.folder, f"{KEY.reveal()}\n{KEY.identity().public_key}\n")
    key.chmod(0o644)
    with running("expose", gateway, "--relay", relay.url, "--key-file", key) as program:
        program.wait_for("connected")
        assert "can be read by others" in program.errors
        assert program.interrupt(signal.SIGINT) == 0


def test_every_problem_of_a_relays_file_is_shown(tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text('[relay]\ncontrol_adr = "x"\ningress_addr = "y"\nid = ""\npublic_names = []\n')
    program = run("relay", "--config", tmp_path / "relay.toml")
    assert program.process.returncode == 1
    for told in (
        "relay.toml",
        "control_adr",
        "nearest known one is 'control_addr'",
        "ingress_addr",
        "relay.id",
        "public_names",
    ):
        assert told in program.errors


def test_an_address_that_is_taken_is_named(relay: Relay) -> None:
    program = run("relay", "--config", relay.folder / "relay.toml")
    assert program.process.returncode == 1
    assert program.errors.startswith("Error: cannot listen at 127.0.0.1:")
    assert "in use" in program.errors


def test_verbose_logs_more_and_never_the_key(relay: Relay, gateway: str) -> None:
    arguments: list[str | Path] = ["-v", "expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments) as program:
        program.wait_for("connected")
        relay.ask("/secret-path")
        assert program.interrupt(signal.SIGINT) == 0
    assert KEY.reveal() not in program.errors
    assert "secret-path" not in program.errors
    assert '"proof"' not in program.errors


def test_the_version_is_told() -> None:
    from pioneer_tunnel._version import __version__

    assert run("--version").out.decode().strip().endswith(__version__)


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
    relay: Relay, gateway: str, open_stderr: Callable[[], int | None]
) -> None:
    stderr = open_stderr()
    try:
        arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
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


def test_a_pipe_that_is_not_read_stops_no_traffic(relay: Relay, gateway: str) -> None:
    reader, writer = small_pipe()
    # The engine trio-websocket has a line for each event, which fills the pipe.
    arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with (
        os.fdopen(reader, "rb") as pipe,
        running("-v", *arguments, "--websocket-engine", "trio-websocket", stderr=writer) as program,
    ):
        os.close(writer)
        relay.ask_until("/0", b"hello from /0")
        for number in range(1, 50):
            assert relay.ask(f"/{number}").endswith(f"hello from /{number}".encode())
        said: list[bytes] = []
        read = threading.Thread(target=lambda: said.append(pipe.read()))
        read.start()
        # Once the pipe is read, what was queued arrives, and how much was not.
        assert program.interrupt(signal.SIGTERM) == 0
        read.join()
    assert len(said[0]) > 4 * PIPE_SIZE
    lines = said[0].decode().splitlines()
    assert any(line.startswith("connected ") for line in lines)
    assert lines[-1].startswith("stopped")


@pytest.mark.slow
def test_a_pipe_that_is_never_read_does_not_keep_it_from_ending(relay: Relay, gateway: str) -> None:
    reader, writer = small_pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(512)):
            pass
    os.set_blocking(writer, True)
    try:
        arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
        with running(*arguments, stderr=writer) as program:
            relay.ask_until("/", b"hello from /")
            assert os.get_blocking(writer), "other processes share the descriptor"
            assert program.interrupt(signal.SIGTERM) == 0
        assert run("relay", "--config", "nowhere", stderr=writer).process.returncode == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_the_log_is_there_for_machines_too(relay: Relay, gateway: str) -> None:
    (relay.folder / "key").chmod(0o644)
    arguments: list[str | Path] = ["expose", gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments, "--json") as program:
        program.wait_for('"connected"')
        assert program.interrupt(signal.SIGINT) == 0
    lines = [json.loads(line) for line in program.err.decode().splitlines()]
    logged = [line for line in lines if "log" in line]
    assert [line["state"] for line in lines if line not in logged] == ["starting", "connected", "stopped"]
    assert [(line["level"], line["logger"]) for line in logged] == [("WARNING", "pioneer_tunnel.cli")]
    assert "can be read by others" in logged[0]["log"]
