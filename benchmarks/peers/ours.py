"""This project: `pioneer-tunnel relay` and `pioneer-tunnel expose`, over a link of any kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from pioneer_tunnel import Limits, new_relay_key
from pioneer_tunnel.websocket import EngineName

from ..connections import HOST, Endpoint
from ..processes import LOOPBACK, free_port
from ..way import Contestant, Programs, Way
from .certificates import certify
from .pair import pair

__all__ = ["COMMAND", "EXPOSED", "contestants", "counted"]

COMMAND: Final = (sys.executable, "-m", "pioneer_tunnel")
COMPILED: Final = Path("build/compiled/source").absolute()
"""Where `make compiled` leaves a copy of this checkout with a compiled data path."""
EXPOSED: Final = Limits().streams
"""How many visitors `pioneer-tunnel expose` takes at a time."""
TLS_LINES: Final = 'tls_certificate = "relay.crt"\ntls_private_key = "relay.key"\ningress_tls = false'


def contestants(_: Programs) -> list[Contestant]:
    kinds: tuple[tuple[str, EngineName, bool, str], ...] = (
        ("ws", "websockets", False, "this project, over ws, with the extra `speed`"),
        ("ws-trio", "trio-websocket", False, "this project, over ws, with trio-websocket alone"),
        ("wss", "websockets", True, "this project, over wss, with `speed`; visitors come without TLS"),
        ("wss-trio", "trio-websocket", True, "this project, over wss, with trio-websocket alone"),
    )
    many_streams = (sys.executable, "-m", f"{__package__}.many_streams")
    compiled = ("env", f"PYTHONPATH={COMPILED}", *COMMAND)
    return [
        *(
            Contestant(name=name, about=about, open=partial(_tunnel, engine=engine, tls=tls), most_streams=EXPOSED)
            for name, engine, tls, about in kinds
        ),
        Contestant(
            name="ws-compiled",
            about="as `ws`, with a compiled data path",
            open=partial(_tunnel, engine="websockets", command=compiled),
            missing=None if COMPILED.exists() else "`make compiled` was not run",
            most_streams=EXPOSED,
        ),
        Contestant(
            name="ws-many",
            about=f"as `ws`, with a gateway that takes more than {EXPOSED:,} visitors at a time",
            open=partial(_tunnel, engine="websockets", command=many_streams),
            groups=("idle", "streams"),
        ),
    ]


def counted(origin: Endpoint, folder: Path, *, preload: Path | None = None) -> AbstractContextManager[Way]:
    """The tunnel of `ws`, by programs that count and write to `folder`; see counted.py. `preload` is a library."""
    loader = () if preload is None else ("env", f"LD_PRELOAD={preload}")
    command = (*loader, sys.executable, "-m", "benchmarks.counted", str(folder))
    return _tunnel(origin, engine="websockets", command=command)


@contextmanager
def _tunnel(
    origin: Endpoint, *, engine: EngineName, tls: bool = False, command: Sequence[str] = COMMAND
) -> Iterator[Way]:
    """A relay and an exposed origin. With `tls` the link is wss; visitors come without TLS in any case."""
    key = new_relay_key()
    control, visitors = free_port(), free_port()
    with TemporaryDirectory() as name:
        folder = Path(name)
        if tls:
            certify(folder, LOOPBACK)
        key_file = folder / "key"
        key_file.touch(mode=0o600)
        key_file.write_text(key.reveal())
        (folder / "relay.toml").write_text(
            f"""
            [relay]
            id = "bench"
            control_addr = "{LOOPBACK}:{control}"
            ingress_addr = "{LOOPBACK}:{visitors}"
            public_names = ["{LOOPBACK}:{control}"]
            {TLS_LINES if tls else ""}

            [relay.limits]
            connections = 100000
            streams_per_tunnel = 100000
            opens_per_second_per_tunnel = 100000

            [[relay.tunnels]]
            id = "bench"
            url = "http://{HOST}"
            key = "{key.identity().public_key}"
            """
        )
        host, port = origin
        relay = [*command, "relay", "--config", "relay.toml", "--websocket-engine", engine]
        expose = [*command, "expose", f"{host}:{port}", "--relay", f"{'wss' if tls else 'ws'}://{LOOPBACK}:{control}"]
        expose += ["--key-file", "key", "--websocket-engine", engine, *(["--ca-file", "ca.pem"] if tls else [])]
        with pair(folder, relay, expose, listens=control, visitors=visitors, reconnects=True) as way:
            yield way
