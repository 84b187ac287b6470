"""What is wrong with a relay's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from pioneer_tunnel._model.errors import InvalidSettingsError, Problem
from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel.relay.config import RelayConfig


def key(number: int) -> str:
    return str(SigningIdentity.from_seed(bytes([number]) * 32).public_key)


def tunnel(number: int, **other: Any) -> dict[str, Any]:
    """The table of a tunnel that is like no other number's."""
    return {"id": f"t{number}", "url": f"https://t{number}.example", "key": key(number), **other}


def relay(*tunnels: dict[str, Any], **other: Any) -> dict[str, Any]:
    """The table of a relay."""
    table = {
        "control_addr": "0.0.0.0:8443",
        "ingress_addr": "[::]:443",
        "id": "relay-1",
        "public_names": ["relay.example"],
        **other,
    }
    return {**table, "tunnels": list(tunnels)} if tunnels else table


def problems_of(table: Any) -> tuple[Problem, ...]:
    with pytest.raises(InvalidSettingsError) as error:
        RelayConfig.from_table(table, source="relay.toml")
    assert str(error.value).count("\n") == (len(error.value.problems) if len(error.value.problems) > 1 else 0)
    return error.value.problems


def only_problem_of(table: Any) -> Problem:
    (problem,) = problems_of(table)
    return problem
