"""The names of nodes: `fra1`, as the configuration says, for a machine with one process; `fra1/0` for its first worker.

A worker is a node like others: it has sessions, links, a lease. The key and the certificate are those of the machine.
"""

from __future__ import annotations

import attrs

from ..._model.addresses import Address

__all__ = ["address_of_worker", "machine_of", "worker_name"]


def worker_name(machine: str, index: int) -> str:
    """The name of a worker, from 0."""
    return f"{machine}/{index}"


def machine_of(node: str) -> str:
    """The name of the machine that a node runs on."""
    machine, _, _ = node.rpartition("/")
    return machine or node


def address_of_worker(first: Address, index: int) -> Address:
    """Where a worker listens for other nodes: each one has the port after that of the one before it.

    Raises:
        ValueError: there is no such port.
    """
    return attrs.evolve(first, port=first.port + index)
