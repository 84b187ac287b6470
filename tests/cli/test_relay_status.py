"""`relay status` asks a relay that runs, found by its file alone."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from programs import Relay, running

from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.quantities import amount, duration


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(pioneer_tunnel, ["relay", *map(str, words)])


def test_what_a_relay_does_and_whom_it_refuses(relay: Relay, local_gateway: str) -> None:
    config = relay.folder / "relay.toml"
    arguments: list[str | Path] = ["expose", local_gateway, "--relay", relay.url, "--key-file", relay.folder / "key"]
    with running(*arguments) as gateway:
        gateway.wait_for("connected .*http://office.test")
        assert relay.ask("/one").endswith(b"hello from /one")
        shown = invoke("status", "--config", config).output
        assert re.search(r"tunnels connected: 1 of 1\n", shown), shown
        assert re.search(r"\noffice  127\.0\.0\.1:\d+ for \d+ s +0 \(1\) +\d+ B ", shown), shown
        found = json.loads(invoke("status", "--config", config, "--json").output)
        assert found["pid"] == relay.program.process.pid
        assert found["stats"]["tunnels"]["office"]["streams"]["opened_total"] == 1
        assert invoke("check", "--config", config).output.endswith("nothing is wrong\n"), "its own addresses are in use"
        assert gateway.interrupt(signal.SIGTERM) == 0
    assert relay.ask("/two").startswith(b"HTTP/1.1 503 ")
    assert "refused: 1 gateway_away" in invoke("status", "--config", config).output


def test_the_relay_of_now_is_asked(relay: Relay) -> None:
    config = relay.folder / "relay.toml"
    with running("relay", "status", "--watch", "--json", "--config", config) as watching:
        lines = iter(watching.process.stdout.readline, b"")  # type: ignore[union-attr]
        assert json.loads(next(lines))["pid"] == relay.program.process.pid
        relay.program.process.send_signal(signal.SIGUSR2)
        successor = int(relay.program.wait_for(r"the successor, process (\d+), listens")[1])
        try:
            while json.loads(next(lines)).get("pid") != successor:
                pass
        finally:
            os.kill(successor, signal.SIGTERM)
        while "error" not in json.loads(next(lines)):
            pass
        assert watching.interrupt(signal.SIGINT) == 0
    assert relay.program.finish() == 0


def test_no_relay(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("[relay]\n")
    result = invoke("status", "--config", config)
    assert (result.exit_code, result.output) == (1, f"Error: no relay runs with {config} on this machine\n")
    assert "there is no file" in invoke("status", "--config", tmp_path / "none.toml").output


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0 s"), (59.9, "59 s"), (3600, "1 h"), (3725, "1 h 2 min"), (90061, "1 d 1 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 "), (999, "999 "), (999.9, "1 k"), (1234567, "1.23 M"), (5e12, "5 T"), (5e16, "50000 T")],
)
def test_amounts(number: float, shown: str) -> None:
    assert amount(number) == shown
