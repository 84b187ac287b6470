"""Switches the fast path off, as on a system without epoll and splice."""

from __future__ import annotations

import pytest

from pioneer_tunnel._net import tcp
from pioneer_tunnel.transports.rathole import data_channels

__all__ = ["fast_path", "switch_fast_path_off"]


def switch_fast_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test: every connection has tasks of its own."""
    monkeypatch.setattr(data_channels, "CAN_WATCH", False)
    monkeypatch.setattr(tcp, "CAN_WATCH", False)


@pytest.fixture(params=["fast path", "no fast path"], autouse=True)
def fast_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test of a module that imports it with the fast path and without."""
    if request.param == "no fast path":
        switch_fast_path_off(monkeypatch)
