"""A deprecated name still works, and says to its caller what to use instead."""

from __future__ import annotations

import pytest

from pioneer_tunnel import PioneerTunnelDeprecationWarning, open_tunnel
from pioneer_tunnel.testing import MemoryRelay


async def test_the_warning_names_the_caller_and_what_to_use(tunnel_relay: MemoryRelay) -> None:
    async with open_tunnel(tunnel_relay.url, key=tunnel_relay.key, dial=tunnel_relay.dial) as tunnel:
        await tunnel.wait_connected()
        async with await tunnel_relay.visit(), await tunnel.accept() as stream:
            with pytest.warns(PioneerTunnelDeprecationWarning, match="use TunnelStream.wait_flushed") as seen:
                await stream.drain()
            assert seen[0].filename == __file__
