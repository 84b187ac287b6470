"""A Go tunnel of the shape of this project: hashicorp/yamux over one gorilla WebSocket, in gotun/main.go.

It has no authentication, routing, limits or reconnecting, and so it shows what the shape costs. It is built with the
Debian packages golang-go, golang-github-hashicorp-yamux-dev and golang-github-gorilla-websocket-dev, or with what is in
the GOPATH of this process, such as clones of newer versions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ..connections import Endpoint
from ..processes import LOOPBACK, free_port
from ..way import Contestant, Programs, Way
from .pair import pair

__all__ = ["contestants"]

SOURCE: Final = Path(__file__).with_name("gotun") / "main.go"
GOPATH: Final = "/usr/share/gocode"
PACKAGES: Final = ("github.com/hashicorp/yamux", "github.com/gorilla/websocket")


def contestants(programs: Programs) -> list[Contestant]:
    return [
        Contestant(
            name="gotun",
            about="a Go tunnel of the same shape: yamux over one WebSocket, and nothing else",
            open=partial(_tunnel, program=programs.find("gotun")),
            missing=None if programs.find("gotun") else _missing(),
        )
    ]


def _gopath() -> str:
    return os.environ.get("GOPATH", GOPATH)


def _missing() -> str | None:
    remedy = "Debian: golang-go golang-github-hashicorp-yamux-dev golang-github-gorilla-websocket-dev"
    if shutil.which("go") is None:
        return f"there is no go ({remedy})"
    folders = [Path(folder, "src") for folder in _gopath().split(os.pathsep)]
    absent = [package for package in PACKAGES if not any((folder / package).is_dir() for folder in folders)]
    return f"Go has no {' and no '.join(absent)} ({remedy})" if absent else None


@contextmanager
def _tunnel(origin: Endpoint, *, program: Path | None) -> Iterator[Way]:
    control, visitors = f"{LOOPBACK}:{free_port()}", free_port()
    host, port = origin
    with TemporaryDirectory() as name:
        folder = Path(name)
        if program is None:
            program = folder / "gotun"
            environment = os.environ | {"GO111MODULE": "off", "GOPATH": _gopath()}
            subprocess.run(["go", "build", "-o", program, SOURCE.name], cwd=SOURCE.parent, env=environment, check=True)
        relay = [str(program), "server", "-ws", "-mux", control, "-public", f"{LOOPBACK}:{visitors}"]
        gateway = [str(program), "client", "-ws", "-mux", control, "-origin", f"{host}:{port}"]
        with pair(folder, relay, gateway, listens=visitors, visitors=visitors) as way:
            yield way
