"""The pytest plugin: its fixtures in a plain test, and in the tests of somebody else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from pioneer_tunnel import open_tunnel
from pioneer_tunnel.testing import FaultPlan, MemoryRelay, NotResolved, StatusRecorder, Up, wall_clock

pytest_plugins = ["pytester"]


async def test_the_fixtures_work_together(
    virtual_clock: trio.testing.MockClock, tunnel_relay: MemoryRelay, status_recorder: StatusRecorder
) -> None:
    tunnel_relay.follow(FaultPlan([NotResolved(), Up(60.0)]))
    async with open_tunnel(
        tunnel_relay.url, key=tunnel_relay.key, dial=tunnel_relay.dial, wall_clock=wall_clock
    ) as tunnel:
        status_recorder.watch(tunnel)
        await trio.sleep(3600)
    assert status_recorder.states == [
        "starting",
        "failed/relay_resolve_failed",
        "connected",
        "reconnecting/relay_connect_failed",
        "connected",
        "stopped",
    ]


async def test_the_clock_waits_for_threads(virtual_clock: trio.testing.MockClock, tunnel_relay: MemoryRelay) -> None:
    with trio.fail_after(1):
        await trio.to_thread.run_sync(trio.run, trio.sleep, 0.02)
    assert trio.current_time() == 0


def test_it_costs_nothing_where_it_is_not_used() -> None:
    check = (
        "import pytest_pioneer_tunnel, sys;"
        " print({name.split('.')[0] for name in sys.modules} & {'pioneer_tunnel', 'trio', 'hypothesis', 'attrs'})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_kit_needs_no_test_framework() -> None:
    check = (
        "import sys; sys.modules.update({'pytest': None, '_pytest': None, 'hypothesis': None});"
        " import pioneer_tunnel.testing"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_under_asyncio_it_says_what_to_set(pytester: pytest.Pytester) -> None:
    """pytest-asyncio in auto mode takes the tests and fixtures of every async library."""
    pytest.importorskip("pytest_asyncio")
    pytester.makepyfile(
        """
        import pytest, trio

        @pytest.mark.trio
        async def test_clock(virtual_clock):
            await trio.sleep(60)

        @pytest.mark.trio
        async def test_relay(tunnel_relay):
            await trio.sleep(0)

        @pytest.mark.trio
        async def test_recorder(status_recorder):
            await trio.sleep(0)
        """
    )
    scope = ["-o", "asyncio_default_fixture_loop_scope=function"]  # without it, it warns
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-o", "asyncio_mode=auto", *scope)
    result.assert_outcomes(errors=3)
    said = result.stdout.str()
    for fixture in ("virtual_clock", "tunnel_relay"):
        assert f"the fixture '{fixture}' needs Trio, and asyncio runs this test" in said
    assert 'set asyncio_mode = "strict"' in said
    assert "RunContext" not in said
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-o", "asyncio_mode=strict", *scope)
    result.assert_outcomes(passed=3)


def test_the_guide_is_right_and_a_gateway_that_lies_fails_the_test(pytester: pytest.Pytester) -> None:
    guide = Path(__file__).parents[2] / "docs" / "testing.md"
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), flags=re.DOTALL | re.MULTILINE)
    tests = len(re.findall(r"^(?:async )?def test_", "".join(blocks), flags=re.MULTILINE))
    assert tests > 8
    pytester.makeconftest(
        """
        from hypothesis import settings
        settings.register_profile("few", max_examples=4)
        settings.load_profile("few")
        """
    )
    pytester.makepyfile(test_guide="".join(blocks))
    pytester.makepyfile(
        """
        import pytest, trio

        @pytest.mark.trio
        async def test_lies(virtual_clock, tunnel_relay, status_recorder):
            status_recorder.see({"state": "starting"})
            status_recorder.see({"state": "connected"})
            await trio.sleep(60)

        @pytest.mark.trio
        async def test_breaks_the_contract(status_recorder):
            status_recorder.see({"state": "fine"})
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=tests, failed=2)
    said = result.stdout.str()
    assert re.search(r"StatusUntrue: it showed 'connected' for 5 s, from 0\.000 s on, while no visitor got", said)
    assert "ContractBroken: status: 'state' is 'fine'" in said
