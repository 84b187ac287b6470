"""Types as users see them: pyright finds every public name completely typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.slow

PYRIGHT: Final = Path(__file__).parent / "interop" / "node_modules" / ".bin" / "pyright"
PUBLIC: Final = (
    "pioneer_tunnel",
    "pioneer_tunnel.aio",
    "pioneer_tunnel.asgi",
    "pioneer_tunnel.blocking",
    "pioneer_tunnel.relay",
    "pioneer_tunnel.testing",
    "pioneer_tunnel.testing.strategies",
)


@pytest.mark.skipif(not PYRIGHT.exists(), reason="npm could not install pyright")
def test_every_public_name_has_complete_types(tmp_path: Path) -> None:
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    # Not in this checkout: there, pyright takes the package for one of the user's own files.
    found = subprocess.run(
        [PYRIGHT, "--verifytypes", "pioneer_tunnel", "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    symbols = json.loads(found.stdout)["typeCompleteness"]["symbols"]
    assert "pioneer_tunnel.open_tunnel" in {symbol["name"] for symbol in symbols}
    incomplete = [
        symbol["name"]
        for symbol in symbols
        if symbol["name"].rpartition(".")[0] in PUBLIC and not symbol["isTypeKnown"]
    ]
    assert incomplete == []
