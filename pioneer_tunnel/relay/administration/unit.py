"""A unit of systemd that runs a relay with few rights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

__all__ = ["is_user", "unit_text"]

_FIRST_FREE_PORT: Final = 1024
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")
_HOMES: Final = ("/home/", "/root/", "/run/user/")

_UNIT: Final = """\
# A relay of pioneer-tunnel. Install it as root:
#   cp pioneer-relay.service /etc/systemd/system/
#   systemctl daemon-reload
#   systemctl enable --now pioneer-relay
[Unit]
Description=Relay of pioneer-tunnel
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
NotifyAccess=all
User={user}
ExecStart={command}
# A successor takes over without refusing a connection:
ExecReload=/bin/kill -USR2 $MAINPID
Restart=on-failure
RestartSec=1
# Visitors may stay for drain_timeout_ms:
TimeoutStopSec=45
# The control socket, which 'pioneer-tunnel relay status' asks:
RuntimeDirectory=pioneer-tunnel
RuntimeDirectoryMode=0700
# For names_file = "/var/lib/pioneer-tunnel/names.json", which wildcards need:
StateDirectory=pioneer-tunnel
StateDirectoryMode=0700
UMask=0077

# The relay opens sockets and reads its files. It needs nothing else.
AmbientCapabilities={capability}
CapabilityBoundingSet={capability}
NoNewPrivileges=yes
ProtectSystem=strict
{writes}ProtectHome={home}
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit_text(*, command: Sequence[str], user: str, port: int, writes: PurePath | None = None) -> str:
    """The unit.

    Args:
        command: what starts the relay, with absolute paths.
        user: as whom it runs.
        port: where it listens; for a port below 1024 it gets the capability for that.
        writes: a folder that it may write; None for none but its own of systemd.
    """
    at_home = any(str(PurePath(word)).startswith(_HOMES) for word in command)
    return _UNIT.format(
        user=user,
        command=" ".join([_quoted(command[0]), *(_quoted(word.replace("$", "$$")) for word in command[1:])]),
        capability="CAP_NET_BIND_SERVICE" if 0 < port < _FIRST_FREE_PORT else "",
        home="read-only" if at_home else "yes",
        writes="" if writes is None else f"ReadWritePaths={_quoted(str(writes))}\n",
    )


def is_user(text: str) -> bool:
    """Whether systemd takes `text` as the name or number of a user."""
    return _USER.fullmatch(text) is not None


def _quoted(word: str) -> str:
    """`word` as systemd reads it back, see systemd.service(5), "Command lines". In the first word, `$` is itself."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if set(word) & set(" \t'\"\\;") else escaped
