"""The records of a fleet in Redis or Valkey, from version 6.2 on. Needs the extra `fleet`.

Redis has names, ids of public keys, times and counters, and no secret. All keys begin with a prefix:

    t:TUNNEL        the record of a tunnel (`redis_records`): 240 bytes with one holding, and the lengths of the names
    lease:PROCESS   the name of the node; expires with the lease: 100 bytes for each process. For some seconds it is `-`
                    if the process was killed, and another one of its machine knows it
    counter         the last fence and version
    to:PROCESS      a channel: changes of records that a process is in; one subscription for each process

What it costs, in calls of a script:

    a session comes     1 write if its tunnel was free or its record is known here, else 2; 1 read more if rules have
                        to ask the holder (`takeover = "first"`, several keys)
    it goes             1 write, or a read and a write
    a process           1 renewal each third of a lease (5 s)
    a visitor           1 read for each tunnel, node and minute (`ROUTE_LIFETIME`), and 1 for a route that was out of
                        date; while the gateway is not connected, 4 reads a second for each tunnel and node at the most
    each session        1 read in 6 hours (`COMPARE_ALL`), which also keeps the record from expiring, after a day

A fence is above all that were given before, and not below the time in milliseconds. So after a failover that lost
writes, new fences are higher than lost ones. Each process also tells the highest one that it has seen, with each
renewal.

Losing Redis loses nothing: each node announces its sessions again. A client that can write to Redis can make tunnels
unreachable, and end sessions. It cannot add a node, and visitors reach no other process than those nodes: their names
and certificates stand in the configuration.

A user of its own needs no more than this, for the default prefix:

    ACL SETUSER relay on >PASSWORD ~pioneer:* &pioneer:to:* -@all +hello +auth +ping +script|load +evalsha
        +get +set +del +exists +pttl +pexpire +time +publish +subscribe +unsubscribe +punsubscribe

The scripts use several keys. In a Redis Cluster they need a prefix with a hash tag, such as `{pioneer}:`, and then one
of its servers has all keys.
"""

from __future__ import annotations

import logging
import random
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Final, NoReturn, final

import anyio
import attrs
import trio
from coredis import Redis
from coredis.commands.script import Script
from coredis.credentials import AbstractCredentialProvider, UserPass
from coredis.exceptions import RedisError
from coredis.patterns.pubsub import PubSub
from coredis.retry import NoRetryPolicy

from ..._model.exception_groups import leaves
from ..._model.log_fields import about
from ..._model.text import clean_message
from ..._net.log_limiter import LogLimiter
from ..gateways.expected import PATIENCE
from .contact import ContactStore
from .records import Holding, Record
from .redis_records import BREAK, READ, RENEW, WRITE, BrokenRecord, decode, encode_holding
from .routes import KnownRoutes
from .store import LEASE, Changed, StoreUnreachable

__all__ = ["DEFAULT_PREFIX", "RedisServer", "RedisStore"]

DEFAULT_PREFIX: Final = "pioneer:"

TIMEOUT: Final = 2.0
"""Seconds for a connection, and for an answer."""

KEPT_FOR: Final = 24 * 3600.0
"""Seconds after which a record expires that was neither read nor written. Its holder reads it four times in it."""

MOST_MESSAGE: Final = 256
"""Characters of the longest tunnel id."""

FAILURES: Final = (RedisError, OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)
"""What coredis raises when Redis does not do what it should."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.fleet")
_log_limiter: Final = LogLimiter(_log)

_ours: Final[ContextVar[bool]] = ContextVar("_ours", default=False)
"""Whether a connection is one of ours. We write the log lines about it, without tracebacks."""

logging.getLogger("coredis").addFilter(lambda _record: not _ours.get())


@final
@attrs.frozen(kw_only=True)
class RedisServer:
    """Where Redis is.

    Attributes:
        host, port: its address.
        path: of its Unix socket, instead of them.
        database: its number.
        username: the user of its access list.
        password: returns the password. It is called for each connection, so that it may change; None for none.
        tls: for TLS, and with it the authorities that are trusted; None for a connection in clear.
    """

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    database: int = 0
    username: str | None = None
    password: Callable[[], str] | None = attrs.field(default=None, repr=False)
    tls: ssl.SSLContext | None = attrs.field(default=None, repr=False)

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def connect(self) -> Redis[bytes]:
        """A new client. It connects when it is used. Its failures are for the caller to log."""
        _ours.set(True)
        return Redis(
            self.host,
            self.port,
            self.database,
            unix_socket_path=self.path,
            credential_provider=None if self.password is None else _Credentials(self.username, self.password),
            ssl_context=self.tls,
            stream_timeout=TIMEOUT,
            connect_timeout=TIMEOUT,
            pool_timeout=TIMEOUT,
            max_connections=2,  # one for messages, and one that all requests share
            verify_version=False,
            retry_policy=NoRetryPolicy(),
        )


@final
class _Credentials(AbstractCredentialProvider):
    def __init__(self, username: str | None, password: Callable[[], str]) -> None:
        self._username: Final = username
        self._password: Final = password

    async def get_credentials(self) -> UserPass:
        return UserPass(self._username or "default", self._password())


@final
class RedisStore(ContactStore):
    """What one process sees of Redis.

    Args:
        server: where it is.
        node: the name of this node.
        process: the id of this process; by default a new one.
        prefix: of all keys.
        lease: seconds that the lease of this process lives after it was renewed.
        is_node: whether a name is that of a node. Holdings of others do not count.
        routes: what it knows; by default a new cache.
        retry: seconds between two attempts to reach Redis, at the most; half of it at the least, so that nodes spread.
        rng: for that.
    """

    def __init__(
        self,
        server: RedisServer,
        node: str,
        *,
        process: str | None = None,
        prefix: str = DEFAULT_PREFIX,
        lease: float = LEASE,
        is_node: Callable[[str], bool] = lambda _name: True,
        routes: KnownRoutes | None = None,
        retry: float = 1.0,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(node, process=process, lease=lease, routes=routes)
        self._server: Final = server
        self._prefix: Final = prefix
        self._is_node: Final = is_node
        self._retry: Final = retry
        self._rng: Final = rng or random.Random()  # noqa: S311  # nothing secret depends on it
        self._client: Redis[bytes] | None = None
        self._failed = trio.Event()
        self._failure: BaseException | None = None
        self._read: Final = Script[bytes](script=READ)
        self._write: Final = Script[bytes](script=WRITE)
        self._renew: Final = Script[bytes](script=RENEW)
        self._break: Final = Script[bytes](script=BREAK)

    async def read(self, tunnel_id: str) -> Record:
        arguments = [self._prefix, *self._common]
        found = await self._call(self._read, [self._key_of(tunnel_id)], arguments)
        return self._take_in(tunnel_id, found)

    async def write(self, tunnel_id: str, *, expected: int, holdings: Sequence[Holding]) -> Record:
        seen = max((self._seen, *(holding.fence for holding in holdings)))
        arguments = [self._prefix, *self._common, self.process, tunnel_id, str(expected), str(seen), *self._lease]
        arguments.append(str(int(PATIENCE * 1000)) if self.leaving else "0")
        lines = [encode_holding(holding) for holding in holdings]
        keys = [self._key_of(tunnel_id), self._counter_key, self._lease_key]
        answer = await self._call(self._write, keys, [*arguments, *lines])
        written, found, lived = answer if isinstance(answer, list) and len(answer) == 3 else (0, b"", 1)
        if lived == 0 and self.reachable:
            self._renewed(lived=False)
        record = self._take_in(tunnel_id, found)
        if written != 1:
            raise Changed(record)
        return record

    async def break_lease(self, process: str) -> None:
        """Void the holdings of a process that was killed. For some seconds, their records say that they have left.

        Raises:
            StoreUnreachable: Redis does not answer. The lease expires by itself.
        """
        await self._call(self._break, [f"{self._prefix}lease:{process}"], [str(int(PATIENCE * 1000))])

    @property
    def _common(self) -> tuple[str, str]:
        return str(int(self._trusting)), str(int(KEPT_FOR * 1000))

    def _key_of(self, tunnel_id: str) -> str:
        return f"{self._prefix}t:{tunnel_id}"

    @property
    def _counter_key(self) -> str:
        return f"{self._prefix}counter"

    @property
    def _lease(self) -> tuple[str, str]:
        return self.node, str(int(self.lease * 1000))

    @property
    def _lease_key(self) -> str:
        return f"{self._prefix}lease:{self.process}"

    def _take_in(self, tunnel_id: str, data: object) -> Record:
        """Read what Redis has sent, and take note of it."""
        try:
            record = decode(data if isinstance(data, bytes) else b"")
        except BrokenRecord as broken:
            line = f"tunnel {clean_message(tunnel_id)}: its record in Redis is broken, and counts as absent: {broken}"
            _log_limiter.log("broken record", line, about=about("record_broken", tunnel=tunnel_id, reason=broken))
            self._routes.put(tunnel_id, Record(0))
            return Record(broken.version)
        known = tuple(holding for holding in record.holdings if self._is_node(holding.node))
        if len(known) < len(record.holdings):
            name = clean_message(tunnel_id)
            line = f"tunnel {name}: its record in Redis names a node or a worker that is not configured; ignored"
            fields = about("record_broken", tunnel=tunnel_id, reason="unknown node")
            _log_limiter.log("unknown node", line, about=fields)
            record = attrs.evolve(record, holdings=known)
        return self._note(tunnel_id, record)

    async def _call(self, script: Script[bytes], keys: Sequence[str], arguments: Sequence[str]) -> object:
        """Run a script.

        Raises:
            StoreUnreachable: Redis does not answer, or refuses it.
        """
        client = self._client
        if client is None:
            raise StoreUnreachable
        self.operations += 1
        try:
            answer: object = await script(keys, arguments, client=client)
        except FAILURES as error:
            if client is self._client:
                self._lost()
                self._failure = error
                self._failed.set()
            raise StoreUnreachable from error
        return answer

    def _lost(self) -> None:
        self.reachable = False
        self._client = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        stopping, tried = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            # Not with `start`: when that is cancelled, it waits for the task, which waits for `stopping`.
            nursery.start_soon(self._keep_in_contact, stopping, tried.set)
            try:
                await tried.wait()  # no deadline: the attempt has one
                task_status.started()
                # No deadline: it runs for as long as the node does.
                await trio.sleep_forever()
            finally:
                stopping.set()
        raise AssertionError

    async def _keep_in_contact(self, stopping: trio.Event, tried: Callable[[], object]) -> None:
        """Reach Redis again and again, until `stopping` is set. Then end the lease, for which the connection is needed.

        Each attempt calls `tried` when it has succeeded, or failed.
        """

        async def end_lease() -> None:
            await stopping.wait()
            if self._client is not None:  # else Redis would not answer either
                with trio.move_on_after(TIMEOUT / 4), suppress(*FAILURES):
                    await self._client.delete([self._lease_key])
            contact.cancel()

        with trio.CancelScope(shield=True) as contact:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_lease)
                while True:
                    try:
                        await self._contact(tried)
                    except* (*FAILURES, StoreUnreachable) as group:
                        why = next(filter(None, map(_first_cause, leaves(group))), "the connection is lost")
                        line = f"redis at {self._server} cannot be used, and sessions are not announced: {why}"
                        if not stopping.is_set():
                            _log_limiter.log("unreachable", line, about=about("store_unreachable", reason=why))
                    tried()
                    # No deadline: a node tries for as long as it runs.
                    await trio.sleep(self._rng.uniform(self._retry / 2, self._retry))

    async def _contact(self, tried: Callable[[], object]) -> NoReturn:
        """Connect, and keep the lease alive until something fails."""
        self._failed = trio.Event()
        async with self._server.connect() as client:
            messages = client.pubsub(
                channels=[f"{self._prefix}to:{self.process}"],
                ignore_subscribe_messages=True,
                retry_policy=NoRetryPolicy(),
                subscription_timeout=TIMEOUT,
                max_idle_seconds=self.lease / 3,
            )
            async with messages, trio.open_nursery() as nursery:
                try:
                    for script in (self._read, self._write, self._renew, self._break):
                        await client.script_load(script.script)
                    self._client = client
                    await self._renew_lease()
                    _log.info("redis at %s is in use", self._server, extra=about("store_reachable"))
                    tried()
                    nursery.start_soon(self._receive, messages)
                    nursery.start_soon(self._end_contact_when_it_fails)
                    while True:
                        # No deadline: a lease is renewed for as long as the process runs.
                        await trio.sleep(self.lease / 3)
                        await self._renew_lease()
                finally:
                    self._lost()  # before the client closes: it raises all kinds of errors then
        raise AssertionError

    async def _renew_lease(self) -> None:
        lived = await self._call(self._renew, [self._lease_key, self._counter_key], [*self._lease, str(self._seen)])
        self._renewed(lived=lived == 1)

    async def _end_contact_when_it_fails(self) -> NoReturn:
        # No deadline: it is for as long as the contact lasts.
        await self._failed.wait()
        raise StoreUnreachable from self._failure

    async def _receive(self, messages: PubSub[bytes]) -> None:
        async for message in messages:
            data = message["data"]
            if isinstance(data, bytes):
                tunnel_id, _, record = data.partition(b"\n")
                self._changed(tunnel_id, record)

    def _changed(self, tunnel_id: bytes, record: bytes) -> None:
        try:
            name = tunnel_id[: MOST_MESSAGE * 4].decode()
        except UnicodeDecodeError:
            return
        # A message may be anybody's, and invented tunnels would fill the memory.
        if name in self._routes:
            self._take_in(name, record)
        self.on_change(name)


def _first_cause(error: BaseException) -> str:
    """Why it failed, in the words of the code that noticed it first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return clean_message(str(error))
