"""A relay in memory, for virtual time, with connections that a test can break."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, final

import trio
from rig import KEY, RELAY_NAME, relay_config, tunnel_entry
from yamux_rig import PipeEnd, pipe

from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel.relay.gateways.endpoint import GatewayEndpoint
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel
from pioneer_tunnel.websocket import EngineName

EPOCH: Final = 1_700_000_000


@final
class Cable(trio.abc.Stream):
    """A gateway's connection. Pulled out, nothing passes any more and nobody is told, as when a host vanishes.

    Attributes:
        end: the gateway's end of the pipes.
        far: the relay's end.
    """

    def __init__(self) -> None:
        self.end, self.far = pipe()
        self._pulled = False

    def pull(self, *, room: float = float("inf")) -> None:
        """Pull it out. The relay can still send `room` bytes into the system's buffers."""
        self._pulled = True
        self.far.outbound.allow(room)

    @property
    def let_go(self) -> bool:
        """Whether the relay has closed its end."""
        return self.far.inbound.closed

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._pulled:
            await trio.lowlevel.checkpoint()
        else:
            await self.end.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.end.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self.end.receive_some(max_bytes)
        if self._pulled:
            await trio.sleep_forever()
        return data

    async def aclose(self) -> None:
        if not self._pulled:
            await self.end.aclose()
        await trio.lowlevel.checkpoint()


@final
class MemoryRelay:
    """A relay without sockets.

    Attributes:
        control: where gateways connect.
        directory: who is connected.
        cables: each gateway's connection, in the order in which they were dialled.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        config: dict[str, Any] | None = None,
        *,
        engine: EngineName | None = None,
        **entry: Any,
    ) -> None:
        made = relay_config(**({"tunnels": [tunnel_entry(**entry)]} | (config or {})))
        self.directory = LocalDirectory()
        self.registry = LocalRegistry(made.tunnels)
        self.control = GatewayEndpoint(
            made, self.registry, self.directory, engine=engine, wall_clock=lambda: EPOCH + trio.current_time()
        )
        self._ingress: Final = Ingress(self.registry, self.directory)
        self._nursery: Final = nursery
        self.cables: list[Cable] = []

    async def dial(self, host: str, port: int) -> trio.abc.Stream:
        """The dialer of gateways."""
        cable = Cable()
        self.cables.append(cable)
        watched = watch(cable.far)
        self._nursery.start_soon(self.control.serve_request, watched, watched)
        await trio.lowlevel.checkpoint()
        return cable

    def tunnel(self, instance: str, **changes: Any) -> AbstractAsyncContextManager[Tunnel]:
        settings: dict[str, Any] = {
            "relay": f"ws://{RELAY_NAME}",
            "key": KEY,
            "dial": self.dial,
            "instance": instance,
            "wall_clock": lambda: EPOCH + trio.current_time(),
        }
        return open_tunnel(**(settings | changes))

    async def visit(self) -> PipeEnd:
        """Connect as a visitor."""
        ours, theirs = pipe()
        self._nursery.start_soon(self._ingress.serve, Visit(stream=theirs, visitor=None, local=None, tls=False))
        await trio.lowlevel.checkpoint()
        return ours


async def until_cancelled(
    tunnel: AbstractAsyncContextManager[Tunnel],
    *,
    task_status: trio.TaskStatus[tuple[Tunnel, trio.CancelScope]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold a tunnel open, until the scope that this starts with is cancelled."""
    with trio.CancelScope() as scope:
        async with tunnel as opened:
            task_status.started((opened, scope))
            await trio.sleep_forever()


@asynccontextmanager
async def relay_in_memory(config: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[MemoryRelay]:
    """A relay with its tasks; `config` and `options` are those of `MemoryRelay`."""
    async with trio.open_nursery() as nursery:
        yield MemoryRelay(nursery, config, **options)
        nursery.cancel_scope.cancel()
