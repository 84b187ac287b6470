"""`[relay.fleet]`: this node, the other nodes, and the Redis that they share, as one frozen `FleetConfig`.

    [relay.fleet]
    node = "fra1"
    redis = "rediss://fleet@redis.example.com:6379/0"
    redis_password_file = "redis.password"
    listen = "10.0.0.1:7300"                   # for other nodes
    key_file = "fra1.key"                      # 'pioneer-tunnel relay fleet key --node fra1' makes it
    operator_key = "ed25519:…"                 # tunnels that its owner has signed are served, too

    [[relay.fleet.nodes]]                      # every other node; this one may stand here, too
    name = "fra2"
    address = "10.0.0.2:7300"
    certificate = "fra2.pem"
    workers = 4                                # at most; with 'relay --workers' it is reached at so many ports

A key of a node stands in the files of the other nodes, never in Redis: so a write to Redis adds no node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, final

import attrs

from ..._model.addresses import Address
from ..._model.errors import Problem, TunnelError
from ..._model.keys import PublicKey
from ..._model.text import shown
from ..._storage.validation import (
    RefusedItemsError,
    Rule,
    a_path,
    a_public_key,
    a_text,
    examine_each,
    hold_back,
    settle,
    structure,
    whole_number,
)
from .node_names import address_of_worker, worker_name
from .redis_address import RedisAccess, RedisAddress, a_redis_address, ca_without_tls, password_without_file

__all__ = ["FleetConfig", "FleetMember", "a_fleet", "a_node_name"]

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_DAY: Final = 86_400_000

_MOST_WORKERS: Final = 256
"""Workers of one node."""

_MOST_PORT: Final = 65_535


def a_node_name(_instance: Any, _field: Any, value: Any) -> None:
    """A validator: the name of a node."""
    allowed = "allowed are 1 to 63 lower-case letters, digits, '-' and '.', with a letter or digit at both ends"
    if not _NAME.fullmatch(a_text(value, allowed)):
        raise ValueError(allowed)


def _address(value: str | Address) -> Address:
    if isinstance(value, Address):
        return value
    return Address.parse(a_text(value, "allowed is host:port, as a string"))


def _ports_end(workers: int, address: Address) -> str | None:
    if address.port + workers - 1 <= _MOST_PORT:
        return None
    return f"so many ports from {address.port} on end above {_MOST_PORT}"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class FleetMember:
    """A node of the fleet, an entry of `[[relay.fleet.nodes]]`.

    Attributes:
        name: its name.
        address: where other nodes reach it. With `relay --workers` it is the address of the first worker, and each next
            one has the next port.
        certificate: the file of its certificate, PEM. Exactly this certificate is trusted for it.
        workers: how many workers it has at most (default 1; 1 to 256). Its worker with a higher number is not reached.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    name: str = attrs.field(validator=a_node_name)
    address: Address = attrs.field(converter=_address)
    certificate: Path = attrs.field(converter=a_path)
    workers: int = attrs.field(default=1, validator=whole_number(1, _MOST_WORKERS))

    _RULES: ClassVar[tuple[Rule, ...]] = (Rule(("workers", "address"), _ports_end),)

    def __attrs_post_init__(self) -> None:
        settle(self)

    @property
    def addresses(self) -> dict[str, Address]:
        """Where it is reached: by its name, as a single process, and by the name of each worker."""
        workers = {
            worker_name(self.name, index): address_of_worker(self.address, index) for index in range(self.workers)
        }
        return {self.name: self.address} | workers


def _nodes(value: Sequence[FleetMember | Mapping[str, Any]]) -> tuple[FleetMember, ...]:
    entries, problems = examine_each(FleetMember, value)
    for index, entry in enumerate(entries):
        for name in ("name", "address"):
            before = [other.get(name) for other in entries[:index]]
            if name in entry and entry[name] in before:
                key, message = f"[{index}].{name}", f"stands in nodes[{before.index(entry[name])}] too"
                problems.append(Problem(key=key, value=shown(key, str(entry[name])), message=message))
    if problems:
        raise RefusedItemsError(problems)
    members = tuple(FleetMember(**entry) for entry in entries)
    taken: dict[Address, int] = {}
    for index, member in enumerate(members):
        places = {taken.setdefault(address, index) for address in member.addresses.values()} - {index}
        if places:
            key, message = f"[{index}].address", f"a worker of it would have an address of nodes[{min(places)}]"
            problems.append(Problem(key=key, value=shown(key, str(member.address)), message=message))
    if problems:
        raise RefusedItemsError(problems)
    return members


def _another_address(nodes: Sequence[FleetMember], node: str, listen: Address) -> str | None:
    for index, other in enumerate(nodes):
        if other.name != node and listen in other.addresses.values():
            return f"[{index}].address is the address at which this node listens; give each node its own"
    return None


def _ports_of_workers_end(listen: Address, nodes: Sequence[FleetMember], node: str) -> str | None:
    return _ports_end(_most_workers(nodes, node), listen)


def _most_workers(nodes: Sequence[FleetMember], node: str) -> int:
    return next((each.workers for each in nodes if each.name == node), 1)


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class FleetConfig:
    """This node, the other nodes, and the Redis that they share.

    Made as a part of `pioneer_tunnel.relay.RelayConfig`, or with keywords. It needs the extra `fleet`.

    Attributes:
        node: the name of this node: 1 to 63 lower-case letters, digits, `-` and `.`. Each node has its own.
        redis: the Redis or Valkey: `rediss://USER@HOST:PORT/DB` with TLS, `redis://` without, or `unix:///PATH`. User,
            port and number may be left out. It holds no password.
        redis_password_file: the file of its password. The group and others must have no access to it.
        redis_ca_file: PEM certificates that its certificate is checked against, in place of the public ones.
        listen: where this node listens for other nodes. With `relay --workers` its first worker listens there, and each
            next one at the next port.
        key_file: the private key of this node and its certificate, PEM. The group and others must have no access.
        operator_key: the public half of the operator's key. Tunnels that it has signed and that Redis keeps are served
            as those of the file are. None (default) for the tunnels of the file alone.
        state_file: where the node keeps what it has seen of these, so that no one can bring back what was revoked. It
            is made, for its owner alone; the folder that it is in has to exist.
        unconfirmed_ms: how long a signed tunnel is served while Redis cannot be asked whether it was revoked (default
            86 400 000, which is a day; 60 000 to 31 536 000 000).
        nodes: the other nodes. This one may be among them, so that all nodes can have the same list.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    node: str = attrs.field(validator=a_node_name)
    redis: RedisAddress = attrs.field(converter=a_redis_address)
    redis_password_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    redis_ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    listen: Address = attrs.field(converter=_address)
    key_file: Path = attrs.field(converter=a_path)
    operator_key: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))
    state_file: Path = attrs.field(default=Path("fleet-state.db"), converter=a_path)
    unconfirmed_ms: int = attrs.field(default=_DAY, validator=whole_number(60_000, 365 * _DAY))
    nodes: tuple[FleetMember, ...] = attrs.field(default=(), converter=_nodes)

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("redis_password_file", "redis"), password_without_file),
        Rule(("redis_ca_file", "redis"), ca_without_tls),
        Rule(("nodes", "node", "listen"), _another_address),
        Rule(("listen", "nodes", "node"), _ports_of_workers_end),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    def below(self, folder: Path) -> FleetConfig:
        """The same, with paths from `folder`."""
        return attrs.evolve(
            self,
            redis_password_file=None if self.redis_password_file is None else folder / self.redis_password_file,
            redis_ca_file=None if self.redis_ca_file is None else folder / self.redis_ca_file,
            key_file=folder / self.key_file,
            state_file=folder / self.state_file,
            nodes=tuple(attrs.evolve(node, certificate=folder / node.certificate) for node in self.nodes),
        )

    def of_worker(self, index: int) -> FleetConfig:
        """That of one worker of this node, from 0.

        Raises:
            ValueError: there is no such port.
        """
        return attrs.evolve(self, listen=address_of_worker(self.listen, index))

    @property
    def all_listen(self) -> tuple[Address, ...]:
        """Where its workers listen, if there are as many as its entry in `nodes` says."""
        return tuple(address_of_worker(self.listen, index) for index in range(_most_workers(self.nodes, self.node)))

    @property
    def others(self) -> tuple[FleetMember, ...]:
        """The nodes without this one."""
        return tuple(node for node in self.nodes if node.name != self.node)

    @property
    def redis_access(self) -> RedisAccess:
        """How Redis is reached."""
        return RedisAccess(
            redis=self.redis, redis_password_file=self.redis_password_file, redis_ca_file=self.redis_ca_file
        )


def a_fleet(value: FleetConfig | Mapping[str, Any] | None) -> FleetConfig | None:
    """A converter for the table. Its problems are reported under their own keys."""
    if isinstance(value, FleetConfig | None):
        return value
    try:
        return structure(FleetConfig, value)
    except TunnelError as error:
        raise RefusedItemsError(error.problems) from None
