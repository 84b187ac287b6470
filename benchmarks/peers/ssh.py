"""OpenSSH: `ssh -R` to an sshd of its own, with keys of their own, as the user that runs this."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ..connections import Endpoint
from ..processes import LOOPBACK, free_port
from ..way import Contestant, Programs, Way
from .pair import pair

__all__ = ["contestants"]

SEPARATION: Final = Path("/run/sshd")
"""An sshd of root wants it. Debian's service makes it; a container may have no services."""


def contestants(_: Programs) -> list[Contestant]:
    absent = [program for program in ("sshd", "ssh", "ssh-keygen") if _program(program) is None]
    return [
        Contestant(
            name="ssh",
            about="`ssh -R` of OpenSSH, which encrypts",
            open=_tunnel,
            missing=f"there is no {absent[0]} (Debian: openssh-server openssh-client)" if absent else None,
            most_streams=1_000,  # more would take minutes: each one asks for all others
        )
    ]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextmanager
def _tunnel(origin: Endpoint) -> Iterator[Way]:
    control, visitors = free_port(), free_port()
    host, port = origin
    sshd, ssh, keygen = (_program(name) or name for name in ("sshd", "ssh", "ssh-keygen"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        for key in ("host", "user"):
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        if os.geteuid() == 0:
            SEPARATION.mkdir(exist_ok=True)
        (folder / "sshd_config").write_text(
            f"""
            ListenAddress {LOOPBACK}:{control}
            HostKey {folder}/host
            AuthorizedKeysFile {folder}/user.pub
            PermitRootLogin prohibit-password
            StrictModes no
            PidFile none
            """
        )
        gateway = [ssh, "-F", "none", "-N", "-T", "-i", str(folder / "user"), "-p", str(control)]
        options = ("StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "ExitOnForwardFailure=yes")
        gateway += [part for option in options for part in ("-o", option)]
        gateway += ["-R", f"{LOOPBACK}:{visitors}:{host}:{port}", f"{getpass.getuser()}@{LOOPBACK}"]
        relay = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
        with pair(folder, relay, gateway, listens=control, visitors=visitors) as way:
            yield way
