"""How Redis is reached: its URL, and the files with its password and its authorities."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final
from urllib.parse import unquote

import attrs

from ..._model.addresses import Address, is_loopback
from ..._model.errors import InvalidSettingsError, StorageError
from ..._storage import files
from ..._storage.validation import Rule, a_path, a_text, hold_back, settle

if TYPE_CHECKING:
    from .redis_store import RedisServer

__all__ = ["RedisAccess", "RedisAddress", "a_redis_address", "ca_without_tls", "password_without_file"]

_PASSWORD_LIMIT: Final = 4096
_CA_LIMIT: Final = 1024 * 1024
_PORT: Final = 6379
_ALLOWED: Final = "allowed is rediss://USER@HOST:PORT/DB, redis://… without TLS, or unix:///PATH"
_URL: Final = re.compile(r"(rediss?)://(?:([^@/?#\s]*)@)?([^@/?#\s]+?)(?:/([0-9]{0,5}))?")
_UNIX: Final = re.compile(r"unix://(?:([^@/?#\s]*)@)?(/[^?#\s]+)")


@final
@attrs.frozen(kw_only=True)
class RedisAddress:
    """Where a Redis is.

    Attributes:
        place: a TCP address, or the path of a Unix socket.
        tls: whether the connection uses TLS.
        user: as whom; None for the default user.
        database: its number.
    """

    place: Address | Path
    tls: bool
    user: str | None = None
    database: int = 0

    @property
    def in_clear(self) -> bool:
        """Whether the password and all names pass a network in clear."""
        return isinstance(self.place, Address) and not self.tls and not is_loopback(self.place.host)

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        if isinstance(self.place, Path):
            return f"unix://{user}{self.place}"
        return f"{'rediss' if self.tls else 'redis'}://{user}{self.place}/{self.database}"


def a_redis_address(value: str | RedisAddress) -> RedisAddress:
    """A converter: the URL of a Redis. An error does not quote it: it may hold a password.

    Raises:
        TypeError, ValueError: it is something else, or holds a password.
    """
    if isinstance(value, RedisAddress):
        return value
    text = a_text(value, _ALLOWED)
    found, socket = _URL.fullmatch(text), _UNIX.fullmatch(text)
    match = found or socket
    if match is None:
        raise ValueError(f"{_ALLOWED}; it has no query")
    user = match[1 if found is None else 2]
    if user is not None and ":" in user:
        raise ValueError("holds a password; write it to a file, and name the file with redis_password_file")
    name = unquote(user) if user else None
    if found is None:
        return RedisAddress(place=Path(match[2]), tls=False, user=name)
    host = found[3]
    with_port = host if re.search(r":[0-9]+\Z", host) and not host.endswith("]") else f"{host}:{_PORT}"
    try:
        place = Address.parse(with_port)
    except ValueError:
        raise ValueError(_ALLOWED) from None
    return RedisAddress(place=place, tls=found[1] == "rediss", user=name, database=int(found[4] or 0))


def password_without_file(file: Path | None, redis: RedisAddress) -> str | None:
    """Why a URL with a user needs a password."""
    return None if file is not None or redis.user is None else "is missing; redis names a user"


def ca_without_tls(file: Path | None, redis: RedisAddress) -> str | None:
    """Why the authorities do not go with a URL without TLS."""
    return None if file is None or redis.tls else "is for a redis with TLS, rediss://"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class RedisAccess:
    """How a Redis is reached.

    Attributes:
        redis, redis_password_file, redis_ca_file: as in `FleetConfig`. Paths are complete.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    redis: RedisAddress = attrs.field(converter=a_redis_address)
    redis_password_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    redis_ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("redis_password_file", "redis"), password_without_file),
        Rule(("redis_ca_file", "redis"), ca_without_tls),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    def below(self, folder: Path) -> RedisAccess:
        """The same, with paths from `folder`."""
        changes: dict[str, Any] = {
            name: folder / path
            for name in ("redis_password_file", "redis_ca_file")
            if (path := getattr(self, name)) is not None
        }
        return attrs.evolve(self, **changes)

    def server(self) -> RedisServer:
        """What connects to it. Reads the files. Blocks.

        Raises:
            StorageError: a file cannot be read, or others may access the one with the password.
            InvalidSettingsError: a file holds something else than it should, or the extra `fleet` is missing.
        """
        try:
            from .redis_store import RedisServer  # noqa: PLC0415  # an extra
        except ModuleNotFoundError as error:
            raise InvalidSettingsError(
                "relay.fleet needs the package coredis: pip install 'pioneer-tunnel[fleet]'"
            ) from error
        place, tls = self.redis.place, self._tls()
        if self.redis_password_file is not None:
            self._password()  # so that what is wrong with it is known now
        where: dict[str, Any] = {"path": str(place)} if isinstance(place, Path) else attrs.asdict(place)
        return RedisServer(
            **where,
            database=self.redis.database,
            username=self.redis.user,
            password=None if self.redis_password_file is None else self._password,
            tls=tls,
        )

    def _password(self) -> str:
        """Read the password: the first line of its file. It may have changed since the last connection."""
        path = self.redis_password_file
        content = None if path is None else files.read(path, limit=_PASSWORD_LIMIT, private=True)
        if content is None:
            raise StorageError(f"the password file {str(path)!r} cannot be read: there is none")
        try:
            password = str(content, "utf-8").partition("\n")[0].strip()
        except UnicodeDecodeError:
            password = ""
        if not password:
            raise InvalidSettingsError(f"the password file {str(path)!r} has no text on its first line")
        return password

    def _tls(self) -> ssl.SSLContext | None:
        """What its certificate is checked with; None without TLS."""
        if not self.redis.tls:
            return None
        path = self.redis_ca_file
        if path is None:
            return ssl.create_default_context()
        content = files.read(path, limit=_CA_LIMIT)
        if content is None:
            raise StorageError(f"the file of authorities {str(path)!r} cannot be read: there is none")
        try:
            return ssl.create_default_context(cadata=str(content, "ascii"))
        except (ssl.SSLError, ValueError):
            raise InvalidSettingsError(f"the file of authorities {str(path)!r} holds no PEM certificate") from None
