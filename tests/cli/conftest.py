"""No test of the command line sees the developer's own client file or variables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, which is empty."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    for name in [*os.environ]:
        if name == "NO_COLOR" or (name.startswith("PIONEER_TUNNEL_") and "TEST" not in name):
            monkeypatch.delenv(name)
    return folder
