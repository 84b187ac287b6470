"""A relay process that hands over to its successor, and commands that stop in order."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from programs import KEY, PROGRAM, Program, Relay, key_file, relay_in, running
from restart_trial import Load, restart_under_load
from rig import HANG, wait_until

from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel.relay.inherited import from_systemd

SUCCESSOR: Final = r"the successor, process (\d+), listens"


def expose(relay: Relay, local: str) -> list[str | Path]:
    return ["expose", local, "--relay", relay.url, "--key-file", relay.folder / "key"]


# A successor


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(rate=20, kept=2, downloads=2, seconds=3.0, before=1.0), id="short"),
        pytest.param(
            Load(rate=50, kept=6, downloads=12, seconds=8.0, before=2.0, restarts=2), id="long", marks=pytest.mark.slow
        ),
    ],
)
async def test_a_restart_under_load_fails_no_request(tmp_path: Path, load: Load) -> None:
    with relay_in(tmp_path) as relay:
        figures = await restart_under_load(relay, load)
    assert (figures.failed, figures.kept_failed, figures.downloads_failed) == ([], [], [])
    assert figures.requests > load.rate * load.before
    assert figures.downloads == load.downloads


def test_a_successor_that_does_not_start_changes_nothing(relay: Relay, local_gateway: str) -> None:
    config = relay.folder / "relay.toml"
    with running(*expose(relay, local_gateway)) as gateway:
        gateway.wait_for("connected")
        good = config.read_text()
        config.write_text(good.replace("[relay]", "[relay]\nheartbeat_ms = 1"))
        relay.program.process.send_signal(signal.SIGUSR2)
        relay.program.wait_for(r"there is no successor, and this process goes on: .* status 31")
        assert relay.ask("/one").endswith(b"hello from /one")
        config.write_text(good)
        relay.program.process.send_signal(signal.SIGUSR2)
        successor = int(relay.program.wait_for(SUCCESSOR)[1])
        assert relay.program.process.wait(HANG) == 0
        assert relay.ask("/two").endswith(b"hello from /two")
        os.kill(successor, signal.SIGTERM)
        relay.program.finish()


def test_systemd_is_told_who_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(HANG)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with relay_in(tmp_path) as relay:
            assert manager.recv(100) == f"READY=1\nMAINPID={relay.program.process.pid}".encode()
            relay.program.process.send_signal(signal.SIGUSR2)
            ready, pid = manager.recv(100).split(b"\nMAINPID=")
            assert ready == b"READY=1"
            assert int(relay.program.wait_for(SUCCESSOR)[1]) == int(pid)
            assert relay.program.process.wait(HANG) == 0
            os.kill(int(pid), signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            relay.program.finish()


def test_sockets_of_systemd_are_used(tmp_path: Path) -> None:
    """`systemd-socket-activate` does the same: the descriptors come third, and the variables name the process."""
    with socket.create_server(("127.0.0.1", 0)) as control, socket.create_server(("127.0.0.1", 0)) as ingress:
        addresses = [f"127.0.0.1:{listening.getsockname()[1]}" for listening in (control, ingress)]
        (tmp_path / "relay.toml").write_text(
            f"""
            [relay]
            control_addr = "{addresses[0]}"
            ingress_addr = "{addresses[1]}"
            id = "relay-1"
            public_names = ["{addresses[0]}"]
            """
        )
        activate = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
            " os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2');"
            " os.execv(sys.argv[3], sys.argv[3:])"
        )
        descriptors = [os.dup(control.fileno()), os.dup(ingress.fileno())]
        command = [sys.executable, "-c", activate, *map(str, descriptors), *PROGRAM]
        program = Program("relay", "--config", tmp_path / "relay.toml", command=command, pass_fds=descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            program.wait_for(f"the socket for {addresses[1]} was passed")
            program.wait_for("gateways at")
        finally:
            program.interrupt(signal.SIGTERM)


def test_variables_for_another_process_are_not_ours() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:c", "HOME": "/"}
    assert from_systemd(environment).take("127.0.0.1:1") == ()
    assert environment == {"HOME": "/"}


# Commands that stop in order


class Slow:
    """A local server whose one answer is complete when `finish` is called."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def finish(self) -> None:
        self._finished.set()

    def close(self) -> None:
        self.finish()
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        served = False
        while not served:
            connected, _ = self._listening.accept()
            with connected:
                if served := connected.recv(65536) != b"":  # else it was probed
                    connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
                    self._finished.wait(HANG)
                    with contextlib.suppress(OSError):
                        connected.sendall(b"lf")


@pytest.fixture
def local() -> Iterator[Slow]:
    server = Slow()
    yield server
    server.close()


def begin(relay: Relay) -> socket.socket:
    """A visitor who has the first half of the answer."""
    visitor = socket.create_connection(("127.0.0.1", relay.ingress), timeout=HANG)
    visitor.sendall(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
    received = b""
    while not received.endswith(b"\r\n\r\nha"):
        received += visitor.recv(65536)
    return visitor


def stopping(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    program.wait_for("stopping: SIGTERM")


@pytest.mark.parametrize("who", ["expose", "relay"])
def test_a_visitor_may_finish(relay: Relay, local: Slow, who: str) -> None:
    with running(*expose(relay, local.address)) as gateway:
        gateway.wait_for("connected")
        with begin(relay) as visitor:
            program = gateway if who == "expose" else relay.program
            stopping(program)
            time.sleep(0.3)  # in which nothing happens
            assert program.process.poll() is None
            local.finish()
            assert visitor.recv(100) == b"lf"
            assert visitor.recv(100) == b"" or who == "expose"
        assert program.finish() == 0


@pytest.mark.parametrize("workers", [None, 2], ids=["alone", "workers"])
def test_a_restart_that_is_asked_for_while_the_relay_stops_is_no_failure(
    tmp_path: Path, local: Slow, workers: int | None
) -> None:
    """The signal was delivered after the end, and killed the process: its exit status said so."""
    with relay_in(tmp_path, workers=workers) as relay, running(*expose(relay, local.address)) as gateway:
        gateway.wait_for("connected")
        with begin(relay) as visitor:
            stopping(relay.program)
            relay.program.process.send_signal(signal.SIGUSR2)
            time.sleep(0.3)  # in which nothing happens
            local.finish()
            assert visitor.recv(100) == b"lf"
        assert relay.program.finish() == 0


@pytest.mark.parametrize("who", ["expose", "relay"])
def test_a_second_signal_ends_at_once(relay: Relay, local: Slow, who: str) -> None:
    with running(*expose(relay, local.address), "--stop-grace-ms", "600000") as gateway:
        gateway.wait_for("connected")
        with begin(relay) as visitor:
            program = gateway if who == "expose" else relay.program
            stopping(program)
            program.process.send_signal(signal.SIGINT)
            assert program.finish() == 0
            assert "stopping at once: SIGINT" in program.errors
            with pytest.raises(ConnectionResetError):
                visitor.recv(100)


def test_the_grace_of_expose_has_an_end(relay: Relay, local: Slow) -> None:
    with running(*expose(relay, local.address), "--stop-grace-ms", "100") as gateway:
        gateway.wait_for("connected")
        with begin(relay) as visitor:
            assert gateway.interrupt(signal.SIGTERM) == 0
            with pytest.raises(ConnectionResetError):
                visitor.recv(100)


def test_new_visitors_are_told_while_expose_stops(relay: Relay, local: Slow) -> None:
    with running(*expose(relay, local.address)) as gateway:
        gateway.wait_for("connected")
        with begin(relay):
            stopping(gateway)
            relay.ask_until("/", b"the gateway is not connected\n")
            local.finish()
        assert gateway.finish() == 0


# A new key


def test_expose_rereads_its_key_on_hangup(tmp_path: Path, local_gateway: str) -> None:
    new = new_relay_key()
    with relay_in(tmp_path) as relay:
        config = tmp_path / "relay.toml"
        old_line = f'key = "{KEY.identity().public_key}"'
        both = f'keys = ["{KEY.identity().public_key}", "{new.identity().public_key}"]'
        config.write_text(config.read_text().replace(old_line, both))
        relay.program.process.send_signal(signal.SIGHUP)
        relay.program.wait_for("the configuration was applied")
        with running(*expose(relay, local_gateway)) as gateway:
            gateway.wait_for("connected")
            gateway.process.send_signal(signal.SIGHUP)
            gateway.wait_for("the key has not changed")
            key_file(tmp_path, "too short\n")
            gateway.process.send_signal(signal.SIGHUP)
            gateway.wait_for("the key stays: .*the key file")
            key_file(tmp_path, new_relay_key().reveal() + "\n")
            gateway.process.send_signal(signal.SIGHUP)
            gateway.wait_for("the tunnel with the new key does not come up; the key stays")
            assert relay.ask("/one").endswith(b"hello from /one")
            key_file(tmp_path, new.reveal() + "\n")
            gateway.process.send_signal(signal.SIGHUP)
            gateway.wait_for("the tunnel has a new key")
            config.write_text(config.read_text().replace(both, f'key = "{new.identity().public_key}"'))
            relay.program.process.send_signal(signal.SIGHUP)
            wait_until(lambda: relay.ask("/two").endswith(b"hello from /two"))
            assert gateway.interrupt(signal.SIGTERM) == 0
            assert new.reveal() not in gateway.errors
