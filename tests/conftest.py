"""What tests of several rooms are given."""

from __future__ import annotations

import pytest

from pioneer_tunnel.websocket import ENGINES, EngineName


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    """Each WebSocket engine that is installed, one after the other."""
    name: EngineName = request.param
    return name
