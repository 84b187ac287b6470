"""What a visitor costs who reaches another node than its gateway: `python -m benchmarks.scaling.hop`.

Two nodes with a real Redis, on one machine. All gateways are at the first one. Visitors come to the first one, and to
the second one, which carries them to the first over its link. Counts are those of both nodes, as in `workers`.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from pioneer_tunnel import new_relay_key
from pioneer_tunnel.relay.administration.fleet_file import write_node_key

from ..counts import Counts, counted
from ..machine import machine
from ..processes import LOOPBACK, allow_many_descriptors, free_port, running, wait_until
from .relays import OURS, Relay, gateways, relay, visit
from .visitors import ask, come

TUNNELS: Final = 20
MANY: Final = 200
NODES: Final = ("near", "far")
SETTLE: Final = 1.0


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis for the fleet; yields its URL."""
    path = folder / "redis"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    with running(folder, "redis-server", command) as program:
        wait_until(lambda: _connect(path), program)
        yield f"unix://{path}"


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


@contextmanager
def two_nodes(folder: Path, *, counting: bool) -> Iterator[tuple[Relay, Relay]]:
    """The node with the gateways, and the other one."""
    keys = [new_relay_key() for _ in range(TUNNELS)]
    ports = {name: free_port() for name in NODES}
    for name in NODES:
        write_node_key(name, folder)
    others: list[str] = []
    for name, port in ports.items():
        others += ["[[relay.fleet.nodes]]", f'name = "{name}"', f'address = "{LOOPBACK}:{port}"']
        others += [f'certificate = "{folder / name}.pem"']

    with redis(folder) as url:

        @contextmanager
        def node(name: str) -> Iterator[Relay]:
            (folder / f"{name}.d").mkdir()
            table = ["[relay.fleet]", f'node = "{name}"', f'redis = "{url}"']
            table += [f'listen = "{LOOPBACK}:{ports[name]}"', f'key_file = "{folder / name}.key"', *others]
            command = (sys.executable, "-m", "benchmarks.counted", str(folder)) if counting else OURS
            with relay(folder / f"{name}.d", TUNNELS, command=command, keys=keys, more=table) as one:
                yield one

        with node("near") as near, node("far") as far, gateways(near):
            yield near, far


def count() -> dict[str, Counts]:
    """The counts for one visitor at each node."""
    found: dict[str, Counts] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        with two_nodes(folder, counting=True) as nodes:
            pids = [one.process.pid for one in nodes]
            for where, one in zip(NODES, nodes, strict=True):
                visit(one, count=TUNNELS * 5, at_once=1)  # what is done the first time only
                costs = []
                for many in (MANY, 2 * MANY):
                    time.sleep(SETTLE)
                    before = counted(pids, folder)
                    visit(one, count=many, at_once=1)
                    time.sleep(SETTLE)
                    after = counted(pids, folder)
                    costs.append({what: after[what] - before[what] for what in after})
                found[where] = {what: round((costs[1][what] - costs[0][what]) / MANY, 1) for what in costs[0]}
    return found


def measure(*, visitors: int, at_once: int) -> dict[str, tuple[float, float]]:
    """CPU milliseconds of a visitor at both nodes together, and visitors per second, by where they come."""
    found: dict[str, tuple[float, float]] = {}
    with TemporaryDirectory() as name, two_nodes(Path(name), counting=False) as nodes:
        for where, one in zip(NODES, nodes, strict=True):
            visit(one, count=TUNNELS * 5, at_once=at_once)
            time.sleep(SETTLE)
            before = sum(node.process.cpu for node in nodes)
            seconds = visit(one, count=visitors, at_once=at_once)
            time.sleep(SETTLE)
            spent = sum(node.process.cpu for node in nodes) - before
            found[where] = spent * 1000 / visitors, visitors / seconds
    return found


def held(streams: int) -> dict[str, dict[str, float]]:
    """KiB that a visitor takes at each node who has had an answer and stays, by where it comes."""
    return {where: _held(streams, index) for index, where in enumerate(NODES)}


def _held(streams: int, index: int) -> dict[str, float]:
    with TemporaryDirectory() as folder, two_nodes(Path(folder), counting=False) as nodes, ExitStack() as visitors:

        def come_and_stay(many: int) -> list[float]:
            for number in range(many):
                ask(visitors.enter_context(come(nodes[index].visitors)), number % TUNNELS)
            time.sleep(SETTLE)
            return [node.process.memory * 1024 for node in nodes]

        before = come_and_stay(MANY)  # what is allocated for the first ones alone
        after = come_and_stay(streams)
    return {name: (now - then) / streams for name, now, then in zip(NODES, after, before, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.hop", description="A hop between two nodes.")
    parser.add_argument("--visitors", type=int, default=2000, help="default %(default)s")
    parser.add_argument("--at-once", type=int, default=20, help="visitors at a time (default %(default)s)")
    parser.add_argument("--streams", type=int, default=2000, help="visitors that stay (default %(default)s)")
    arguments = parser.parse_args()
    allow_many_descriptors()
    print(machine())
    for where, memory in held(arguments.streams).items():
        at = ", ".join(f"{size:.1f} KiB at the node {name}" for name, size in memory.items())
        print(f"{where}: a visitor that stays takes {at}", flush=True)
    for where, counts in count().items():
        print(f"{where}: {', '.join(f'{number:,.1f} {what}' for what, number in counts.items())}", flush=True)
    for where, (cpu, rate) in measure(visitors=arguments.visitors, at_once=arguments.at_once).items():
        print(f"{where}: {cpu:.3f} CPU ms, {rate:,.0f}/s")


if __name__ == "__main__":
    main()
