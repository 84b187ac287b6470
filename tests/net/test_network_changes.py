"""`_net.network_changes`, in a network namespace whose interfaces, addresses and routes change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from pioneer_tunnel._net import network_changes
from pioneer_tunnel._net.network_changes import PAUSE, watch_network
from pioneer_tunnel._net.ways import Way

SUPPORT: Final = Path(__file__).parents[1] / "support"
NAMESPACE: Final = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]


def can_have_a_namespace() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    try_it = [*NAMESPACE, "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"]
    return subprocess.run(try_it, capture_output=True, check=False).returncode == 0


needs_a_namespace = pytest.mark.skipif(not can_have_a_namespace(), reason="no network namespace can be made")


def reports(*arguments: str) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": str(SUPPORT.parents[1])}
    program = [*NAMESPACE, sys.executable, str(SUPPORT / "changing_network.py"), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@needs_a_namespace
@pytest.mark.slow
def test_linux_tells_of_changes_and_not_of_what_does_not_matter() -> None:
    assert reports() == {
        "containers_come_and_go": 0,
        "same_address_again": 0,
        "lose_the_address": 0,
        "another_address": 1,
        "lose_the_route": 0,
        "add_route": 1,
        "roam": 1,
        "pull_the_cable": 0,
        "put_it_back": 1,
    }


@needs_a_namespace
@pytest.mark.slow
def test_without_netlink_the_source_address_tells() -> None:
    """It cannot tell that the same address was lost and came back in between, nor what happens to a cable."""
    assert reports("poll") == {
        "containers_come_and_go": 0,
        "same_address_again": 0,
        "lose_the_address": 0,
        "another_address": 1,
        "lose_the_route": 0,
        "add_route": 1,
        "roam": 0,
        "pull_the_cable": 0,
        "put_it_back": 0,
    }


GONE: Final = """
import socket, subprocess, time
from pioneer_tunnel._net.socket_options import source_is_gone

def soon(work, *arguments, **options):
    "Linux examines a new IPv6 address before it can be used."
    while True:
        try:
            return work(*arguments, **options)
        except OSError:
            time.sleep(0.01)

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
for version, address in (("-4", "10.9.9.9/32"), ("-6", "fd99::9/128")):
    subprocess.run(["ip", version, "addr", "add", address, "dev", "lo"], check=True)
    host = address.partition("/")[0]
    family = socket.AF_INET6 if version == "-6" else socket.AF_INET
    with soon(socket.create_server, (host, 0), family=family) as listener:
        connected = soon(socket.create_connection, listener.getsockname()[:2])
        assert not source_is_gone(connected)
        subprocess.run(["ip", version, "addr", "del", address, "dev", "lo"], check=True)
        assert source_is_gone(connected)
        connected.close()
        assert not source_is_gone(connected), "a closed socket has none"
"""


@needs_a_namespace
def test_a_connection_whose_address_is_gone_shows_that() -> None:
    environment = os.environ | {"PYTHONPATH": str(SUPPORT.parents[1])}
    program = [*NAMESPACE, sys.executable, "-c", GONE]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr


async def test_reports_are_2_seconds_apart_and_the_last_is_not_left_out(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that changes all the time must not make a gateway hammer its relay."""
    source = b""
    at: list[float] = []

    def refuse() -> None:
        raise PermissionError("no netlink")

    monkeypatch.setattr(network_changes, "_subscribe", refuse)
    monkeypatch.setattr(network_changes, "_source_to", lambda address: Way(source=source))
    monkeypatch.setattr(network_changes, "POLL", 0.5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_network, lambda what: at.append(trio.current_time()), list)
        await trio.sleep(0.6)
        for number in range(9):
            source = str(number).encode()
            await trio.sleep(0.5)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert at == [1.0 + PAUSE * number for number in range(len(at))]
    assert at[-1] >= 5.0
