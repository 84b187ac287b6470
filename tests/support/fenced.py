"""Two network namespaces: a gateway's, and the world's with a relay and a proxy. A wire between them is the only way.

The world alone knows the name `relay.test`. Every packet of the gateway's namespace is recorded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import pytest
from rig import HANG

__all__ = ["GATEWAY", "WORLD", "Fence", "fence", "lines_of"]

WORLD, GATEWAY = "10.99.0.1", "10.99.0.2"
_HERE: Final = Path(__file__).parent
_SOURCE: Final = _HERE.parents[1]
_AS_ROOT: Final = os.geteuid() == 0 if hasattr(os, "geteuid") else False

_RECORDER: Final = r"""
import socket, struct, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
print("recording", flush=True)
while True:
    data, (interface, kind, *_) = packets.recvfrom(65536)
    if kind == 0x0800:
        length, protocol = (data[0] & 15) * 4, data[9]
        source, target = (socket.inet_ntoa(data[at : at + 4]) for at in (12, 16))
        ports = struct.unpack("!HH", data[length : length + 4]) if protocol in (6, 17) else (0, 0)
        print(interface, protocol, source, ports[0], target, ports[1], flush=True)
    elif kind == 0x86DD:
        source, target = (socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24))
        print(interface, data[6], source, 0, target, 0, flush=True)
"""


@final
@attrs.frozen
class Packet:
    interface: str
    protocol: int
    source: str
    source_port: int
    target: str
    target_port: int

    @classmethod
    def parse(cls, line: str) -> Packet:
        interface, protocol, source, source_port, target, target_port = line.split()
        return cls(interface, int(protocol), source, int(source_port), target, int(target_port))


@final
@attrs.frozen
class Fence:
    """The namespaces.

    Attributes:
        world: the beginning of a command that runs in the world.
        gateway: the same for the gateway's namespace.
    """

    world: Sequence[str]
    gateway: Sequence[str]

    def run_in_world(self, *command: str) -> None:
        _check([*self.world, *command])

    @contextmanager
    def program(self, place: Sequence[str], *command: str) -> Iterator[subprocess.Popen[str]]:
        environment = os.environ | {"PYTHONPATH": f"{_SOURCE}:{_HERE}", "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
        process = subprocess.Popen(
            [*place, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.communicate(timeout=HANG)
            finally:
                process.kill()

    @contextmanager
    def recorded(self, packets: list[Packet]) -> Iterator[None]:
        """Append all packets of the gateway's namespace to `packets`, at the end of the block."""
        with self.program(self.gateway, sys.executable, "-c", _RECORDER) as recorder:
            lines_of(recorder, "recording")
            try:
                yield
            finally:
                recorder.terminate()
                packets += map(Packet.parse, recorder.communicate(timeout=HANG)[0].splitlines())


def lines_of(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read what a program writes until a line matches; the caller's timeout is pytest's."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no {pattern!r} in {''.join(seen)!r}")


def _check(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, (command, done.stderr)


@contextmanager
def fence(folder: Path) -> Iterator[Fence]:
    """Make the namespaces, or skip the test where the system does not allow that."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    own_user = [] if _AS_ROOT else ["--user", "--map-root-user"]
    tried = subprocess.run(["unshare", *own_user, "--net", "--mount", "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"this system makes no network namespaces for us: {tried.stderr.decode().strip()}")
    with ExitStack() as stack:
        user = [] if _AS_ROOT else ["--user", "--preserve-credentials"]
        world_id = _sleep(stack, ["unshare", *own_user, "--net", "--mount"])
        of_world = ["nsenter", "--target", str(world_id), *user, "--net", "--mount"]
        outer = [] if _AS_ROOT else ["nsenter", "--target", str(world_id), *user]
        gateway_id = _sleep(stack, [*outer, "unshare", "--net"])
        of_gateway = ["nsenter", "--target", str(gateway_id), *user, "--net"]
        found = Fence(of_world, of_gateway)
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost relay.test\n")
        hosts.chmod(0o644)
        found.run_in_world("mount", "--bind", str(hosts), "/etc/hosts")
        found.run_in_world(
            *("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(gateway_id))
        )
        for place, own in ((of_world, WORLD), (of_gateway, GATEWAY)):
            for command in (f"ip link set wire addrgenmode none up; ip link set lo up; ip addr add {own}/24 dev wire",):
                _check([*place, "sh", "-ec", command])
        # What is not for the proxy would leave by this way, and be recorded.
        _check([*of_gateway, "ip", "route", "add", "default", "via", WORLD])
        yield found


def _sleep(stack: ExitStack, within: Sequence[str]) -> int:
    """Start a process that holds a namespace; returns its id when it is in there."""
    process = subprocess.Popen([*within, "sh", "-c", "echo; exec sleep 1000000"], stdout=subprocess.PIPE)

    def end() -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    stack.callback(end)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid
