"""The records that the parent keeps, and the replicas of the workers, over real channels."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import attrs
import cattrs
import pytest
import trio
from hypothesis import given, settings, strategies as st
from rig import eventually, no_hang

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.neighbours import where_in
from pioneer_tunnel.relay.fleet.records import NOTHING_KNOWN, Holding, Record
from pioneer_tunnel.relay.fleet.store import Changed, StoreUnreachable
from pioneer_tunnel.relay.gateways.registry import LocalDirectory
from pioneer_tunnel.relay.workers.channel import Channel
from pioneer_tunnel.relay.workers.node import WorkerNode
from pioneer_tunnel.relay.workers.others import OtherWorkers
from pioneer_tunnel.relay.workers.records import ParentRecords, ParentStore
from pioneer_tunnel.relay.workers.setup import Setup

PROCESSES: Final = ("a" * 16, "b" * 16)


def holding(process: str, session: str = "1") -> Holding:
    return Holding(
        node=f"relay-1/{PROCESSES.index(process)}",
        process=process,
        session=session,
        key_id="key",
        instance="gateway",
        place=LinkPlace(index=0, of=2),
        since=1.0,
    )


@attrs.define(eq=False)
class Worker:
    """A worker's store, and what it was told."""

    store: ParentStore
    parent: Channel
    own: Channel
    changes: list[str] = attrs.field(factory=list)
    gaps: int = 0


class Machine:
    """A parent, and its workers."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.records = ParentRecords()
        self._nursery = nursery

    async def start(self, process: str) -> Worker:
        ours, theirs = socket.socketpair()

        async def answer(method: str, params: Any) -> Any:
            match method:
                case "join":
                    return self.records.join(process, parent.tell)
                case "read":
                    return self.records.read(params)
                case "write":
                    return self.records.write(process, params)

        def hear(method: str, params: Any, _sockets: Sequence[socket.socket]) -> None:
            assert method == "record"
            worker.store.hear(params)

        async def nothing(_method: str, _params: Any) -> None:
            """A worker is not called here."""

        parent = Channel(ours, answer, lambda *_: None)
        own = Channel(theirs, nothing, hear)
        worker = Worker(ParentStore(f"relay-1/{PROCESSES.index(process)}", process, own), parent, own)
        worker.store.on_change = worker.changes.append

        def gap() -> None:
            worker.gaps += 1

        worker.store.on_gap = gap
        self._nursery.start_soon(parent.run)
        self._nursery.start_soon(own.run)
        await self._nursery.start(worker.store.run)
        return worker


@asynccontextmanager
async def machine() -> AsyncIterator[Machine]:
    with no_hang():
        async with trio.open_nursery() as nursery:
            yield Machine(nursery)
            nursery.cancel_scope.cancel()


async def test_what_a_worker_writes_all_know() -> None:
    async with machine() as parent:
        one = await parent.start(PROCESSES[0])
        written = await one.store.write("office", expected=0, holdings=[holding(PROCESSES[0])])
        assert one.store.known("office") == written == await one.store.read("office")
        assert written.holdings[0].fence > 0
        assert one.changes == [], "of its own"
        other = await parent.start(PROCESSES[1])
        assert (one.gaps, other.gaps) == (1, 1)
        assert other.store.known("office") == written, "a worker that begins is told what there is"
        with pytest.raises(Changed) as changed:
            await other.store.write("office", expected=0, holdings=[holding(PROCESSES[1])])
        assert changed.value.record == written
        other.changes.clear()
        taken = await other.store.write("office", expected=written.version, holdings=[holding(PROCESSES[1])])
        assert taken.holdings[0].fence > written.holdings[0].fence
        await eventually(lambda: one.changes == ["office"])
        assert one.store.known("office") == taken
        await other.store.write("office", expected=taken.version, holdings=[])
        await eventually(lambda: one.store.known("office") == NOTHING_KNOWN)


async def test_what_a_worker_had_goes_with_it() -> None:
    async with machine() as parent:
        one, other = [await parent.start(process) for process in PROCESSES]
        record = await one.store.write("office", expected=0, holdings=[holding(PROCESSES[0])])
        await other.store.write("links", expected=0, holdings=[holding(PROCESSES[0], "2"), holding(PROCESSES[1], "3")])
        assert parent.records.tunnels_of(PROCESSES[0]) == ["office", "links"]
        assert parent.records.has_one_of("links", {PROCESSES[1]})
        assert not parent.records.has_one_of("office", {PROCESSES[1]})
        await eventually(lambda: other.store.known("office") == record)
        parent.records.leave(PROCESSES[0])
        await eventually(lambda: other.store.known("office") == NOTHING_KNOWN)
        assert [each.session for each in other.store.known("links").holdings] == ["3"]


async def test_what_workers_show_each_other_stands_side_by_side_until_they_end() -> None:
    def shown(process: str, *sessions: str) -> dict[str, Any]:
        return {"tunnel": "office", "holdings": cattrs.unstructure([holding(process, each) for each in sessions])}

    async with machine() as parent:
        one, other = [await parent.start(process) for process in PROCESSES]
        parent.records.show(PROCESSES[0], shown(PROCESSES[0], "1"))
        parent.records.show(PROCESSES[1], shown(PROCESSES[1], "2", "3"))
        await eventually(lambda: sessions_of(one) == sessions_of(other) == {"1", "2", "3"})
        assert one.changes == other.changes == ["office"], "of each other"
        parent.records.show(PROCESSES[1], shown(PROCESSES[1], "3"))
        await eventually(lambda: sessions_of(one) == {"1", "3"})
        parent.records.leave(PROCESSES[0])
        await eventually(lambda: sessions_of(other) == {"3"})
        parent.records.show(PROCESSES[1], shown(PROCESSES[1]))
        await eventually(lambda: sessions_of(other) == set())


def sessions_of(worker: Worker) -> set[str]:
    return {each.session for each in worker.store.known("office").holdings}


async def test_a_parent_that_is_gone_is_a_store_that_is_down() -> None:
    async with machine() as parent:
        worker = await parent.start(PROCESSES[0])
        record = await worker.store.write("office", expected=0, holdings=[holding(PROCESSES[0])])
        worker.parent.close()
        with pytest.raises(StoreUnreachable):
            await worker.store.write("office", expected=record.version, holdings=[])
        assert not worker.store.reachable
        with pytest.raises(StoreUnreachable):
            await worker.store.read("office")
        assert worker.store.known("office") == record, "what was known stays known"


@settings(max_examples=20, deadline=None)
@given(writers=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["one", "two"]), st.booleans()), max_size=12))
def test_replicas_agree_whoever_writes_at_once(writers: list[tuple[int, str, bool]]) -> None:
    """Each write is about what its worker knows. In the end all replicas say what the parent says."""

    async def run() -> None:
        async with machine() as parent:
            workers = [await parent.start(process) for process in PROCESSES]

            async def write(index: int, tunnel: str, drops: bool) -> None:
                holdings = [] if drops else [holding(PROCESSES[index])]
                known = workers[index].store.known(tunnel)
                while True:
                    try:
                        await workers[index].store.write(tunnel, expected=known.version, holdings=holdings)
                    except Changed as changed:
                        known = changed.record
                    else:
                        return

            async with trio.open_nursery() as nursery:
                for writer in writers:
                    nursery.start_soon(write, *writer)
            for tunnel in ("one", "two"):
                record = await workers[0].store.read(tunnel)
                assert workers[0].store.known(tunnel) == record
                await workers[1].store.read(tunnel)
                assert workers[1].store.known(tunnel) == record

    trio.run(run)


@contextmanager
def others(*, workers: int, on_holder: Callable[[str], object] = lambda _tunnel_id: None) -> Iterator[OtherWorkers]:
    """The others of worker 0, with a parent that says nothing."""
    setup = Setup(index=0, workers=workers, base="", tunnels="", process=PROCESSES[0], folder="/nowhere")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, lambda *_: trio.lowlevel.checkpoint(), lambda *_: None)
        yield OtherWorkers("relay-1", setup, channel, on_holder)


async def test_a_worker_alone_passes_no_visitors() -> None:
    with others(workers=1) as workers:
        assert WorkerNode(workers).passing is None
    with others(workers=2) as workers:
        assert WorkerNode(workers).passing is not None


async def test_a_gateway_has_come_when_another_worker_has_it_that_does_not_drain() -> None:
    """This worker knows by itself when its own session has the tunnel. The record has the session before that."""
    own, other = PROCESSES
    come: list[str] = []
    with others(workers=2, on_holder=come.append) as workers:

        def hear(tunnel: str, *processes: str) -> None:
            record = Record(1, tuple(holding(process) for process in processes))
            workers.hear_record({"tunnel": tunnel, "record": cattrs.unstructure(record), "by": processes[-1]})

        hear("mine", own)
        hear("theirs", other)
        hear("shared", other, own)
        assert come == ["theirs", "shared"]
        workers.note_leaving(other, ended=False)
        hear("draining", other)
        hear("mine", other, own)
        assert come == ["theirs", "shared"]


async def test_a_visitor_goes_to_another_worker_that_has_its_tunnel_and_does_not_drain() -> None:
    own, other = PROCESSES
    with others(workers=2) as workers:
        where = where_in(workers, LocalDirectory(), random.Random(1))

        def know(*holdings: Holding) -> None:
            workers.hear_record({"tunnel": "office", "record": cattrs.unstructure(Record(1, holdings)), "by": other})

        assert where("office") is None
        know(holding(own))
        assert where("office") is None, "this worker is about to have it, or has just lost it"
        know(holding(own), holding(other))
        assert where("office") == holding(other)
        know(holding(other, "1"), holding(other, "2"))
        assert {where("office") for _ in range(20)} == {holding(other, "1"), holding(other, "2")}
        workers.note_leaving(other, ended=False)
        assert where("office") is None
