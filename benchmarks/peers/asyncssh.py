"""asyncssh, of PyPI: `ssh -R` in Python, for both ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ..connections import Endpoint
from ..processes import free_port
from ..way import Contestant, Programs, Way
from .pair import pair

__all__ = ["contestants"]


def contestants(_: Programs) -> list[Contestant]:
    return [
        Contestant(
            name="asyncssh",
            about="the Python package `asyncssh`: as `ssh -R`, on asyncio",
            open=_tunnel,
            missing=None if find_spec("asyncssh") else "it is not installed (the extra `bench`)",
            most_streams=1_000,  # more would take minutes
        )
    ]


@contextmanager
def _tunnel(origin: Endpoint) -> Iterator[Way]:
    control, visitors = free_port(), free_port()
    with TemporaryDirectory() as name:
        told = json.dumps({"control": control, "visitors": visitors, "origin": origin, "folder": name})
        command = [sys.executable, "-m", f"{__package__}.asyncssh_program"]
        relay, gateway = ([*command, side, told] for side in ("relay", "gateway"))
        with pair(Path(name), relay, gateway, listens=control, visitors=visitors, cwd=Path()) as way:
            yield way
