"""A supervisor under virtual time, over a transport of a test, with each status judged as it is published."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Final, final
from unittest.mock import patch

import attrs
import trio

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import LocalGatewayError, TunnelError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State, Status
from pioneer_tunnel.testing import ContractBroken, StatusContract
from pioneer_tunnel.transports.interface import Serve, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.status_feed import StatusFeed
from pioneer_tunnel.tunnel.supervisor import Supervisor

EPOCH: Final = 1_700_000_000.75
"""Where the wall clock stands when virtual time begins: between two seconds, as it mostly does."""

PLAIN: Final = RestartPolicy(jitter=0)
TARGET: Final = Target(
    address=RelayAddress.parse("wss://relay.test"), key=RelayKey("ptk1_the-key-of-the-tests-0123456789abcdef")
)


def wall_clock() -> float:
    return EPOCH + trio.current_time()


def refuse_visitors(stream: TunnelStream) -> None:
    raise trio.WouldBlock


@final
class LocalGateway:
    """A local gateway as the supervisor's probe finds it: there or not."""

    def __init__(self, *, there: bool = True) -> None:
        self.there = there
        self.probes: list[float] = []

    async def probe(self) -> None:
        self.probes.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if not self.there:
            raise LocalGatewayError("nothing listens at 127.0.0.1:17878")


@final
@attrs.frozen
class Published:
    """A status, and when it was published, in virtual time."""

    at: float
    status: Status


@final
class Supervised:
    """One generation, and what it said.

    Attributes:
        published: every status that was published.
        failure: what `Supervisor.run` raised, once it did.
        over: when it had ended, in virtual time.
    """

    def __init__(
        self,
        transport: Serve,
        *,
        policy: RestartPolicy = PLAIN,
        probe: Callable[[], Awaitable[None]] | None = None,
        seed: int = 0,
        feed: StatusFeed | None = None,
        relays: Sequence[RelayAddress] = (),
        links: int = 1,
        target: Target = TARGET,
    ) -> None:
        self.feed: Final = feed or StatusFeed(Status(state=State.DISABLED, updated_at_unix=int(wall_clock())))
        self.supervisor: Final = Supervisor(
            transport,
            target,
            refuse_visitors,
            feed=self.feed,
            policy=policy,
            random=Random(seed),
            wall_clock=wall_clock,
            probe=probe,
            relays=relays,
            links=links,
        )
        self.published: Final[list[Published]] = []
        self.failure: TunnelError | None = None
        self.over: float | None = None
        self.broken: ContractBroken | None = None
        self._contract: Final = StatusContract(wall_clock=wall_clock)
        self._contract.see(self.feed.current)
        self._publish: Final = self.feed.publish

    @property
    def status(self) -> Status:
        return self.feed.current

    @property
    def said(self) -> list[str]:
        """State and error kind of what was published, each once while it lasts."""
        said: list[str] = []
        for published in self.published:
            status = published.status
            text = str(status.state) if status.error_kind is None else f"{status.state}/{status.error_kind}"
            if not said or said[-1] != text:
                said.append(text)
        return said

    def record(self, status: Status) -> None:
        before = self.feed.current
        self._publish(status)
        if self.feed.current is before:
            return
        self.published.append(Published(trio.current_time(), status))
        try:
            self._contract.see(status)
        except ContractBroken as broken:
            # Not raised into the supervisor, which would deal with it as with any exception.
            self.broken = self.broken or broken

    async def run(self) -> None:
        """Run the supervisor to its end, and keep what it raised."""
        with patch.object(self.feed, "publish", self.record):
            try:
                await self.supervisor.run()
            except TunnelError as error:
                self.failure = error
            finally:
                self.over = trio.current_time()

    async def finish(self) -> TunnelError:
        """Wait until the generation has failed for good; a test whose generation does not has failed."""
        with trio.fail_after(10_000):
            while self.over is None:
                await trio.sleep(1)
        assert self.failure is not None
        return self.failure


@asynccontextmanager
async def supervised(
    transport: Serve,
    *,
    policy: RestartPolicy = PLAIN,
    probe: Callable[[], Awaitable[None]] | None = None,
    seed: int = 0,
    feed: StatusFeed | None = None,
    relays: Sequence[RelayAddress] = (),
    links: int = 1,
    target: Target = TARGET,
) -> AsyncIterator[Supervised]:
    """Run a generation for the length of an `async with`; every status has kept the contract when it ends."""
    generation = Supervised(
        transport, policy=policy, probe=probe, seed=seed, feed=feed, relays=relays, links=links, target=target
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(generation.run)
        yield generation
        nursery.cancel_scope.cancel()
    if generation.broken is not None:
        raise generation.broken
