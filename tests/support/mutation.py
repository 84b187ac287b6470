"""Which tests judge a mutated module. `[tool.mutmut]` in pyproject.toml names the same modules and tests."""

from __future__ import annotations

from typing import Final

__all__ = ["JUDGES"]

_OF_SUPERVISION: Final = {"test_supervisor.py", "test_supervisor_model.py", "test_links_model.py"}

JUDGES: Final = {
    "pioneer_tunnel.tunnel.link": _OF_SUPERVISION,
    "pioneer_tunnel.tunnel.relay_choice": {"test_links_model.py"},
    "pioneer_tunnel.tunnel.restart_policy": {"test_restart_policy.py"},
    "pioneer_tunnel.tunnel.standing": _OF_SUPERVISION,
    "pioneer_tunnel.tunnel.supervisor": _OF_SUPERVISION,
    "pioneer_tunnel.yamux.flow": {"test_yamux_flow.py"},
    "pioneer_tunnel._model.session_limits": {"test_yamux_session.py"},
    "pioneer_tunnel.yamux.session": {"test_yamux_session.py"},
}
"""Mutated modules, and the files whose tests have to fail."""
