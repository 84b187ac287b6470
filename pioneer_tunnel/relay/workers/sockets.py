"""The listening sockets of all workers. The parent keeps them, so they outlive each worker.

A socket that is closed resets the connections that wait to be accepted. So a worker's sockets stay open when it ends or
is killed, and others accept who waits there.

On Linux each worker has a socket of its own for each address (SO_REUSEPORT), and the kernel spreads connections over
them. Elsewhere, and for sockets of systemd, all workers accept at the same socket: macOS would give all connections to
the newest socket of an address, and a socket of systemd belongs to another user.

In a fleet each worker also has an address of its own, for other nodes. No other worker accepts there: other nodes come
for the sessions of this worker.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, final

from ..._model.addresses import Address
from ..addresses import RelayAddresses
from ..config import RelayConfig
from ..inherited import Inherited
from ..listeners import BACKLOG, bound_address, name_of, open_listeners
from ..tunnels import Addresses, each_address

__all__ = ["SharedSockets"]


@final
class SharedSockets:
    """The sockets.

    Args:
        workers: how many there are.
        inherited: sockets that listen already.
    """

    def __init__(self, workers: int, inherited: Inherited) -> None:
        self._workers: Final = workers
        self._inherited: Final = inherited
        self._sockets: Final[dict[str, list[list[socket.socket]]]] = {}
        self._for_nodes: Final[dict[int, dict[str, list[socket.socket]]]] = {index: {} for index in range(workers)}
        self._addresses: Final[dict[str, Address]] = {}

    async def open(self, config: RelayConfig) -> Mapping[str, Sequence[Sequence[socket.socket]]]:
        """Listen at each address of `config` at which nothing listens yet.

        Returns:
            The new sockets of each worker, by the names of their addresses.

        Raises:
            OSError: the relay cannot listen at an address. Nothing has changed then.
        """
        opened: dict[str, list[list[socket.socket]]] = {}
        try:
            for name, address in _addresses_of(config):
                if name not in self._sockets and name not in opened:
                    opened[name] = await self._listen(name, address, config)
            await self._listen_for_nodes(config)
        except BaseException:
            _close(opened.values())
            raise
        self._sockets.update(opened)
        return opened

    def keep_only(self, config: RelayConfig) -> None:
        """Close the sockets of all addresses that `config` does not name."""
        staying = {name for name, _ in _addresses_of(config)}
        for name in self._sockets.keys() - staying:
            _close([self._sockets.pop(name)])
            del self._addresses[name]
        for index, own in self._for_nodes.items():
            for name in own.keys() - {str(_address_for_nodes(config, index))}:
                _close([[own.pop(name)]])

    def of_worker(self, index: int) -> Mapping[str, Sequence[socket.socket]]:
        """The sockets of a worker, by the names of their addresses."""
        return {name: of_all[index] for name, of_all in self._sockets.items()} | self._for_nodes[index]

    def only_of_worker(self, index: int) -> dict[str, Sequence[socket.socket]]:
        """Those of them at which no other worker accepts, for gateways and visitors."""
        return {
            name: of_all[index]
            for name, of_all in self._sockets.items()
            if sum(of_one is of_all[index] for of_one in of_all) == 1
        }

    def addresses(self, config: RelayConfig) -> RelayAddresses:
        """Where the relay listens, without its sites."""
        tunnels: dict[str, tuple[Address, ...]] = {}
        for tunnel in config.tunnels:
            for route in tunnel.routes:
                for address in each_address(route.bind_addr):
                    bound = self._addresses[name_of(address, route)]
                    tunnels[tunnel.id] = (*tunnels.get(tunnel.id, ()), bound)
        return RelayAddresses(
            all_control=self._all_of(config.control_addr),
            all_ingress=self._all_of(config.ingress_addr),
            all_tunnels=tunnels,
            all_http=self._all_of(config.http_addr),
        )

    def _all_of(self, key: Addresses | None) -> tuple[Address, ...]:
        return tuple(self._addresses[name_of(address)] for address in each_address(key))

    def close(self) -> None:
        """Close all of them."""
        _close([*self._sockets.values(), *([*own.values()] for own in self._for_nodes.values())])
        self._sockets.clear()
        for own in self._for_nodes.values():
            own.clear()
        self._addresses.clear()

    async def _listen_for_nodes(self, config: RelayConfig) -> None:
        for index, own in self._for_nodes.items():
            address = _address_for_nodes(config, index)
            if address is not None and (name := str(address)) not in own:
                listeners = await open_listeners(address, config.all_addresses, inherited=self._inherited.take(name))
                own[name] = [socket.socket(fileno=listener.socket.detach()) for listener in listeners]

    async def _listen(self, name: str, address: Address, config: RelayConfig) -> list[list[socket.socket]]:
        inherited = self._inherited.take(name)
        # The first ones are opened without SO_REUSEPORT, so that it is an error if another relay listens there.
        listeners = await open_listeners(address, config.all_addresses, inherited=inherited)
        self._addresses[name] = bound_address(address, listeners)
        first = [socket.socket(fileno=listener.socket.detach()) for listener in listeners]
        if inherited or sys.platform != "linux":
            return [first] * self._workers
        of_all = [first]
        try:
            for one in first:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for _ in range(1, self._workers):
                of_all.append([])
                for one in first:
                    of_all[-1].append(_another(one))
        except OSError as error:
            _close([of_all])
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
        return of_all


def _addresses_of(config: RelayConfig) -> Iterator[tuple[str, Address]]:
    """Each address at which workers listen, after its name."""
    for key in (config.control_addr, config.ingress_addr, config.http_addr):
        for address in each_address(key):
            yield name_of(address), address
    for tunnel in config.tunnels:
        for route in tunnel.routes:
            for address in each_address(route.bind_addr):
                yield name_of(address, route), address


def _address_for_nodes(config: RelayConfig, index: int) -> Address | None:
    """Where a worker listens for other nodes; None without a fleet."""
    return None if config.fleet is None else config.fleet.of_worker(index).listen


def _another(first: socket.socket) -> socket.socket:
    """Another socket that listens where `first` does."""
    opened = socket.socket(first.family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if first.family == socket.AF_INET6:
            only = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        opened.bind(first.getsockname())
        opened.listen(BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


def _close(sockets: Iterable[Iterable[Iterable[socket.socket]]]) -> None:
    for of_all in sockets:
        for of_one in of_all:
            for each in of_one:
                each.close()
