"""chisel: SSH, which encrypts, over one WebSocket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..connections import Endpoint
from ..processes import LOOPBACK, free_port
from ..way import Contestant, Programs, Way
from .pair import pair

__all__ = ["contestants"]


def contestants(programs: Programs) -> list[Contestant]:
    return [
        Contestant(
            name="chisel",
            about="SSH over one WebSocket",
            open=partial(_tunnel, program=programs.find("chisel") or Path()),
            missing=programs.missing("chisel", "benchmarks/peers/build_chisel.sh builds it"),
        )
    ]


@contextmanager
def _tunnel(origin: Endpoint, *, program: Path) -> Iterator[Way]:
    control, visitors = free_port(), free_port()
    host, port = origin
    with TemporaryDirectory() as name:
        relay = [str(program), "server", "--reverse", "--host", LOOPBACK, "--port", str(control)]
        gateway = [str(program), "client", f"http://{LOOPBACK}:{control}", f"R:{LOOPBACK}:{visitors}:{host}:{port}"]
        with pair(Path(name), relay, gateway, listens=control, visitors=visitors, reconnects=True) as way:
            yield way
