"""The fixtures of `pioneer_tunnel.testing` for pytest, by way of pytest-trio. docs/testing.md shows them at work.

pytest loads this module wherever pioneer-tunnel is installed, also for tests that have nothing to do with it. So it
stands outside the package, whose import costs something, and imports nothing until a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import trio.testing

    from pioneer_tunnel.testing import MemoryRelay, StatusRecorder

__all__ = ["status_recorder", "tunnel_relay", "virtual_clock"]


@pytest.fixture
def virtual_clock() -> trio.testing.MockClock:
    """Virtual time for a test that names it: the clock jumps to the next deadline when all tasks wait."""
    import trio.testing  # noqa: PLC0415

    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def tunnel_relay() -> AsyncIterator[MemoryRelay]:
    """A `MemoryRelay` that runs; `tunnel_relay.follow(plan)` has it go wrong."""
    from pioneer_tunnel.testing import open_memory_relay  # noqa: PLC0415

    async with open_memory_relay() as relay:
        yield relay


@pytest.fixture
async def status_recorder(tunnel_relay: MemoryRelay) -> AsyncIterator[StatusRecorder]:
    """A `StatusRecorder` at `tunnel_relay`; the test fails when what it was shown broke the contract, or was untrue."""
    from pioneer_tunnel.testing import open_status_recorder  # noqa: PLC0415

    async with open_status_recorder(tunnel_relay) as recorder:
        yield recorder
