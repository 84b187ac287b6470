"""nginx as a reverse proxy in front of the origin: no tunnel, but what a good one may cost for HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..connections import Endpoint
from ..processes import LOOPBACK, free_port, running, wait_until_listening
from ..way import Contestant, Programs, Way

__all__ = ["contestants"]


def contestants(programs: Programs) -> list[Contestant]:
    return [
        Contestant(
            name="nginx",
            about="nginx as a reverse proxy: no tunnel, and HTTP only",
            open=partial(_proxy, program=programs.find("nginx") or Path()),
            missing=programs.missing("nginx", "Debian: nginx"),
            groups=("http",),
        )
    ]


@contextmanager
def _proxy(origin: Endpoint, *, program: Path) -> Iterator[Way]:
    visitors = free_port()
    host, port = origin
    with TemporaryDirectory() as name:
        folder = Path(name)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (folder / "nginx.conf").write_text(
            f"""
            daemon off;
            pid nginx.pid;
            worker_processes auto;
            events {{ worker_connections 4096; }}
            http {{
                access_log off;
                {" ".join(f"{kind}_temp_path {kind};" for kind in kinds)}
                keepalive_requests 1000000000;
                upstream origin {{
                    server {host}:{port};
                    keepalive 256;
                    keepalive_requests 1000000000;
                }}
                server {{
                    listen {LOOPBACK}:{visitors} backlog=4096;
                    location / {{
                        proxy_pass http://origin;
                        proxy_http_version 1.1;
                        proxy_set_header Connection "";
                    }}
                }}
            }}
            """
        )
        command = [str(program), "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"]
        with running(folder, "nginx", command) as proxy:
            wait_until_listening(visitors, proxy)
            yield Way(endpoint=(LOOPBACK, visitors), processes={"relay": proxy.process})
