"""The registry of a node, with a real Redis that is killed, stopped, emptied and written by others."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, final

import pytest
import trio
from redis_server import RealRedis, real_redis
from rig import HANG, eventually

from pioneer_tunnel._model.keys import PublicKey, SigningIdentity, new_relay_key
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.fleet.claims import sign_claim
from pioneer_tunnel.relay.fleet.config import FleetConfig
from pioneer_tunnel.relay.fleet.published import Published, connected
from pioneer_tunnel.relay.fleet.publishing import publish, published_tunnels, revoke
from pioneer_tunnel.relay.fleet.registry import FleetRegistry
from pioneer_tunnel.relay.fleet.signed import SignedEntry, sign
from pioneer_tunnel.relay.gateways.registry import RegistryAway

OPERATOR: Final = SigningIdentity.from_seed(b"o" * 32)
NODES: Final = {name: SigningIdentity.from_seed(name.encode() * 8) for name in ("fra1", "fra2")}
KEYS: Final[dict[str, PublicKey]] = {name: identity.public_key for name, identity in NODES.items()}
DAY: Final = 86_400


def new_key() -> PublicKey:
    return new_relay_key().identity().public_key


def table(name: str = "office", key: PublicKey | None = None, **more: object) -> dict[str, Any]:
    return {"id": name, "key": str(key or new_key()), "url": f"https://{name}.example.com", **more}


@pytest.fixture
def redis() -> Iterator[RealRedis]:
    with real_redis() as server:
        yield server


@final
class World:
    """Nodes that share a Redis, and the operator, with a wall clock that tests set."""

    def __init__(self, redis: RealRedis, folder: Path) -> None:
        self.redis: Final = redis
        self.now = time.time()
        self._folder: Final = folder

    def config(self, name: str, **more: object) -> FleetConfig:
        values: dict[str, Any] = {
            "node": name,
            "redis": self.redis.url,
            "listen": "127.0.0.1:7300",
            "key_file": self._folder / "unused",
            "operator_key": str(OPERATOR.public_key),
            "state_file": self._folder / f"{name}.db",
        }
        return FleetConfig(**values | more)

    @asynccontextmanager
    async def node(
        self, name: str = "fra1", tunnels: tuple[TunnelEntry, ...] = (), **more: object
    ) -> AsyncIterator[FleetRegistry]:
        registry = FleetRegistry(
            tunnels,
            self.config(name, **more),
            identity=NODES[name],
            nodes=KEYS,
            reserved=("www",),
            wall_clock=lambda: self.now,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(registry.run)
            yield registry
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Published]:
        async with connected(self.config("fra1").redis_access) as published:
            yield published

    async def publish(self, tunnel: dict[str, Any], *, days: float = 90) -> SignedEntry:
        async with self.operator() as published:
            return await publish(published, OPERATOR, tunnel, now=self.now, valid=days * DAY)

    async def revoke(self, name: str) -> SignedEntry:
        async with self.operator() as published:
            return await revoke(published, OPERATOR, name, now=self.now)


@pytest.fixture
def world(redis: RealRedis, tmp_path: Path) -> World:
    return World(redis, tmp_path)


async def finds(registry: FleetRegistry, key: PublicKey) -> str | None:
    entry = await registry.by_key_id(key.key_id)
    return None if entry is None else entry.id


async def test_a_published_tunnel_is_found_by_key_and_host(world: World) -> None:
    key = new_key()
    async with world.node() as node:
        await until_finds(node, key, None)  # and that is remembered, until it is published
        await world.publish(table(key=key))
        await until_finds(node, key, "office")
        route = await node.by_host("office.example.com")
        assert route is not None
        assert route.entry.id == "office"
        assert node.by_host_nowait("office.example.com") is route
        assert node.by_host_nowait("other.example.com") is None  # to find that out takes time
        assert await node.by_host("other.example.com") is None


async def until_finds(registry: FleetRegistry, key: PublicKey, name: str | None) -> None:
    """Wait for that, also while the registry connects."""
    with trio.fail_after(HANG):
        while True:
            with suppress(RegistryAway):
                if await finds(registry, key) == name:
                    return
            await trio.sleep(0.02)


async def test_a_revoked_tunnel_is_told_at_once_and_never_comes_back(world: World) -> None:
    key = new_key()
    entry = await world.publish(table(key=key))
    changed: list[str] = []
    async with world.node() as node:
        await until_finds(node, key, "office")
        node.on_change = changed.extend
        world.now += 1
        await world.revoke("office")
        await until_finds(node, key, None)
        assert changed == ["office"]
        # Whoever may write to Redis brings back the entry, which is signed and valid.
        world.redis.call("SET", "pioneer:entry:office", entry.text)
        world.redis.call("PUBLISH", "pioneer:registry", entry.text)
        await trio.sleep(0.3)
        assert await finds(node, key) is None
    async with world.node() as again:  # its state file remembers
        assert await finds(again, key) is None


async def test_a_rotated_key_opens_nothing_any_more(world: World) -> None:
    old, new = new_key(), new_key()
    await world.publish(table(key=old))
    async with world.node() as node:
        await until_finds(node, old, "office")
        await world.publish(table(key=new))
        await until_finds(node, new, "office")
        assert await finds(node, old) is None


async def test_an_entry_ends_with_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pioneer_tunnel.relay.fleet.entries.LOOK_INTERVAL", 0.05)
    key = new_key()
    changed: list[str] = []
    await world.publish(table(key=key), days=1)
    async with world.node() as node:
        await until_finds(node, key, "office")
        node.on_change = changed.extend
        world.now += DAY + 1
        assert await finds(node, key) is None
        await eventually(lambda: changed == ["office"])


async def test_what_the_operator_has_not_signed_adds_nothing(world: World) -> None:
    key = new_key()
    entry = sign(
        SigningIdentity.generate(), table("evil", key), serial=int(world.now * 1000), not_after=int(world.now) + DAY
    )
    async with world.node() as node:
        for text in (entry.text, b"", b"\xff" * 1000, b"1 2 3"):
            world.redis.call("SET", "pioneer:entry:evil", text)
            world.redis.call("SET", f"pioneer:key:{key.key_id}", "evil")
            world.redis.call("SET", "pioneer:host:evil.example.com", "evil")
            world.redis.call("PUBLISH", "pioneer:registry", text)
            assert await finds(node, key) is None
            assert await node.by_host("evil.example.com") is None
    async with world.operator() as published:
        assert (await published_tunnels(published, OPERATOR.public_key)).forged == 1


async def test_a_way_that_leads_elsewhere_finds_nothing(world: World) -> None:
    """Redis says that the key of an attacker opens a tunnel, and that a host leads to another tunnel."""
    evil = new_key()
    await world.publish(table())
    async with world.node() as node:
        world.redis.call("SET", f"pioneer:key:{evil.key_id}", "office")
        world.redis.call("SET", "pioneer:host:bank.example.com", "office")
        assert await finds(node, evil) is None
        assert await node.by_host("bank.example.com") is None


async def test_a_way_that_leads_to_another_tunnel_hides_none_that_was_seen(world: World) -> None:
    key = new_key()
    await world.publish(table(key=key))
    await world.publish(table("other"))
    async with world.node() as node:
        await until_finds(node, key, "office")
    for way in (f"key:{key.key_id}", "host:office.example.com"):
        world.redis.call("SET", f"pioneer:{way}", "other")
    async with world.node() as node:
        await until_finds(node, key, "office")
        route = await node.by_host("office.example.com")
        assert route is not None
        assert route.entry.id == "office"


async def test_the_file_of_the_node_comes_first(world: World) -> None:
    ours, theirs, third = new_key(), new_key(), new_key()
    own = TunnelEntry(**table("office", ours))
    await world.publish(table("office", theirs) | {"url": "https://else.example.com"})
    await world.publish({"id": "other", "key": str(third), "url": "https://office.example.com"})
    async with world.node(tunnels=(own,)) as node:
        assert await finds(node, ours) == "office"
        assert await finds(node, theirs) is None, "a published tunnel has replaced one of the file"
        route = await node.by_host("office.example.com")
        assert route is not None
        assert route.entry is own


async def test_known_tunnels_are_served_while_redis_is_down(world: World) -> None:
    known, unknown = new_key(), new_key()
    await world.publish(table(key=known))
    async with world.node() as node:
        await until_finds(node, known, "office")
        world.redis.kill()
        await eventually(lambda: not node.state.reachable)
        assert await finds(node, known) == "office"
        with pytest.raises(RegistryAway):
            await node.by_key_id(unknown.key_id)
        with pytest.raises(RegistryAway):
            await node.by_host("other.example.com")
        async with world.node("fra2", state_file=world.config("fra1").state_file) as restarted:
            assert await finds(restarted, known) == "office", "the state file was not read"
        world.redis.start()
        await until_finds(node, unknown, None)


async def test_nodes_write_back_what_redis_has_lost_and_a_tombstone_wins(world: World) -> None:
    kept, revoked = new_key(), new_key()
    await world.publish(table("kept", kept))
    await world.publish(table("gone", revoked))
    async with world.node("fra1") as one:
        async with world.node("fra2") as other:
            for node in (one, other):
                await until_finds(node, kept, "kept")
                await until_finds(node, revoked, "gone")
        world.now += 1
        await world.revoke("gone")  # `other` does not run, and misses it
        await until_finds(one, revoked, None)
        world.redis.kill()
        world.redis.start()  # nothing is in it
        async with world.node("fra2") as other:
            await eventually(lambda: one.state.reachable)
            await until_finds(other, revoked, None)
            assert await finds(other, kept) == "kept"
            await eventually(lambda: b"revoked" in world.redis.call("GET", "pioneer:entry:gone"))
            assert b"kept" in world.redis.call("GET", "pioneer:entry:kept")


async def test_unconfirmed_tunnels_end_after_the_stated_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pioneer_tunnel.relay.fleet.entries.LOOK_INTERVAL", 0.05)
    monkeypatch.setattr("pioneer_tunnel.relay.fleet.registry.FIRST_WAIT", 0.05)
    monkeypatch.setattr("pioneer_tunnel.relay.fleet.registry.MOST_WAIT", 0.1)
    key = new_key()
    changed: list[str] = []
    await world.publish(table(key=key))
    async with world.node(unconfirmed_ms=3_600_000) as node:
        await until_finds(node, key, "office")
        await eventually(lambda: node.state.unconfirmed == 0)
        world.redis.kill()
        await eventually(lambda: not node.state.reachable)
        node.on_change = changed.extend
        world.now += 3599
        assert await finds(node, key) == "office"
        world.now += 2
        with pytest.raises(RegistryAway) as away:
            await node.by_key_id(key.key_id)
        assert away.value.for_long
        await eventually(lambda: changed == ["office"])
        world.redis.start()
        await until_finds(node, key, "office")


# Names below wildcards


def wildcard(name: str, key: PublicKey) -> TunnelEntry:
    return TunnelEntry(id=name, key=key, url="https://*.box.example.com")


async def test_a_name_belongs_to_the_first_key_at_every_node(world: World) -> None:
    first, second = (wildcard(name, new_key()) for name in ("one", "two"))
    async with world.node("fra1", (first, second)) as one, world.node("fra2", (first, second)) as other:
        assert (await one.created(first, ["blog"]))[1] == {}
        assert await other.created(second, ["blog"]) == ({}, {"blog": "another tunnel has it"})
        assert await other.created(second, ["www"]) == ({}, {"www": "the relay's operator has reserved it"})
        route = await other.by_host("blog.box.example.com")
        assert route is not None
        assert (route.entry, route.service) == (first, "blog")


async def test_a_name_survives_a_redis_that_forgets_it_or_gives_it_away(world: World) -> None:
    first, second = (wildcard(name, new_key()) for name in ("one", "two"))
    key = "pioneer:name:blog.box.example.com"
    async with world.node("fra1", (first, second)) as node:
        assert (await node.created(first, ["blog"]))[1] == {}
        world.redis.call("DEL", key)
        assert (await node.created(second, ["blog"]))[1] == {"blog": "another tunnel has it"}
        forged = sign_claim("fra2", OPERATOR, host="blog.box.example.com", keys=frozenset(second.keys_by_id), since=1)
        world.redis.call("SET", key, forged.text)
        assert (await node.created(second, ["blog"]))[1] == {"blog": "another tunnel has it"}
    async with world.node("fra1", (first, second)):
        await eventually(lambda: first.valid_keys[0].key_id.encode() in world.redis.call("GET", key))


async def test_keys_of_another_type_are_no_outage_of_the_registry(world: World) -> None:
    first = wildcard("one", new_key())
    (key_id,) = first.keys_by_id
    key, names = "pioneer:name:blog.box.example.com", f"pioneer:names:{key_id}"
    async with world.node("fra1", (first,)) as node:
        assert (await node.created(first, ["blog"]))[1] == {}
    for broken in (key, names, "pioneer:entry:office"):
        world.redis.call("DEL", broken)
        world.redis.call("HSET", broken, "a", "b")
    async with world.node("fra1", (first,)) as node:
        await eventually(lambda: key_id.encode() in world.redis.call("GET", key))
        assert (await node.created(first, ["shop"]))[1] == {}
        assert world.redis.call("SCARD", names) == b":2"
        office = new_key()
        await world.publish(table(key=office))
        await until_finds(node, office, "office")
        assert node.state.reachable
    ways = (f"pioneer:key:{office.key_id}", "pioneer:host:office.example.com")
    for broken in (*ways, "pioneer:entry:office"):
        world.redis.call("DEL", broken)
        world.redis.call("HSET", broken, "a", "b")
    async with world.node("fra1", (first,)):
        await eventually(lambda: [world.redis.call("TYPE", way) for way in ways] == [b"+string"] * 2)


async def test_a_value_that_is_too_long_is_not_even_read(world: World) -> None:
    """Else one write would fill the memory of all nodes."""
    entry = wildcard("one", new_key())
    async with world.node("fra1", (entry,)) as node:
        assert (await node.created(entry, ["blog"]))[1] == {}
    for number in range(4):
        world.redis.call("SETRANGE", f"pioneer:entry:{number}", "4000000", "x")
        world.redis.call("SETRANGE", f"pioneer:key:{number}", "4000000", "x")
    world.redis.call("SETRANGE", "pioneer:name:blog.box.example.com", "4000000", "x")
    async with world.node("fra1", (entry,)) as node:
        assert node.state.unconfirmed is not None
        assert await node.by_key_id("0") is None
        await eventually(lambda: world.redis.call("STRLEN", "pioneer:name:blog.box.example.com") != b":4000001")
    assert sent_by(world.redis) < 1_000_000


def sent_by(redis: RealRedis) -> int:
    """Bytes that Redis has sent."""
    (line,) = [line for line in redis.call("INFO", "stats").split() if line.startswith(b"total_net_output_bytes:")]
    return int(line.partition(b":")[2])


async def test_a_tunnel_has_so_many_names_at_most(world: World) -> None:
    entry = wildcard("one", new_key())
    async with world.node("fra1", (entry,)) as node:
        names = [f"name{index}" for index in range(65)]
        assert len((await node.created(entry, names))[0]) == 64
        assert (await node.created(entry, ["name64"]))[1] == {"name64": "this tunnel has claimed 64 names already"}


async def test_no_name_is_created_while_redis_is_down_and_known_ones_work(world: World) -> None:
    entry = wildcard("one", new_key())
    async with world.node("fra1", (entry,)) as node:
        assert (await node.created(entry, ["blog"]))[1] == {}
        world.redis.kill()
        await eventually(lambda: not node.state.reachable)
        routes, refused = await node.created(entry, ["blog", "shop"])
        assert [*routes] == ["blog"]
        assert refused == {"shop": "the relay cannot look it up at the moment"}
        assert await node.by_host("blog.box.example.com") is not None
