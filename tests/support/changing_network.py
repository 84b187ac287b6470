"""A program that changes the network of its own namespace, and prints what was reported after each change.

unshare --net python changing_network.py [poll]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import patch

import trio

from pioneer_tunnel._net import network_changes


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def come_home() -> None:
    ip("link", "set", "lo", "up")
    ip("link", "add", "up0", "type", "veth", "peer", "name", "router")
    ip("link", "set", "router", "up")
    ip("link", "set", "up0", "up")
    ip("addr", "add", "10.0.0.2/24", "dev", "up0")
    add_route()


def add_route() -> None:
    ip("route", "add", "default", "via", "10.0.0.1")


def containers_come_and_go() -> None:
    for _ in range(10):
        ip("link", "add", "c0", "type", "veth", "peer", "name", "c1")
        ip("link", "set", "c0", "up")
        ip("link", "set", "c1", "up")
        ip("addr", "add", "172.17.0.1/16", "dev", "c0")
        ip("link", "del", "c0")


def same_address_again() -> None:
    ip("addr", "add", "10.0.0.9/24", "dev", "up0")


def lose_the_address() -> None:
    ip("addr", "flush", "dev", "up0")


def another_address() -> None:
    ip("addr", "add", "10.0.0.3/24", "dev", "up0")
    add_route()


def lose_the_route() -> None:
    ip("route", "del", "default")


def roam() -> None:
    """The same address and route, somewhere else."""
    lose_the_address()
    another_address()


def pull_the_cable() -> None:
    ip("link", "set", "router", "down")


def put_it_back() -> None:
    ip("link", "set", "router", "up")


STEPS: list[Callable[[], None]] = [
    containers_come_and_go,
    same_address_again,
    lose_the_address,
    another_address,
    lose_the_route,
    add_route,
    roam,
    pull_the_cable,
    put_it_back,
    containers_come_and_go,
]


async def main() -> None:
    come_home()
    reports: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network_changes.watch_network, reports.append, lambda: ["198.51.100.7"])
        await trio.sleep(0.5)
        for step in STEPS:
            reports.clear()
            step()
            await trio.sleep(network_changes.PAUSE + 0.5)
            print(json.dumps([step.__name__, len(reports)]), flush=True)
        nursery.cancel_scope.cancel()


def refuse() -> NoReturn:
    raise PermissionError("no netlink")


if __name__ == "__main__":
    if "poll" in sys.argv:
        with patch.object(network_changes, "_subscribe", refuse), patch.object(network_changes, "POLL", 0.2):
            trio.run(main)
    else:
        trio.run(main)
