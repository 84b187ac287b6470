"""snitun, of PyPI: asyncio, its own multiplexer over TCP, and the headers of its frames are encrypted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.fernet import Fernet

from ..connections import Endpoint
from ..processes import free_port
from ..way import Contestant, Programs, Way
from .pair import pair

__all__ = ["contestants"]


def contestants(_: Programs) -> list[Contestant]:
    return [
        Contestant(
            name="snitun",
            about="the Python package `snitun`: asyncio, and the headers of its frames are encrypted",
            open=_tunnel,
            missing=None if find_spec("snitun") else "it is not installed (the extra `bench`)",
        )
    ]


@contextmanager
def _tunnel(origin: Endpoint) -> Iterator[Way]:
    control, visitors = free_port(), free_port()
    told = {"control": control, "visitors": visitors, "origin": origin, "fernet": Fernet.generate_key().decode()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "told.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps({**told, "key": os.urandom(32).hex(), "iv": os.urandom(16).hex()}))
        command = [sys.executable, "-m", f"{__package__}.snitun_program"]
        relay, gateway = ([*command, side, str(file)] for side in ("relay", "gateway"))
        with pair(folder, relay, gateway, listens=control, visitors=visitors, cwd=Path()) as way:
            yield way
