"""The listening sockets of all workers: who waits there, survives the worker."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest
from rig import KEY, free_ports

from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel.relay import RelayConfig
from pioneer_tunnel.relay.inherited import Inherited
from pioneer_tunnel.relay.workers.sockets import SharedSockets

OTHER: Final = new_relay_key().identity().public_key


def config(*, control: str = "127.0.0.1:0", ingress: str = "127.0.0.1:0", **more: Any) -> RelayConfig:
    return RelayConfig(control_addr=control, ingress_addr=ingress, id="r", public_names=["relay.test"], **more)


def tunnel(name: str, bind: str) -> dict[str, Any]:
    return {"id": name, "url": f"https://{name}.test:1", "key": KEY.identity().public_key, "bind_addr": bind}


@contextlib.contextmanager
def sockets(workers: int, inherited: Inherited | None = None) -> Iterator[SharedSockets]:
    shared = SharedSockets(workers, inherited or Inherited())
    try:
        yield shared
    finally:
        shared.close()


def waiting(listening: Sequence[socket.socket]) -> int:
    """How many connections wait there; they are accepted."""
    found = 0
    for one in listening:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.accept()[0].close()
                found += 1
    return found


def connected(port: int, amount: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(amount)]


async def test_each_worker_gets_some_of_the_connections() -> None:
    with sockets(3) as shared:
        await shared.open(config())
        addresses = shared.addresses(config())
        assert addresses.all_control == addresses.all_ingress, "port 0 is one port for all workers"
        visitors = connected(addresses.ingress.port, 90)
        found = [waiting(shared.of_worker(index)["127.0.0.1:0"]) for index in range(3)]
        assert sum(found) == 90
        if sys.platform == "linux":
            assert min(found) > 5
        for visitor in visitors:
            visitor.close()


async def test_another_relay_at_the_same_address_is_an_error() -> None:
    """Two processes with SO_REUSEPORT would share the port, and each other's visitors."""
    with sockets(2) as shared, sockets(2) as other:
        await shared.open(config())
        port = shared.addresses(config()).ingress.port
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}: ") as refused:
            await other.open(config(ingress=f"127.0.0.1:{port}"))
        assert refused.value.errno == errno.EADDRINUSE


async def test_nothing_changes_if_one_address_cannot_be_had() -> None:
    with sockets(2) as shared, socket.create_server(("127.0.0.1", 0)) as taken:
        before = config()
        await shared.open(before)
        port = taken.getsockname()[1]
        after = config(tunnels=[tunnel("one", "127.0.0.1:0"), {**tunnel("two", f"127.0.0.1:{port}"), "key": OTHER}])
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
            await shared.open(after)
        assert [*shared.of_worker(0)] == ["127.0.0.1:0"]


async def test_addresses_come_and_go_with_the_configuration() -> None:
    with sockets(2) as shared:
        before, after = config(), config(tunnels=[tunnel("ssh", "127.0.0.1:0")])
        await shared.open(before)
        kept = shared.of_worker(1)["127.0.0.1:0"]
        opened = await shared.open(after)
        (name,) = opened
        assert name == "127.0.0.1:0 of ssh, service None"
        assert shared.of_worker(1) == {"127.0.0.1:0": kept, name: opened[name][1]}
        port = shared.addresses(after).tunnels["ssh"].port
        shared.keep_only(before)
        assert [*shared.of_worker(1)] == ["127.0.0.1:0"]
        with pytest.raises(ConnectionRefusedError):
            connected(port, 1)


async def test_each_worker_of_a_node_alone_accepts_other_nodes_at_its_port() -> None:
    first = free_ports(4)
    node = {"node": "fra1", "redis": "redis://127.0.0.1", "listen": f"127.0.0.1:{first}", "key_file": "fra1.key"}
    with sockets(3) as shared:
        await shared.open(config(fleet=node))
        names = [f"127.0.0.1:{first + index}" for index in range(3)]
        for index, name in enumerate(names):
            assert [other for other in names if other in shared.of_worker(index)] == [name]
            assert name not in shared.only_of_worker(index), "nobody stands in there"
            with contextlib.closing(connected(first + index, 1)[0]):
                assert waiting(shared.of_worker(index)[name]) == 1
        again = shared.of_worker(2)[names[2]]
        await shared.open(config(fleet=node))
        assert shared.of_worker(2)[names[2]] is again
        moved = config(fleet=node | {"listen": f"127.0.0.1:{first + 1}"})
        shared.keep_only(moved)
        assert names[0] not in shared.of_worker(0)
        shared.keep_only(config())
        for port in range(first, first + 3):
            with pytest.raises(ConnectionRefusedError):
                connected(port, 1)
        with socket.create_server(("127.0.0.1", first + 1)), pytest.raises(OSError, match=f"{first + 1}") as failed:
            await shared.open(config(fleet=node))
        assert failed.value.errno == errno.EADDRINUSE


async def test_a_socket_of_systemd_is_shared() -> None:
    """It belongs to another user, so that no second one can be opened beside it."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    with sockets(2, Inherited({address: [listening]})) as shared:
        await shared.open(config(ingress=address))
        one, other = (shared.of_worker(index)[address] for index in range(2))
        assert one is other
        assert [*shared.only_of_worker(0)] == (["127.0.0.1:0"] if sys.platform == "linux" else [])


async def test_ipv6_accepts_ipv4_at_each_worker() -> None:
    with sockets(2) as shared:
        await shared.open(config(ingress="[::]:0"))
        only = [
            one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            for index in range(2)
            for one in shared.of_worker(index)["[::]:0"]
        ]
        assert only == [0, 0]
