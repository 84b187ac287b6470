"""A relay with many tunnels, and their gateways, as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Final, final

import attrs

from pioneer_tunnel import RelayKey, new_relay_key

from ..peers.certificates import certify
from ..processes import LOOPBACK, Process, ended, free_port, running, wait_until_listening

__all__ = ["ANSWER", "Relay", "gateways", "host_of", "relay", "visit"]

OURS: Final = (sys.executable, "-m", "pioneer_tunnel")
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!"
"""What each gateway answers to each request."""


@final
@attrs.frozen(kw_only=True)
class Relay:
    """A relay that runs.

    Attributes:
        folder: its files.
        keys: of its tunnels, which have the names that `host_of` says.
        control, visitors: its ports.
        tls: whether gateways reach it with TLS.
        process: the relay, with its workers.
    """

    folder: Path
    keys: Sequence[RelayKey]
    control: int
    visitors: int
    tls: bool
    process: Process


def host_of(number: int) -> str:
    """The name by which visitors reach a tunnel."""
    return f"t{number}.test"


@contextmanager
def relay(
    folder: Path,
    tunnels: int,
    *,
    tls: bool = False,
    arguments: Sequence[str] = (),
    command: Sequence[str] = OURS,
    keys: Sequence[RelayKey] | None = None,
    more: Sequence[str] = (),
) -> Iterator[Relay]:
    """Run a relay without limits that a benchmark could reach.

    Args:
        folder: for its files.
        tunnels: how many it has.
        tls: whether gateways reach it with TLS. Visitors never do.
        arguments: of `relay`, beside the configuration.
        command: what is started.
        keys: of its tunnels; by default new ones.
        more: tables of its file.
    """
    keys = keys or [new_relay_key() for _ in range(tunnels)]
    control, visitors = free_port(), free_port()
    if tls:
        certify(folder, LOOPBACK)
    lines = [
        "[relay]",
        'id = "bench"',
        f'control_addr = "{LOOPBACK}:{control}"',
        f'ingress_addr = "{LOOPBACK}:{visitors}"',
        f'public_names = ["{LOOPBACK}:{control}"]',
        "heartbeat_ms = 60000",  # so that a busy machine loses no link
        *(['tls_certificate = "relay.crt"', 'tls_private_key = "relay.key"', "ingress_tls = false"] if tls else []),
        "[relay.limits]",
        "connections = 100000",
        "handshakes_per_second = 0",
        "streams_per_tunnel = 0",
        "opens_per_second_per_tunnel = 0",
    ]
    for number, key in enumerate(keys):
        lines += ["[[relay.tunnels]]", f'id = "t{number}"', f'url = "http://{host_of(number)}"']
        lines += [f'key = "{key.identity().public_key}"']
    lines += more
    (folder / "relay.toml").write_text("\n".join(lines))
    started = [*command, "relay", "--config", str(folder / "relay.toml"), *arguments]
    with running(folder, "relay", started, cwd=Path()) as program:
        wait_until_listening(control, program)
        yield Relay(folder=folder, keys=keys, control=control, visitors=visitors, tls=tls, process=program.process)


@contextmanager
def gateways(to: Relay) -> Iterator[Process]:
    """Connect a gateway to each tunnel of a relay; they are in one process."""
    keys = to.folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text("\n".join(key.reveal() for key in to.keys))
    url = f"{'wss' if to.tls else 'ws'}://{LOOPBACK}:{to.control}"
    command = [sys.executable, "-m", "benchmarks.scaling.gateways", str(keys), url]
    # Each tunnel reads the certificates that it trusts. These few are read faster than the system's.
    environment = os.environ | ({"SSL_CERT_FILE": str(to.folder / "ca.pem")} if to.tls else {})
    with (
        (to.folder / "gateways.log").open("w") as log,
        Popen(command, stdout=PIPE, stderr=log, text=True, env=environment) as process,
        ended(process),
    ):
        assert process.stdout is not None
        if process.stdout.readline().strip() != "connected":
            raise RuntimeError(f"the gateways do not connect\n{(to.folder / 'gateways.log').read_text()}")
        yield Process(process.pid)


def visit(to: Relay, *, count: int, at_once: int, requests: int = 1) -> float:
    """Let so many visitors come, from a process of its own. Returns how many seconds it took."""
    numbers = map(str, (to.visitors, len(to.keys), count, at_once, requests))
    command = [sys.executable, "-m", "benchmarks.scaling.visitors", *numbers]
    return float(subprocess.run(command, stdout=PIPE, text=True, check=True).stdout)
