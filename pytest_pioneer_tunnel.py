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
def virtual_clock(request: pytest.FixtureRequest) -> trio.testing.MockClock:
    """A clock for virtual time: it jumps to the next deadline when all tasks wait."""
    import trio.testing  # noqa: PLC0415

    _check(request, runs_in_trio=not _asyncio_takes_all(request.config))
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def tunnel_relay(request: pytest.FixtureRequest) -> AsyncIterator[MemoryRelay]:
    """A running `MemoryRelay`; `tunnel_relay.follow(plan)` sets its faults."""
    from pioneer_tunnel.testing import open_memory_relay  # noqa: PLC0415

    _check(request, runs_in_trio=_in_trio())
    async with open_memory_relay() as relay:
        yield relay


@pytest.fixture
async def status_recorder(tunnel_relay: MemoryRelay) -> AsyncIterator[StatusRecorder]:
    """A `StatusRecorder` for `tunnel_relay`; the test fails if a status breaks the contract or is untrue."""
    from pioneer_tunnel.testing import open_status_recorder  # noqa: PLC0415

    async with open_status_recorder(tunnel_relay) as recorder:
        yield recorder


def _check(request: pytest.FixtureRequest, *, runs_in_trio: bool) -> None:
    if not runs_in_trio:
        pytest.fail(
            f"the fixture {request.fixturename!r} needs Trio, and asyncio runs this test: pytest-asyncio takes every"
            ' async test and fixture with asyncio_mode = "auto". In the configuration of pytest, set asyncio_mode ='
            ' "strict"; then mark the tests for asyncio with @pytest.mark.asyncio, and those for Trio with'
            " @pytest.mark.trio",
            pytrace=False,
        )


def _asyncio_takes_all(config: pytest.Config) -> bool:
    if not config.pluginmanager.has_plugin("asyncio"):
        return False
    mode: object = config.getoption("asyncio_mode", None) or config.getini("asyncio_mode")
    return mode == "auto"


def _in_trio() -> bool:
    import trio  # noqa: PLC0415

    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
