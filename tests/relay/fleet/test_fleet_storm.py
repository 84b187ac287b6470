"""A fleet of real processes under traffic, while nodes and Redis are killed, stopped and started again at random.

No visitor may get a wrong byte, and when everything runs again, everybody is reached at every node.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Final, final

import pytest
import trio
from fleet_processes import Fleet, FleetNodeProcess, ask, fleet_of, hashing_gateway
from rig import HANG, in_background

from pioneer_tunnel import Tunnel, open_tunnel

TUNNELS: Final = ("t0", "t1", "t2", "t3")
FAULTS: Final = 12
VISITORS: Final = 6


@final
class Storm:
    """The faults, and who is well meanwhile."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet: Final = fleet
        self._random: Final = random.Random(seed)
        self._stopped: Final[set[FleetNodeProcess]] = set()
        self.events: Final[Counter[str]] = Counter()

    def well(self) -> list[FleetNodeProcess]:
        """The nodes that answer, in a random order, as a balancer that checks health sees them."""
        nodes = [node for node in self._fleet.nodes if node.runs and node not in self._stopped]
        self._random.shuffle(nodes)
        return nodes

    async def rage(self) -> None:
        """One fault after the other. One node at least is well at each time."""
        redis = self._fleet.redis
        for _ in range(FAULTS):
            await trio.sleep(self._random.uniform(0.2, 2))
            well = self.well()
            fault = self._random.choice(["kill", "stop", "restart", "redis killed", "redis paused"])
            if fault in {"kill", "stop", "restart"} and len(well) < 2:
                fault = "heal"
            self.events[fault] += 1
            match fault:
                case "kill":
                    well[0].kill()
                case "stop":
                    self._stopped.add(well[0])
                    well[0].signal(signal.SIGSTOP)
                case "restart":
                    await trio.to_thread.run_sync(well[0].kill)
                    await self._start(well[0])
                case "redis killed":
                    redis.kill()
                    await trio.sleep(self._random.uniform(0, 3))
                    await trio.to_thread.run_sync(redis.start)
                case "redis paused":
                    redis.pause()
                    await trio.sleep(self._random.uniform(0, 4))
                    redis.go_on()
                case _:
                    await self.heal()

    async def heal(self) -> None:
        """Let all nodes run."""
        for node in self._fleet.nodes:
            if not node.runs:
                await self._start(node)
        for node in [*self._stopped]:
            node.signal(signal.SIGCONT)
            self._stopped.discard(node)

    async def _start(self, node: FleetNodeProcess) -> None:
        self._stopped.add(node)
        await trio.to_thread.run_sync(node.start)
        self._stopped.discard(node)

    async def visit(self) -> None:
        """One visitor after the other, at nodes that are well."""
        while True:
            node, name = self._random.choice(self.well()), self._random.choice(TUNNELS)
            body = self._random.randbytes(self._random.choice([0, 100, 300_000]))
            await self.visit_once(node, name, body)

    async def visit_once(self, node: FleetNodeProcess, name: str, body: bytes) -> bool:
        """Whether a visitor is served. A wrong answer fails the test."""
        try:
            with trio.fail_after(20):
                status, answer, address = await ask(node, f"{name}.test", body)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            self.events["broken off"] += 1
            return False
        self.events[str(status)] += 1
        if status == 200:
            assert answer in {"", f"{address} {hashlib.sha256(body).hexdigest()}"}  # empty: it was cut, and reset
        return status == 200 and answer != ""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["websockets", "trio-websocket"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_fleet_in_a_storm(tmp_path: Path, seed: int, engine: str) -> None:
    with fleet_of(tmp_path, "fra1", "fra2", "ams1", tunnels=TUNNELS, options=["--websocket-engine", engine]) as fleet:
        storm = Storm(fleet, seed)
        async with fleet.balanced(storm.well) as url, trio.open_nursery() as nursery:
            for name in TUNNELS:
                await nursery.start(keep_gateway, url, fleet, name)
            async with in_background(*[storm.visit] * VISITORS):
                await storm.rage()
            await storm.heal()
            print(dict(storm.events))
            with trio.fail_after(HANG):
                for name in TUNNELS:
                    for node in fleet.nodes:
                        while not await storm.visit_once(node, name, b"after the storm"):
                            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()


async def keep_gateway(url: str, fleet: Fleet, name: str, *, task_status: trio.TaskStatus[Tunnel]) -> None:
    async with open_tunnel(url, key=fleet.keys[name]) as tunnel:
        await tunnel.wait_connected()
        task_status.started(tunnel)
        await hashing_gateway(tunnel)
