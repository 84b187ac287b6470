"""A fleet of many nodes under virtual time: `python -m benchmarks.scaling.simulation`.

What decides is the code that runs in production: `FleetDirectory` and its store at each node, `HandshakeRate` and
`Spreading` of the relay, and `Restarts` in each gateway. The network is a model, with the times below, and so is Redis:
`MemoryRecords`, which answers any number of requests at once. It happens, one after the other:

    start      all gateways connect, spread over 45 seconds
    death      one node in a hundred goes down at once, without a word: a machine that loses its power
    outage     Redis is away for 40 seconds; a part of the nodes goes down meanwhile
    empty      Redis comes back without data: a failover to a server that had nothing
    storm      a third of all nodes goes down: a data centre
    end        a visitor for each tunnel, at any node

In all of it, visitors come to any node, for any tunnel whose gateway is connected. One is *lost* if it does not reach
the gateway, though its node knew a route or could ask Redis.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio
import trio.testing

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.hops import ORDER_TIMEOUT
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.node_link import DIAL_TIMEOUT
from pioneer_tunnel.relay.fleet.peers import Hop, Order, Peers
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.gateways.registry import Holder, LiveSession, TunnelTaken
from pioneer_tunnel.relay.gateways.spreading import Spreading
from pioneer_tunnel.relay.rates import HandshakeRate
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy, Restarts, RunEnd

__all__ = ["Fleet", "Plan", "simulate"]

REDIS_ROUND_TRIP: Final = 0.002
NODE_ROUND_TRIP: Final = 0.01
GATEWAY_ROUND_TRIP: Final = 0.05
TO_THE_DOOR: Final = 3.5 * GATEWAY_ROUND_TRIP
"""Seconds until the relay has a gateway's request: TCP, TLS and the upgrade. A proof takes another round trip."""
CONNECT_TIMEOUT: Final = 10.0
HEARTBEAT: Final = 15.0
"""A gateway notices within two of them that its node has died."""
RESUME_TIMEOUT: Final = 60.0
"""So long a gateway tries to resume, which another node answers with a new session."""
HEALTH_CHECK: Final = 10.0
"""Seconds until the load balancer notices a dead node."""
REVISIT: Final = 0.25
TRIES: Final = 3
SECOND: Final = 1.0
TOGETHER: Final = 0.1
"""Visitors of so many seconds come at the same time."""


@final
@attrs.frozen(kw_only=True)
class Plan:
    """What is simulated. Times are in seconds since the start.

    Attributes:
        nodes: how many.
        gateways: how many, at all nodes together.
        rate: handshakes per second that each node takes.
        visits: visitors per second.
        death, outage, empty, storm, end: when each part begins.
        outage_ends: when Redis is back.
    """

    nodes: int = 10_000
    gateways: int = 30_000
    rate: float = 200.0
    visits: int = 200
    death: float = 90.0
    outage: float = 150.0
    outage_ends: float = 190.0
    empty: float = 230.0
    storm: float = 270.0
    end: float = 360.0


@final
@attrs.define(eq=False, kw_only=True)
class Session(LiveSession):
    """A session of a gateway, at its node."""

    node: Node
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    instance: str
    key_id: str = "key"
    place: LinkPlace | None = None
    since: float = attrs.field(factory=trio.current_time)
    services: Collection[str] | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def open_stream(self) -> ByteStream:
        await trio.sleep(GATEWAY_ROUND_TRIP / 2)
        if self.ended.is_set():
            raise trio.BrokenResourceError("the session has ended")
        return adopt(trio.testing.memory_stream_pair()[0])

    async def answers(self, within: float) -> bool:
        await trio.sleep(min(GATEWAY_ROUND_TRIP, within))
        return not self.ended.is_set()

    def replace(self, by: str) -> None:  # noqa: ARG002  # the interface
        self.ended.set()

    def retire(self, by: str) -> None:  # noqa: ARG002  # the interface
        self.ended.set()

    def abandon(self) -> None:
        self.ended.set()


@final
class Node(Peers):
    """A node, and its way to the others.

    Attributes:
        lives: False when it has gone down.
        held: the sessions that it has.
    """

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet: Final = fleet
        self.store: Final = MemoryStore(fleet.records, f"n{number}", round_trip=REDIS_ROUND_TRIP)
        self.directory: Final = FleetDirectory(self.store, self)
        self.handshakes: Final = HandshakeRate(fleet.plan.rate)
        self.spreading: Final = Spreading(fleet.plan.rate)
        self.lives = True
        self.held: Final[set[Session]] = set()
        self.died: Final = trio.Event()
        self._failing: Final[dict[str, float]] = {}  # nodes that could not be reached, until when

    async def run(self) -> None:
        """Run until the node goes down."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.directory.run)
            await self.died.wait()
            # A machine that loses its power ends no lease: Redis does not hear of it.
            self.store.connected = False
            nursery.cancel_scope.cancel()

    def die(self) -> None:
        self.lives = False
        self.died.set()
        for session in self.held:
            session.ended.set()

    async def open_stream(self, tunnel_id: str, holding: Holding) -> Hop:
        other = await self._reach(holding, DIAL_TIMEOUT)
        session = None if other is None else other.directory.local(tunnel_id, holding.session)
        if session is None:
            raise trio.BrokenResourceError("it is not there")
        return Hop(await session.open_stream(), session.services)

    async def order(self, tunnel_id: str, holding: Holding, order: Order) -> bool:
        other = await self._reach(holding, ORDER_TIMEOUT)
        return other is not None and await other.directory.carry_out(tunnel_id, holding.session, order)

    def distance(self, node: str) -> float:
        return math.inf if self._failing.get(node, 0.0) > trio.current_time() else NODE_ROUND_TRIP

    async def _reach(self, holding: Holding, timeout: float) -> Node | None:
        """Another node, after the time that a request takes; None if it is down."""
        self.fleet.hops += 1
        other = self.fleet.by_process.get(holding.process)
        if other is not None and other.lives:
            await trio.sleep(NODE_ROUND_TRIP)
            return other
        if self.distance(holding.node) == math.inf:
            return None  # its link backs off
        await trio.sleep(timeout)
        self._failing[holding.node] = trio.current_time() + HEARTBEAT
        return None


@final
@attrs.define
class Seconds:
    """What has happened in each second.

    Attributes:
        connects: gateways that came to a node.
        most_connects: to the node to which most came.
        operations: of Redis.
        disconnected: gateways without a session, at its end.
        visits: visitors whose gateway was connected.
        unknown: of these, who came to a node that knew no route and could not ask Redis.
        lost: of the others, who did not reach the gateway.
        to_reconcile: sessions that may differ from their record, at its end.
    """

    connects: Counter[int] = attrs.field(factory=Counter)
    most_connects: Counter[int] = attrs.field(factory=Counter)
    operations: Counter[int] = attrs.field(factory=Counter)
    disconnected: Counter[int] = attrs.field(factory=Counter)
    visits: Counter[int] = attrs.field(factory=Counter)
    unknown: Counter[int] = attrs.field(factory=Counter)
    lost: Counter[int] = attrs.field(factory=Counter)
    to_reconcile: Counter[int] = attrs.field(factory=Counter)


@final
class Fleet:
    """All nodes, their gateways and visitors.

    Attributes:
        seconds: what has happened.
        hops: requests of nodes to others.
        unreached: at the end, tunnels that a visitor did not reach.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan: Final = plan
        self.records: Final = MemoryRecords()
        self.random: Final = Random(seed)
        self.seconds: Final = Seconds()
        self.hops = 0
        self.unreached = 0
        self.nodes: Final = [Node(self, number) for number in range(plan.nodes)]
        self.by_process: Final = {node.store.process: node for node in self.nodes}
        self.open_to_gateways: Final = [*self.nodes]
        self._sessions: Final[dict[int, Session]] = {}
        self._connects: Final[Counter[Node]] = Counter()

    async def run(self) -> None:
        plan = self.plan
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                nursery.start_soon(self._run_node, node)
            for number in range(plan.gateways):
                nursery.start_soon(self._gateway, number)
            nursery.start_soon(self._count)
            nursery.start_soon(self._visit)
            await trio.sleep_until(plan.death)
            self._kill(plan.nodes // 100, nursery)
            await trio.sleep_until(plan.outage)
            self.records.up = False
            await trio.sleep_until((plan.outage + plan.outage_ends) / 2)
            self._kill(plan.nodes // 100, nursery)
            await trio.sleep_until(plan.outage_ends)
            self.records.up = True
            await trio.sleep_until(plan.empty)
            self.records.up = False
            self.records.forget()
            await trio.sleep(SECOND)
            self.records.up = True
            await trio.sleep_until(plan.storm)
            self._kill(plan.nodes // 3, nursery)
            await trio.sleep_until(plan.end)
            await self._visit_all()
            nursery.cancel_scope.cancel()

    async def _run_node(self, node: Node) -> None:
        # Nodes do not renew in step. But each time at which something happens takes time to simulate.
        await trio.sleep(round(self.random.uniform(0, node.store.lease / 3), 1))
        await node.run()

    def _kill(self, count: int, tasks: trio.Nursery) -> None:
        """Let so many nodes go down at once."""
        dying = self.random.sample(self.open_to_gateways, max(count, 1))
        for node in dying:
            node.die()
        tasks.start_soon(self._close_to_gateways, dying)

    async def _close_to_gateways(self, nodes: Sequence[Node]) -> None:
        """Let the load balancer notice."""
        await trio.sleep(HEALTH_CHECK)
        gone = {*nodes}
        self.open_to_gateways[:] = [node for node in self.open_to_gateways if node not in gone]

    async def _gateway(self, number: int) -> NoReturn:
        random = Random(self.random.random())
        restarts = Restarts(RestartPolicy(), random)
        await trio.sleep(random.uniform(0, self.plan.death / 2))
        spread: Spread | None = None
        lost_at, failed = -math.inf, 0
        connected_for: float | None = None
        while True:
            # No deadline: a gateway tries for as long as it runs.
            advice, retry_after = await self._session(number, random)
            if advice is not None:  # it had one, and has lost it
                spread, lost_at, failed, connected_for = advice, trio.current_time(), 0, HEARTBEAT * 2
            if trio.current_time() - lost_at < RESUME_TIMEOUT:
                delay = restarts.redial_delay(failed, spread, retry_after=retry_after)
                failed += 1
            else:
                ending = RunEnd(connected_for=connected_for, retry_after=retry_after, spread=spread)
                waits = restarts.after(ending)
                assert waits is not None  # the policy never gives up
                delay, connected_for = waits, None
            await trio.sleep(delay)

    async def _session(self, number: int, random: Random) -> tuple[Spread | None, float | None]:
        """Try to have a session, until it is lost.

        Returns:
            What its node advised, if there was one; and after how many seconds a node that refused it wants it back.
        """
        node = random.choice(self.open_to_gateways)
        self.seconds.connects[int(trio.current_time())] += 1
        self._connects[node] += 1
        if not node.lives:
            await trio.sleep(CONNECT_TIMEOUT)
            return None, None
        await trio.sleep(TO_THE_DOOR)
        wait = node.handshakes.wait(trio.current_time())
        if wait is not None:
            return None, wait
        await trio.sleep(GATEWAY_ROUND_TRIP)
        node.handshakes.proved(trio.current_time())
        session = Session(node=node, instance=f"gateway {number}")
        tunnel_id = f"t{number}"
        try:
            await node.directory.admit(tunnel_id, session)
            await node.directory.enter(tunnel_id, session)
            self._sessions[number] = session
            node.held.add(session)
            await session.ended.wait()
        except TunnelTaken:
            return None, None
        finally:
            node.held.discard(session)
            if self._sessions.get(number) is session:
                del self._sessions[number]
            with trio.CancelScope(shield=True):
                await node.directory.leave(tunnel_id, session)
        if node.died.is_set():  # which a gateway notices by the silence
            await trio.sleep(random.uniform(HEARTBEAT, 2 * HEARTBEAT))
        return node.spreading.advice(self.plan.gateways // self.plan.nodes), None

    async def _visit(self) -> NoReturn:
        async with trio.open_nursery() as nursery:
            while True:
                # No deadline: it ends with the fleet.
                await trio.sleep(TOGETHER)
                for _ in range(int(self.plan.visits * TOGETHER)):
                    number = self.random.randrange(self.plan.gateways)
                    node = self.random.choice(self.open_to_gateways)
                    if node.lives:
                        nursery.start_soon(self._one_visit, node, number)

    async def _one_visit(self, node: Node, number: int) -> None:
        wanted = self._sessions.get(number)
        second = int(trio.current_time())
        if wanted is None:
            return
        tunnel_id = f"t{number}"
        asks = self.records.up and node.store.reachable
        knows = asks or wanted.node is node or node.store.known(tunnel_id) is not None
        reached = await _visit(node, tunnel_id)
        if node.lives and self._sessions.get(number) is wanted:  # otherwise the gateway has gone meanwhile
            self.seconds.visits[second] += 1
            if not reached:
                (self.seconds.lost if knows else self.seconds.unknown)[second] += 1

    async def _visit_all(self) -> None:
        """A visitor for each tunnel."""

        async def visit(number: int) -> None:
            if not await _visit(self.random.choice(self.open_to_gateways), f"t{number}"):
                self.unreached += 1

        async with trio.open_nursery() as nursery:
            for number in range(self.plan.gateways):
                nursery.start_soon(visit, number)

    async def _count(self) -> NoReturn:
        before = 0
        while True:
            # No deadline: it ends with the fleet.
            await trio.sleep_until(int(trio.current_time()) + SECOND)
            second = int(trio.current_time()) - 1
            operations = sum(node.store.operations for node in self.nodes)
            self.seconds.operations[second], before = operations - before, operations
            self.seconds.disconnected[second] = self.plan.gateways - len(self._sessions)
            self.seconds.most_connects[second] = max(self._connects.values(), default=0)
            self.seconds.to_reconcile[second] = sum(node.directory.to_reconcile for node in self.nodes if node.lives)
            self._connects.clear()


async def _visit(node: Node, tunnel_id: str) -> bool:
    """Visit a tunnel as the relay does for a visitor, who may come again soon. Whether it was reached."""
    for _ in range(TRIES):
        tried: list[Holder] = []
        while (found := await node.directory.find(tunnel_id)) is not None and found not in tried:
            try:
                await (await found.open_stream()).aclose()
            except trio.BrokenResourceError:
                tried.append(found)
                continue
            assert isinstance(found, RemoteSession | Session)
            return True
        await trio.sleep(REVISIT)
    return False


def simulate(plan: Plan, *, seed: int = 1) -> Fleet:
    """Run it, as fast as this machine can."""

    async def main() -> Fleet:
        fleet = Fleet(plan, seed)
        await fleet.run()
        return fleet

    gc.set_threshold(200_000, 50, 50)  # there are millions of objects, and few of them are garbage
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def report(fleet: Fleet) -> list[str]:
    """A table with a row for each part."""
    plan, seconds = fleet.plan, fleet.seconds
    parts = {
        "start": (0.0, plan.death),
        "death of 1 node in 100": (plan.death, plan.outage),
        "outage of Redis": (plan.outage, plan.outage_ends),
        "Redis is back": (plan.outage_ends, plan.empty),
        "Redis comes back empty": (plan.empty, plan.storm),
        "a third of the nodes goes down": (plan.storm, plan.end),
    }
    titles = ["part", "most connects/s, all", "of one node", "most Redis operations/s", "mean", "gateways away, most"]
    titles += ["99 % back after, s", "visits", "no route", "lost"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for name, (start, end) in parts.items():
        span = range(int(start), int(end))
        away = [seconds.disconnected[second] for second in span]
        most = max(away)
        back = next((index for index in range(len(away) - 1, -1, -1) if away[index] > most / 100), -1) + 1
        operations = [seconds.operations[second] for second in span]
        lines.append(
            f"| {name} | {max(seconds.connects[second] for second in span):,}"
            f" | {max(seconds.most_connects[second] for second in span):,} | {max(operations):,}"
            f" | {sum(operations) / len(operations):,.0f} | {most:,} | {back}"
            f" | {sum(seconds.visits[second] for second in span):,}"
            f" | {sum(seconds.unknown[second] for second in span):,}"
            f" | {sum(seconds.lost[second] for second in span):,} |"
        )
    lines.append(f"\nAt the end {fleet.unreached:,} of {plan.gateways:,} tunnels are not reached from a random node.")
    return lines


def plot(fleet: Fleet, path: Path) -> None:
    """Draw what has happened over time."""
    import matplotlib as mpl  # only for this: the extra `bench`

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plan, seconds = fleet.plan, fleet.seconds
    figure, panels = plt.subplots(4, 1, figsize=(9, 10), sharex=True)
    span = range(int(plan.end))
    rows = (
        ("gateways without session", seconds.disconnected),
        ("connects/s, all nodes", seconds.connects),
        ("Redis operations/s", seconds.operations),
        ("visitors lost per second", seconds.lost),
    )
    for axes, (title, counts) in zip(panels, rows, strict=True):
        axes.plot(span, [counts[second] for second in span], linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0)
        for at, word in (
            (plan.death, "1 % dies"),
            (plan.outage, "Redis away"),
            (plan.outage_ends, "back"),
            (plan.empty, "empty"),
            (plan.storm, "a third dies"),
        ):
            axes.axvline(at, color="grey", linestyle=":", linewidth=0.8)
            axes.annotate(word, (at, 1), xycoords=("data", "axes fraction"), fontsize=7, va="top")
    panels[-1].set_xlabel(f"seconds; {plan.nodes:,} nodes, {plan.gateways:,} gateways, {plan.visits:,} visitors/s")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.simulation", description="A fleet, simulated.")
    parser.add_argument("--nodes", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--gateways", type=int, default=30_000, help="at all nodes together (default %(default)s)")
    parser.add_argument("--visits", type=int, default=200, help="visitors per second (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (needs the extra `bench`)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what has happened in each second")
    arguments = parser.parse_args()
    began = time.monotonic()
    fleet = simulate(
        Plan(nodes=arguments.nodes, gateways=arguments.gateways, visits=arguments.visits), seed=arguments.seed
    )
    print("\n".join(report(fleet)))
    print(f"\n{fleet.hops:,} requests from node to node; {time.monotonic() - began:.0f} s for {fleet.plan.end:g} s.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(attrs.asdict(fleet.seconds)))
    if arguments.plot is not None:
        plot(fleet, arguments.plot)


if __name__ == "__main__":
    main()
