"""What the operator of a fleet has in a file: `[relay.fleet]`, of which the Redis is enough.

The file of a node will do. On a laptop, a file of four lines does as well:

    [relay.fleet]
    redis = "rediss://operator@redis.example.com:6379/0"
    redis_password_file = "redis.password"
    operator_key = "ed25519:…"
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, final

import attrs

from ..._model.errors import Problem, StorageError
from ..._model.keys import PublicKey, SigningIdentity
from ..._storage import files
from ..._storage.toml_read import read_toml, subtable
from ..._storage.validation import Rule, a_path, a_public_key, hold_back, refusal, settle, structure
from ..fleet.config import FleetConfig
from ..fleet.keys import new_node_key
from ..fleet.redis_address import RedisAccess, RedisAddress, a_redis_address, ca_without_tls, password_without_file

__all__ = ["OPERATOR_FILE", "FleetFile", "tables_in", "write_node_key", "write_operator_key"]

OPERATOR_FILE: Final = "operator.key"
"""The usual name of the file with the operator's key."""

_TABLE: Final = "relay.fleet"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class FleetFile:
    """The keys of `[relay.fleet]` that an operator's commands need.

    Attributes:
        redis, redis_password_file, redis_ca_file, operator_key: see `FleetConfig`. Paths are complete.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    redis: RedisAddress = attrs.field(converter=a_redis_address)
    redis_password_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    redis_ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    operator_key: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("redis_password_file", "redis"), password_without_file),
        Rule(("redis_ca_file", "redis"), ca_without_tls),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    @classmethod
    def load(cls, path: Path) -> FleetFile:
        """Read them from a file. Blocks.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: it is not TOML, has no such table, or the table is wrong.
        """
        table = subtable(read_toml(path), _TABLE, source=str(path))
        if table is None:
            raise refusal([Problem(source=str(path), key=_TABLE, message="the table is missing")])
        ours = {field.name for field in attrs.fields(cls)}
        for_nodes = {field.name for field in attrs.fields(FleetConfig)} - ours
        needed = {name: value for name, value in table.items() if name not in for_nodes}
        return structure(cls, needed, where=_TABLE, source=str(path))

    def access(self, folder: Path) -> RedisAccess:
        """How Redis is reached, with paths from `folder`."""
        return RedisAccess(
            redis=self.redis, redis_password_file=self.redis_password_file, redis_ca_file=self.redis_ca_file
        ).below(folder)


def tables_in(path: Path) -> Sequence[Mapping[str, Any]]:
    """The tables `[[relay.tunnels]]` of a file, as they are. Blocks.

    Raises:
        StorageError: it cannot be read.
        InvalidSettingsError: it is not TOML, or has no such array.
    """
    relay = subtable(read_toml(path), "relay", source=str(path)) or {}
    tables = relay.get("tunnels")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise refusal([Problem(source=str(path), key="relay.tunnels", message="is missing; allowed are tables")])
    return tables


def write_node_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a key for the node `name`: the file with it, and the one with its certificate. Blocks.

    Raises:
        StorageError: one of them exists, or cannot be written.
    """
    key_file, certificate_file = folder / f"{name}.key", folder / f"{name}.pem"
    secret, certificate = new_node_key(name)
    _write_new(certificate_file, memoryview(certificate))
    try:
        _write_new(key_file, secret)
    except BaseException:
        files.remove(certificate_file)
        raise
    return key_file, certificate_file


def write_operator_key(folder: Path) -> tuple[Path, PublicKey]:
    """Make an operator's key: the file with it, and its public half. Blocks.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    seed = secrets.token_bytes(32)
    public = SigningIdentity.from_seed(seed).public_key
    path = folder / OPERATOR_FILE
    _write_new(path, memoryview(f"{seed.hex()}\n{public}\n".encode()))
    return path, public


def _write_new(path: Path, content: memoryview) -> None:
    if not files.replace(path, content, private=True, only_if=lambda: not files.exists(path)):
        raise StorageError(f"{path} exists already, and is not replaced")
