"""Which tests judge a mutated module. `[tool.mutmut]` in pyproject.toml names the same modules and tests."""

from __future__ import annotations

from typing import Final

__all__ = ["JUDGES"]

JUDGES: Final = {
    "pioneer_tunnel.tunnel.restart_policy": {"test_restart_policy.py"},
    "pioneer_tunnel.tunnel.supervisor": {"test_supervisor.py", "test_supervisor_model.py"},
    "pioneer_tunnel.yamux.flow": {"test_yamux_flow.py"},
    "pioneer_tunnel.yamux.limits": {"test_yamux_session.py"},
    "pioneer_tunnel.yamux.session": {"test_yamux_session.py"},
}
"""Mutated modules, and the files whose tests have to fail."""
