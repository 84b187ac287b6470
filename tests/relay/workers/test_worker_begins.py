"""A worker that begins while another one ends: what it hears before it has a relay is in force when it has one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

import trio
from rig import AT_ONCE, KEY, connect, in_background, no_hang, read_all, request

from pioneer_tunnel import TunnelStream, open_tunnel
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay.workers.channel import Channel
from pioneer_tunnel.relay.workers.records import ParentRecords
from pioneer_tunnel.relay.workers.setup import Setup
from pioneer_tunnel.relay.workers.worker import Worker

SELF: Final = "a" * 16
OTHER: Final = "b" * 16
WAITING: Final = 0.2
"""Seconds in which a visitor who does not wait has its answer."""


async def test_visitors_wait_for_a_gateway_whose_worker_is_killed_while_this_one_begins(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as control, socket.create_server(("127.0.0.1", 0)) as ingress:
        gateways, visitors = Address(*control.getsockname()), Address(*ingress.getsockname())
        file = f"""
            [relay]
            control_addr = "{gateways}"
            ingress_addr = "{visitors}"
            id = "relay"
            public_names = ["{gateways}"]

            [[relay.tunnels]]
            id = "office"
            url = "http://office.test"
            key = "{KEY.identity().public_key}"
            """
        setup = Setup(index=0, workers=2, base=file, tunnels=file, process=SELF, folder=str(tmp_path))
        records = ParentRecords()

        async def answer(method: str, params: Any) -> Any:
            match method:
                case "join":
                    return records.join(SELF, parent.tell)
                case "read":
                    return records.read(params)
                case "write":
                    return records.write(SELF, params)

        async def visit() -> bytes:
            async with await connect(visitors) as visitor:
                await visitor.send_all(request("Connection: close", host="office.test"))
                return await read_all(visitor)

        ours, theirs = socket.socketpair()
        parent = Channel(ours, answer, lambda *_: None)
        with no_hang():
            async with in_background(parent.run, Worker(theirs, tmp_path / "relay.toml")._run):
                parent.tell("sockets", str(gateways), [control])
                parent.tell("sockets", str(visitors), [ingress])
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(parent.call, "start", setup.to_wire())
                    await trio.lowlevel.checkpoint()
                    parent.tell("expect", {"process": OTHER, "tunnels": ["office"], "ended": True})
                with trio.move_on_after(WAITING):
                    raise AssertionError(await visit())
                async with (
                    open_tunnel(f"ws://{gateways}", key=KEY, restart=AT_ONCE) as tunnel,
                    in_background(lambda: trio.serve_listeners(serve, [tunnel])),
                ):
                    assert (await visit()).startswith(b"HTTP/1.1 200")


async def serve(stream: TunnelStream) -> None:
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
