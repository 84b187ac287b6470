"""Parent and workers of several versions: they work together, or a worker says why not and does not start."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from rig import no_hang

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.records import Holding, Record
from pioneer_tunnel.relay.workers.channel import CallFailed, Channel
from pioneer_tunnel.relay.workers.setup import PROTOCOL, Setup
from pioneer_tunnel.relay.workers.worker import Worker

SETUP: Final = Setup(index=0, workers=2, base="", tunnels="", process="a" * 16, folder="")


async def test_a_worker_whose_parent_speaks_another_protocol_does_not_start() -> None:
    async def answer(_method: str, _params: Any) -> None:
        """A worker that does not start asks nothing."""

    ours, theirs = socket.socketpair()
    parent = Channel(ours, answer, lambda *_: None)
    with no_hang():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.run)
            nursery.start_soon(Worker(theirs, Path("relay.toml"))._run)
            with pytest.raises(CallFailed, match="of another version; restart the relay as a whole"):
                await parent.call("start", SETUP.to_wire() | {"protocol": PROTOCOL + 1})
            parent.tell("end")


def test_what_all_versions_of_a_protocol_send_is_that_of_its_number() -> None:
    """A new field has a default, for those who do not send it. Otherwise it takes another number."""
    required = {kind.__name__: sorted(_required(kind)) for kind in (Setup, Holding, LinkPlace, Record)}
    assert (PROTOCOL, required) == (
        1,
        {
            "Setup": ["base", "folder", "index", "process", "tunnels", "workers"],
            "Holding": ["instance", "key_id", "node", "process", "session", "since"],
            "LinkPlace": ["index", "of"],
            "Record": ["version"],
        },
    )


def _required(kind: type[attrs.AttrsInstance]) -> set[str]:
    return {field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING}
