"""What the tests of `[gateway.remote_access]` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from pioneer_tunnel._model.errors import Problem, TunnelError
from pioneer_tunnel.gateway.config import RemoteAccessConfig

PIN = "ed25519:baca518277e2b9795625c0a999024608cd40d4119d7ce804a484ee582f5d5953"
KEYS = [field.name for field in attrs.fields(RemoteAccessConfig) if field.name != "base_dir"]


def refused(**given: Any) -> tuple[Problem, ...]:
    """The problems of a config made with keywords."""
    with pytest.raises(TunnelError) as error:
        RemoteAccessConfig(**given)
    return error.value.problems


def complaint_of(make: Callable[[Any], object], given: object) -> TunnelError | None:
    """The `TunnelError` that `make` raises, if it does."""
    try:
        make(given)
    except TunnelError as error:
        return error
    return None


def write(folder: Path, text: str | bytes) -> Path:
    """A configuration file with this text."""
    path = folder / "gateway.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
