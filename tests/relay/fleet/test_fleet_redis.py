"""The records of a fleet in a real Redis: what stands there, and what happens when it fails."""

from __future__ import annotations

import logging
import random
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trustme
from fleet_rig import TUNNEL, Fleet, Node
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from redis_server import PROGRAM, RealRedis, has_tls, real_redis
from rig import HANG, eventually, free_port, no_hang
from scripted_session import ScriptedSession

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet import redis_store
from pioneer_tunnel.relay.fleet.records import LEAVING, Holding, Record
from pioneer_tunnel.relay.fleet.redis_records import (
    MOST_COUNTED,
    MOST_NUMBER,
    MOST_RECORD_BYTES,
    BrokenRecord,
    decode,
    encode_holding,
)
from pioneer_tunnel.relay.fleet.redis_store import RedisServer, RedisStore
from pioneer_tunnel.relay.fleet.routes import KnownRoutes
from pioneer_tunnel.relay.fleet.store import Changed, StoreUnreachable
from pioneer_tunnel.relay.gateways.expected import PATIENCE

KEY: Final = f"pioneer:t:{TUNNEL}"

# The text of a record

words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
holdings = st.builds(
    Holding,
    node=words,
    process=st.text("0123456789abcdef", min_size=16, max_size=16),
    session=words,
    fence=st.integers(1, MOST_NUMBER - 1),
    key_id=st.text(max_size=40),
    instance=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    place=st.none() | st.integers(1, 8).flatmap(lambda of: st.builds(LinkPlace, st.integers(0, of - 1), st.just(of))),
    since=st.floats(0, 2**40, exclude_max=True),
)


@fuzzed()
@given(version=st.integers(1, MOST_NUMBER - 1), held=st.lists(holdings, max_size=3))
def test_a_record_reads_as_it_was_written(version: int, held: list[Holding]) -> None:
    text = "\n".join([str(version), *map(encode_holding, held)])
    assert decode(text.encode()) == Record(version, tuple(held))


PIECES: Final = [
    b"7",
    b"0",
    b"\n",
    b"7\n5 0123456789abcdef n s ",
    b"[",
    b'"k"',
    b'"i"',
    b",",
    b"1.5",
    b"NaN",
    b"-1",
    b"]",
]


@fuzzed()
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
)
def test_any_bytes_are_a_record_or_a_broken_one(data: bytes) -> None:
    try:
        record = decode(data)
    except BrokenRecord as broken:
        version = broken.version
    else:
        version = record.version
        again = "\n".join([str(version), *map(encode_holding, record.holdings)])
        assert decode(again.encode() if version else b"") == record
    assert 0 <= version < 10**16


LINE: Final = '5 0123456789abcdef fra1 session ["key","host",1.5,0,2]'


@pytest.mark.parametrize(
    "line",
    [
        "", LINE + " ", LINE.replace(" fra1", ""), LINE.replace("abcdef", "abcdeg"),
        LINE.replace("5", "0", 1), LINE.replace("5", str(MOST_NUMBER), 1),
        LINE.replace("0,2", "2,2"), LINE.replace("0,2", "0,9"), LINE.replace("0,2", "-1,2"), LINE.replace(",0,2", ",0"),
        LINE.replace("1.5", "true"), LINE.replace("1.5", "NaN"), LINE.replace("1.5", "1e999"),
        LINE.replace("1.5", "-1"), LINE.replace("1.5", "9" * 5000), LINE.replace("host", "h" * 1025),
        LINE.replace('"key"', "1"),
        LINE.replace("host", "\\ud800"), LINE.replace("key", "\\udc00"), LINE.replace("]", ""), LINE.replace("[", "{"),
        "5 0123456789abcdef f s " + "[" * 9000 + "]",
    ],
)  # fmt: skip
def test_a_line_that_is_no_holding_breaks_the_record(line: str) -> None:
    assert decode(f"7\n{LINE}".encode()).holdings
    with pytest.raises(BrokenRecord) as broken:
        decode(f"7\n{LINE}\n{line}".encode())
    assert broken.value.version == 7


# Redis


def a_holding(store: RedisStore, **changes: Any) -> Holding:
    fields = {"node": store.node, "process": store.process, "session": "s", "key_id": "k" * 32, "instance": "host-a"}
    return Holding(**{**fields, "since": 1.5, **changes})


@asynccontextmanager
async def running(*stores: RedisStore) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for store in stores:
            await nursery.start(store.run)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def fleet_over(redis: RealRedis, number: int = 2) -> AsyncIterator[list[Node]]:
    async with trio.open_nursery() as tasks:
        stores = [RedisStore(redis.server, f"node{index}", retry=0.05) for index in range(number)]
        async with Fleet(tasks).running(*stores) as nodes:
            yield nodes
        tasks.cancel_scope.cancel()


@pytest.fixture
def redis(redis_of_the_module: RealRedis) -> RealRedis:
    redis_of_the_module.call("FLUSHALL")
    return redis_of_the_module


async def test_what_stands_in_redis(redis: RealRedis) -> None:
    """Names, ids of public keys, times and counters: the docs say so, and how much it is."""
    store = RedisStore(redis.server, "fra1", prefix="p:")
    async with running(store):
        record = await store.write(TUNNEL, expected=0, holdings=[a_holding(store, instance="i" * 16, session="s" * 16)])
        text = redis.call("GET", f"p:t:{TUNNEL}").decode()
        assert re.fullmatch(
            rf'{record.version}\n{record.version} {store.process} fra1 s{{16}} \["k{{32}}","i{{16}}",1.5\]', text
        )
        assert redis.call("GET", f"p:lease:{store.process}") == b"fra1"
        assert redis.call("GET", "p:counter") == str(record.version).encode()
        assert redis.call("DBSIZE") == b":3"
        used = int(redis.call("MEMORY", "USAGE", f"p:t:{TUNNEL}")[1:])
        assert used <= 260
        assert int(redis.call("PTTL", f"p:t:{TUNNEL}")[1:]) > 23 * 3600 * 1000
    assert redis.call("DBSIZE") == b":2", "the lease ends with the process"


async def test_a_write_is_a_compare_and_set(redis: RealRedis) -> None:
    left, right = (RedisStore(redis.server, name) for name in ("fra1", "fra2"))
    told: list[str] = []
    left.on_change = told.append
    async with running(left, right):
        assert await right.read(TUNNEL) == Record(0)
        first = await left.write(TUNNEL, expected=0, holdings=[a_holding(left)])
        with pytest.raises(Changed) as changed:
            await right.write(TUNNEL, expected=0, holdings=[a_holding(right)])
        assert changed.value.record == first == right.known(TUNNEL)
        (holding,) = first.holdings
        assert holding.fence == first.version > 0
        second = await right.write(TUNNEL, expected=first.version, holdings=[holding, a_holding(right)])
        assert second.holdings[0] == holding, "it keeps its fence"
        assert second.holdings[1].fence == second.version > first.version
        with no_hang():
            while not told:
                await trio.sleep(0.01)
        assert told == [TUNNEL]
        assert left.known(TUNNEL) == second
        assert await left.write(TUNNEL, expected=second.version, holdings=[]) == Record(0)
        assert redis.call("EXISTS", KEY) == b":0"


async def test_a_record_says_for_some_seconds_that_its_last_session_left_with_its_process(redis: RealRedis) -> None:
    left, right = (RedisStore(redis.server, name) for name in ("fra1", "fra2"))
    left.leaving = True
    async with running(left, right):
        first = await left.write(TUNNEL, expected=0, holdings=[a_holding(left), a_holding(right)])
        second = await left.write(TUNNEL, expected=first.version, holdings=first.holdings[1:])
        assert not second.leaving
        assert await left.write(TUNNEL, expected=second.version, holdings=[]) == LEAVING
        assert redis.call("GET", KEY) == b"leaving"
        assert 0 < int(redis.call("PTTL", KEY)[1:]) <= PATIENCE * 1000
        assert await right.read(TUNNEL) == LEAVING
        assert right.known(TUNNEL) is None
        with pytest.raises(Changed) as changed:
            await right.write(TUNNEL, expected=second.version, holdings=[a_holding(right)])
        assert changed.value.record == LEAVING
        third = await right.write(TUNNEL, expected=0, holdings=[a_holding(right)])
        assert await left.read(TUNNEL) == third
        assert third.version > second.version
        assert int(redis.call("PTTL", KEY)[1:]) > PATIENCE * 1000


async def test_a_killed_process_has_nothing_and_its_visitors_wait(redis: RealRedis) -> None:
    killed, other = (RedisStore(redis.server, name) for name in ("fra1/0", "fra1/1"))
    async with running(killed, other):
        first = await killed.write(TUNNEL, expected=0, holdings=[a_holding(killed)])
        both = await killed.write("both", expected=0, holdings=[a_holding(killed), a_holding(other)])
        await other.break_lease(killed.process)
        assert await other.read(TUNNEL) == LEAVING
        assert (await other.read("both")).holdings == both.holdings[1:]
        lease = f"pioneer:lease:{killed.process}"
        assert 0 < int(redis.call("PTTL", lease)[1:]) <= PATIENCE * 1000
        with pytest.raises(Changed) as changed:
            await other.write(TUNNEL, expected=0, holdings=[a_holding(other)])
        assert changed.value.record == Record(first.version)
        after = await other.write(TUNNEL, expected=first.version, holdings=[a_holding(other)])
        assert await other.read(TUNNEL) == after
        redis.call("DEL", lease)
        redis.call("SET", KEY, str(first.version) + "\n" + encode_holding(first.holdings[0]))
        assert await other.read(TUNNEL) == Record(first.version), "after some seconds nobody waits any more"
    with pytest.raises(StoreUnreachable):
        await other.break_lease(killed.process)


async def test_a_fence_is_higher_than_all_that_were_lost(redis: RealRedis) -> None:
    """Also that of a node that has seen none of them."""
    left, right = (RedisStore(redis.server, name) for name in ("fra1", "fra2"))
    async with running(left, right):
        for _ in range(3):
            lost = await left.write("lost", expected=0, holdings=[a_holding(left)])
            redis.call("FLUSHALL")
        await trio.sleep(0.01)  # writes within one millisecond are ahead of the clock by so many
        assert (await right.write(TUNNEL, expected=0, holdings=[a_holding(right)])).version > lost.version
        redis.call("FLUSHALL")
        high = attrs.evolve(a_holding(left), fence=2**49)
        await left.write(TUNNEL, expected=0, holdings=[high])
        redis.call("FLUSHALL")
        await left._renew_lease()
        assert (await right.write(TUNNEL, expected=0, holdings=[a_holding(right)])).version > 2**49


async def test_only_processes_with_a_lease_count(redis: RealRedis) -> None:
    left, right = (RedisStore(redis.server, name) for name in ("fra1", "fra2"))
    async with running(right):
        async with running(left):
            record = await left.write(TUNNEL, expected=0, holdings=[a_holding(left)])
            assert await right.read(TUNNEL) == record
        assert await right.read(TUNNEL) == Record(record.version)


TOO_LONG: Final = b"5\n" + b"x" * MOST_RECORD_BYTES


@pytest.mark.parametrize("broken", [b"x", b"12 3\nx", b"007\nx", b"9\n\xff", b"1" * 40, TOO_LONG])
async def test_a_broken_record_counts_as_absent(
    redis: RealRedis, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(redis.server, "fra1")
    async with running(store):
        redis.call("SET", KEY, broken)
        found = await store.read(TUNNEL)
        assert found.holdings == ()
        assert "broken" in caplog.text or broken is TOO_LONG  # that is not even read
        written = await store.write(TUNNEL, expected=found.version, holdings=[a_holding(store)])
        assert await store.read(TUNNEL) == written


async def test_a_name_from_redis_forges_no_line_of_the_log(redis: RealRedis, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(redis.server, "fra1")
    name = "a\x1b[2J\rb"
    async with running(store):
        await store.write(name, expected=0, holdings=[a_holding(store)])
        redis.call("PUBLISH", f"{redis_store.DEFAULT_PREFIX}to:{store.process}", f"{name}\nbroken")
        await eventually(lambda: "broken" in caplog.text)
    assert [record.getMessage().isprintable() for record in caplog.records] == [True] * len(caplog.records)


async def test_messages_about_invented_tunnels_take_no_memory(redis: RealRedis) -> None:
    routes = KnownRoutes()
    store = RedisStore(redis.server, "fra1", routes=routes)
    told: list[str] = []
    store.on_change = told.append
    async with running(store):
        written = await store.write(TUNNEL, expected=0, holdings=[a_holding(store)])
        record = (
            f"{written.version + 1}\n{encode_holding(attrs.evolve(written.holdings[0], fence=written.version + 1))}"
        )
        channel = f"{redis_store.DEFAULT_PREFIX}to:{store.process}"
        for number in range(100):
            redis.call("PUBLISH", channel, f"invented-{number}\n{record}")
        redis.call("PUBLISH", channel, f"{TUNNEL}\n{record}")
        await eventually(lambda: TUNNEL in told)
        assert len(routes) == 1
        known = store.known(TUNNEL)
        assert known is not None
        assert known.version == written.version + 1, "a message about a tunnel of its own counts"


async def test_keys_of_another_type_are_no_outage(redis: RealRedis) -> None:
    store = RedisStore(redis.server, "fra1")
    async with running(store):
        redis.call("LPUSH", KEY, "x")
        redis.call("LPUSH", "pioneer:counter", "x")
        assert await store.read(TUNNEL) == Record(0)
        written = await store.write(TUNNEL, expected=0, holdings=[a_holding(store)])
        assert await store.read(TUNNEL) == written
        redis.call("SET", "pioneer:counter", "1e300")
        assert (await store.write("other", expected=0, holdings=[a_holding(store)])).version > written.version
        assert store.reachable


@pytest.mark.parametrize("forged", [MOST_COUNTED - 2, MOST_NUMBER - 2, 2**63 - 1])
async def test_a_counter_that_was_forged_once_harms_no_later_record(redis: RealRedis, forged: int) -> None:
    """Each process tells Redis the highest number that it has seen. So the harm would outlast the attack."""
    left, right = (RedisStore(redis.server, name) for name in ("fra1", "fra2"))
    async with running(left, right):
        redis.call("SET", "pioneer:counter", str(forged))
        record = await left.write("other", expected=0, holdings=[a_holding(left)])
        redis.call("SET", "pioneer:t:other", f"{MOST_NUMBER - 1}\n{encode_holding(record.holdings[0])}")
        await right.read("other")
        redis.call("FLUSHALL")
        record = await left.write(TUNNEL, expected=0, holdings=[a_holding(left)])
        versions = [record.version]
        for _ in range(3):
            await left._renew_lease()
            await right._renew_lease()
            record = await left.write(TUNNEL, expected=record.version, holdings=record.holdings)
            assert await right.read(TUNNEL) == record
            versions.append(record.version)
        assert len({*versions}) == len(versions)
        assert [holding.session for holding in record.holdings] == ["s"]


async def test_who_writes_has_a_lease(redis: RealRedis) -> None:
    store = RedisStore(redis.server, "fra1")
    async with running(store):
        gaps: list[int] = []
        store.on_gap = lambda: gaps.append(1)
        redis.call("DEL", f"pioneer:lease:{store.process}")
        written = await store.write(TUNNEL, expected=0, holdings=[a_holding(store)])
        assert gaps == [1]
        assert await store.read(TUNNEL) == written
        assert int(redis.call("PTTL", f"pioneer:lease:{store.process}")[1:]) > 10_000


async def test_a_node_that_is_not_in_the_configuration_has_nothing(redis: RealRedis) -> None:
    store = RedisStore(redis.server, "fra1", is_node={"fra1", "fra2"}.__contains__)
    stranger = RedisStore(redis.server, "evil")
    async with running(store, stranger):
        await stranger.write(TUNNEL, expected=0, holdings=[a_holding(stranger)])
        found = await store.read(TUNNEL)
        assert found.holdings == ()
        written = await store.write(TUNNEL, expected=found.version, holdings=[a_holding(store)])
        assert [holding.node for holding in written.holdings] == ["fra1"]


async def test_cancelled_requests_do_not_disturb_others(redis: RealRedis) -> None:
    store = RedisStore(redis.server, "fra1")
    rng = random.Random(1)
    async with running(store):
        written = await store.write(TUNNEL, expected=0, holdings=[a_holding(store)])

        async def read_and_give_up() -> None:
            for _ in range(20):
                with trio.move_on_after(rng.uniform(0, 0.002)):
                    assert await store.read(TUNNEL) == written

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(read_and_give_up)
        assert await store.read(TUNNEL) == written
        assert store.reachable


# Redis fails


async def test_a_redis_that_is_killed_and_comes_back_empty_learns_all_again(caplog: pytest.LogCaptureFixture) -> None:
    with real_redis() as redis:
        async with fleet_over(redis) as (left, right):
            session = await left.connect()
            assert await right.visit() == session.id
            (before,) = (await left.store.read(TUNNEL)).holdings
            redis.kill()
            await eventually(lambda: not (left.store.reachable or right.store.reachable))
            assert await right.visit() == session.id, "a known route"
            during = await right.connect(tunnel_id="other")
            assert await right.visit("other") == during.id
            assert await left.visit("other") is None
            redis.start()
            with no_hang():
                while (await left.visit("other"), await right.visit()) != (during.id, session.id):
                    await trio.sleep(0.05)
            await eventually(lambda: not left.directory.to_reconcile and left.store.reachable)
            assert (await left.store.read(TUNNEL)).holdings == (before,)
            new = await right.connect()
            (after,) = (await left.store.read(TUNNEL)).holdings
            assert (after.session, after.fence > before.fence) == (new.id, True)
            await eventually(lambda: session.orders == ["replaced by host-a"])
    assert "cannot be used" in caplog.text
    assert not [record for record in caplog.records if record.name == "coredis" and record.levelno > logging.INFO]


async def test_a_redis_that_is_paused_delays_a_gateway_by_seconds_at_most(caplog: pytest.LogCaptureFixture) -> None:
    with real_redis() as redis:
        async with fleet_over(redis) as (left, right):
            session = await left.connect()
            assert await right.visit() == session.id
            redis.pause()
            with trio.fail_after(HANG):
                new = await right.connect(instance="host-b", since=1.0)
            assert not right.store.reachable
            assert await right.visit() == new.id
            assert await left.visit() == session.id
            await eventually(lambda: "Unable to establish a connection" in caplog.text)
            assert {record.name for record in caplog.records} == {"pioneer_tunnel.relay.fleet"}, (
                "no tracebacks of coredis"
            )
            redis.go_on()
            await eventually(lambda: session.orders == ["replaced by host-b"])
            with no_hang():
                while await left.visit() != new.id:
                    await trio.sleep(0.05)


async def test_a_redis_that_is_down_at_the_start() -> None:
    with real_redis() as redis:
        redis.kill()
        async with fleet_over(redis) as (left, right):
            session = await left.connect()
            assert await left.visit() == session.id
            redis.start()
            with no_hang():
                while await right.visit() != session.id:
                    await trio.sleep(0.05)


async def test_a_node_that_is_stopped_while_redis_does_not_answer_stops() -> None:
    with real_redis() as redis:
        redis.pause()
        store = RedisStore(RedisServer(path=str(redis.path)), "fra1")
        with no_hang():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nursery.start, store.run)
                await trio.sleep(0.1)
                nursery.cancel_scope.cancel()
        redis.go_on()


async def test_nothing_waits_for_a_redis_that_is_known_to_be_down(redis: RealRedis) -> None:
    store = RedisStore(RedisServer(path=str(redis.path) + "-not-there"), "fra1")
    async with running(store):
        for _ in range(100):
            with pytest.raises(StoreUnreachable):
                await store.read(TUNNEL)


# The connection


async def test_tls_and_a_password_that_appears_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if shutil.which(PROGRAM) and not has_tls():
        pytest.skip(f"{PROGRAM} was built without TLS")
    caplog.set_level(logging.DEBUG)
    ca, port = trustme.CA(), free_port()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    arguments = ["--tls-port", str(port), "--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-auth-clients", "no"]
    arguments += ["--tls-key-file", str(tmp_path / "key.pem"), "--tls-ca-cert-file", str(tmp_path / "ca.pem")]

    with real_redis(*arguments) as redis:
        redis.call("ACL", "SETUSER", "relay", "on", ">correct-horse", "~pioneer:*", "&pioneer:*", "+@all")
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        server = RedisServer(
            host="localhost", port=port, username="relay", password=lambda: "correct-horse", tls=trusting
        )
        store = RedisStore(server, "fra1")
        async with running(store):
            await store.write(TUNNEL, expected=0, holdings=[a_holding(store)])
            assert store.reachable
        assert "correct-horse" not in f"{server!r} {server} {store!r} {store!r}"
        wrong = RedisStore(attrs.evolve(server, password=lambda: "wrong-horse"), "fra1")
        stranger = RedisStore(RedisServer(host="localhost", port=port, tls=ssl.create_default_context()), "fra1")
        async with running(wrong, stranger):
            assert not wrong.reachable
            assert not stranger.reachable
    assert "invalid username-password pair" in caplog.text
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert "horse" not in caplog.text


async def test_the_commands_that_an_access_list_has_to_allow(redis: RealRedis) -> None:
    (documented,) = re.findall(r"(?s)ACL SETUSER relay (.*?)\n\n", redis_store.__doc__ or "")
    redis.call("ACL", "SETUSER", "narrow", *documented.replace(">PASSWORD", "nopass").split())
    server = RedisServer(path=str(redis.path), username="narrow", password=lambda: "")
    left, right = (RedisStore(server, name) for name in ("fra1", "fra2"))
    async with running(left, right):
        session = ScriptedSession()
        first = await left.write(TUNNEL, expected=0, holdings=[a_holding(left, session=session.id)])
        await right.write(TUNNEL, expected=first.version, holdings=[a_holding(right)])
        await right.read(TUNNEL)
        await right._renew_lease()
        assert left.reachable
        assert right.reachable
