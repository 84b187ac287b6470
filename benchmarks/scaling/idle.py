"""What an idle tunnel takes of a relay's memory: `python -m benchmarks.scaling.idle`.

A relay process has many tunnels. Its resident memory is measured before the first gateway connects, and when all have
been connected for some seconds. A relay with one tunnel gives what it takes by itself. The kernel's memory for sockets
is measured for the whole machine, and half of it is the relay's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, final

import attrs

from ..machine import machine
from ..processes import allow_many_descriptors
from .relays import gateways, relay

TUNNELS: Final = 2000
EXTRAPOLATED: Final = 50_000
GOAL: Final = 4.0
"""GiB for so many tunnels without TLS."""
SETTLE: Final = 5.0


@final
@attrs.frozen(kw_only=True)
class Idle:
    """What the relay takes. All in KiB, the last three for one tunnel.

    Attributes:
        relay: the relay with one tunnel that is not connected.
        entry: an entry of its file.
        session: a connected gateway.
        kernel: the sockets of a gateway's connection, at the relay.
    """

    relay: float
    entry: float
    session: float
    kernel: float

    def total(self, tunnels: int) -> float:
        """GiB of a relay with so many connected gateways."""
        return (self.relay + tunnels * (self.entry + self.session)) / 2**20


def measure(tunnels: int, *, tls: bool) -> Idle:
    with TemporaryDirectory() as name, relay(Path(name), 1, tls=tls) as smallest:
        time.sleep(SETTLE)
        alone = smallest.process.memory * 1024
    with TemporaryDirectory() as name, relay(Path(name), tunnels, tls=tls) as one:
        time.sleep(SETTLE)
        empty, kernel_before = one.process.memory * 1024, kernel_memory()
        with gateways(one):
            time.sleep(SETTLE)
            full, kernel = one.process.memory * 1024, kernel_memory()
    return Idle(
        relay=alone,
        entry=(empty - alone) / tunnels,
        session=(full - empty) / tunnels,
        kernel=(kernel - kernel_before) / 2 / tunnels,
    )


def kernel_memory() -> float:
    """KiB that the kernel has for its own objects. Sockets are among them."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return float(line.split()[1])
    raise RuntimeError("/proc/meminfo does not tell")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.idle", description="Memory of idle tunnels.")
    parser.add_argument("--tunnels", type=int, default=TUNNELS, help="how many (default %(default)s)")
    parser.add_argument("--tls", action="store_true", help="gateways come with TLS")
    arguments = parser.parse_args()
    allow_many_descriptors()
    idle = measure(arguments.tunnels, tls=arguments.tls)
    print(
        f"{machine()}.\n{arguments.tunnels:,} tunnels {'with' if arguments.tls else 'without'} TLS: the relay alone"
        f" {idle.relay / 1024:.1f} MiB; for each tunnel {idle.entry:.1f} KiB for its entry, {idle.session:.1f} KiB for"
        f" its session, and {idle.kernel:.1f} KiB in the kernel.\n"
        f"{EXTRAPOLATED:,} tunnels: {idle.total(EXTRAPOLATED):.2f} GiB; the goal without TLS is {GOAL:g}."
    )


if __name__ == "__main__":
    main()
