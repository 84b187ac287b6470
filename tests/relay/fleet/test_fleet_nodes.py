"""A fleet of real processes: visitors come to any node, and nodes and Redis are killed and stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import trio
from fleet_rig import Fleet, ask, fleet_of, hashing_gateway
from rig import HANG, in_background


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("fleet"), "fra1", "fra2", "ams1", tunnels=("office", "shop")) as fleet:
        yield fleet


async def test_a_visitor_reaches_a_gateway_at_any_node_and_is_known_by_its_address(fleet: Fleet) -> None:
    body = bytes(range(256)) * 1024
    async with fleet.gateway("office", fleet.nodes[0]) as tunnel, in_background(lambda: hashing_gateway(tunnel)):
        for node in fleet.nodes:
            with trio.fail_after(HANG):
                status, answer, address = await ask(node, "office.test", body)
            assert (status, answer) == (200, f"{address} {hashlib.sha256(body).hexdigest()}")
