"""Which tests judge a mutated module. `[tool.mutmut]` in pyproject.toml names the same modules and tests."""

from __future__ import annotations

from typing import Final

__all__ = ["JUDGES"]

_OF_SUPERVISION: Final = {
    "test_links_model.py",
    "test_supervisor.py",
    "test_supervisor_links.py",
    "test_supervisor_local_gateway.py",
    "test_supervisor_model.py",
    "test_supervisor_restarts.py",
}
_OF_YAMUX: Final = {
    "test_yamux_session_credit.py",
    "test_yamux_session_ends.py",
    "test_yamux_session_openings.py",
    "test_yamux_session_rules.py",
    "test_yamux_session_turns.py",
    "test_yamux_two_sessions.py",
}

JUDGES: Final = {
    "pioneer_tunnel.tunnel.link": _OF_SUPERVISION,
    "pioneer_tunnel.tunnel.relay_choice": {"test_links_model.py"},
    "pioneer_tunnel.tunnel.restart_policy": {"test_restart_policy.py"},
    "pioneer_tunnel.tunnel.standing": _OF_SUPERVISION,
    "pioneer_tunnel.tunnel.supervisor": _OF_SUPERVISION,
    "pioneer_tunnel.yamux.flow": {"test_yamux_flow.py"},
    "pioneer_tunnel._model.session_limits": _OF_YAMUX,
    "pioneer_tunnel.yamux.session": _OF_YAMUX,
}
"""Mutated modules, and the files whose tests have to fail."""
