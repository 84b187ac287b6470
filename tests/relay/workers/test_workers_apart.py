"""A relay without workers has nothing to do with them."""

from __future__ import annotations

import subprocess
import sys

import trio
import trio.testing

from pioneer_tunnel.relay.gateways.expected import HOLD, PATIENCE, Expected


def test_a_relay_without_workers_imports_none_of_them() -> None:
    program = (
        "import sys, pioneer_tunnel.relay, pioneer_tunnel.cli.commands, pioneer_tunnel.cli.relay_process;"
        " print([name for name in sys.modules if 'workers' in name and 'pioneer_tunnel.relay' in name])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert found.stdout == "[]\n"


async def test_tunnels_that_are_expected_later(autojump_clock: trio.testing.MockClock) -> None:
    """A worker has ended, and another one after it."""
    del autojump_clock
    expected = Expected(["first"])
    expected.begin()
    expected.add(["second"])
    assert {*expected.missing} == {"first", "second"}
    began = trio.current_time()
    assert not await expected.wait("third")
    assert trio.current_time() == began, "nobody expects it"
    assert await expected.wait("second")
    assert trio.current_time() == began + HOLD
    expected.has_come("second")
    assert not await expected.wait("second")
    await trio.sleep(PATIENCE)
    assert not expected.missing
    expected.add(["third"])
    assert {*expected.missing} == {"third"}, "the first one has not come in its time"
    async with trio.open_nursery() as nursery:

        async def come() -> None:
            await trio.sleep(1)
            expected.has_come("third")

        nursery.start_soon(come)
        began = trio.current_time()
        assert await expected.wait("third")
        assert trio.current_time() == began + 1
