"""pytest fixtures for `pioneer_tunnel.testing`; they need pytest-trio. docs/testing.md has an example.

pytest loads this module wherever pioneer-tunnel is installed, also for unrelated tests. So it is not part of the
package, whose import takes time, and it imports the package only when a fixture is used.
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
    """A clock for virtual time: it jumps to the next deadline when all tasks wait."""
    import trio.testing  # noqa: PLC0415

    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def tunnel_relay() -> AsyncIterator[MemoryRelay]:
    """A running `MemoryRelay`; `tunnel_relay.follow(plan)` sets its faults."""
    from pioneer_tunnel.testing import open_memory_relay  # noqa: PLC0415

    async with open_memory_relay() as relay:
        yield relay


@pytest.fixture
async def status_recorder(tunnel_relay: MemoryRelay) -> AsyncIterator[StatusRecorder]:
    """A `StatusRecorder` for `tunnel_relay`; the test fails if a status breaks the contract or is untrue."""
    from pioneer_tunnel.testing import open_status_recorder  # noqa: PLC0415

    async with open_status_recorder(tunnel_relay) as recorder:
        yield recorder
