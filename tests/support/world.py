"""A relay of one kind as a program: it tells its address, and visits its gateway once for each line that it reads.

python world.py (websocket | tcp | tls CERTIFICATE KEY)
"""

from __future__ import annotations

import ssl
import sys

import trio
from rig import HANG, KEY, free_port, read_all, relay_rig, request

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.testing import open_pioneer_relay


async def visit_on_demand(ingress: Address) -> None:
    commands = trio.wrap_file(sys.stdin)
    async for _ in commands:
        with trio.fail_after(HANG):
            async with await trio.open_tcp_stream("127.0.0.1", ingress.port) as stream:
                await stream.send_all(request("Connection: close"))
                print(f"visited {await read_all(stream)!r}", flush=True)


async def main(*arguments: str) -> None:
    kind, *certificate = arguments
    if kind == "websocket":
        port = free_port()
        async with relay_rig(control_addr=f"127.0.0.1:{port}", public_names=[f"relay.test:{port}"]) as rig:
            print(f"listening at {port}", flush=True)
            await visit_on_demand(rig.addresses.ingress)
        return
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*certificate)
    async with open_pioneer_relay(key=KEY, tls=tls) as relay:
        print(f"listening at {relay.address.port}", flush=True)
        await visit_on_demand(relay.visitors)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
