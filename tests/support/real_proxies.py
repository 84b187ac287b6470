"""Real proxies, as Debian packages them: tinyproxy and squid for HTTP, microsocks for SOCKS5."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import pytest
from rig import HANG, free_port

__all__ = ["PASSWORD", "PROXIES", "USER", "RealProxy", "missing", "real_proxy"]

USER, PASSWORD = "user", "Sesame0pen"
PROXIES: Final = ("tinyproxy", "squid", "microsocks")


@final
@attrs.frozen
class RealProxy:
    """A proxy that runs.

    Attributes:
        url: its URL.
    """

    url: str
    host: str
    port: int


def missing(name: str) -> str | None:
    """Why this proxy cannot run here; None if it can."""
    if _program(name) is None:
        return f"{name} is not installed: apt-get install {name}"
    if name == "squid" and os.geteuid() != 0:
        return "squid is started by root alone, to become its own user"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextmanager
def real_proxy(
    name: str,
    *,
    authenticates: bool = False,
    host: str = "127.0.0.1",
    within: Sequence[str] = (),
    certificate: bytes | None = None,
) -> Iterator[RealProxy]:
    """Run a proxy.

    Args:
        authenticates: whether it wants `USER` and `PASSWORD`.
        host: where it listens.
        within: the beginning of its command, which moves it to a namespace.
        certificate: PEM, with the private key; squid then speaks TLS.
    """
    why = missing(name)
    if why is not None:
        pytest.skip(why)
    program = _program(name)
    assert program is not None
    port = free_port()
    # squid becomes another user, who cannot read the folders of pytest.
    with tempfile.TemporaryDirectory(prefix="pioneer-tunnel-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        log = place / "log"
        if certificate is not None:
            (place / "proxy.pem").write_bytes(certificate)
        command = _COMMANDS[name](program, place, host, port, authenticates)
        with log.open("wb") as output:
            process = subprocess.Popen([*within, *command], stdout=output, stderr=output, cwd=folder)
        try:
            _wait_until_it_listens(process, host, port, within, log)
            scheme = "socks5" if name == "microsocks" else "http" if certificate is None else "https"
            yield RealProxy(f"{scheme}://{host}:{port}", host, port)
        finally:
            process.terminate()
            try:
                process.wait(HANG)
            finally:
                process.kill()
                process.wait()
                for left in Path("/dev/shm").glob(f"tests{port}-*"):  # squid's
                    left.unlink()


def _wait_until_it_listens(
    process: subprocess.Popen[bytes], host: str, port: int, within: Sequence[str], log: Path
) -> None:
    deadline = time.monotonic() + HANG
    probe = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")
        if within:
            if subprocess.run([*within, "python3", "-c", probe], capture_output=True, check=False).returncode == 0:
                return
        else:
            try:
                socket.create_connection((host, port), 1).close()
            except OSError:
                pass
            else:
                return
        time.sleep(0.05)
    raise AssertionError(f"it does not listen: {log.read_text(errors='replace')}")


def _tinyproxy(program: str, folder: Path, host: str, port: int, authenticates: bool) -> list[str]:
    lines = [f"Port {port}", f"Listen {host}", "Timeout 600", "MaxClients 200", "LogLevel Connect"]
    if authenticates:
        lines.append(f"BasicAuth {USER} {PASSWORD}")
    (folder / "tinyproxy.conf").write_text("\n".join(lines) + "\n")
    return [program, "-d", "-c", str(folder / "tinyproxy.conf")]


def _squid(program: str, folder: Path, host: str, port: int, authenticates: bool) -> list[str]:
    certificate = folder / "proxy.pem"
    lines = [
        f"https_port {host}:{port} tls-cert={certificate}" if certificate.exists() else f"http_port {host}:{port}",
        "pid_filename none",
        "access_log none",
        "cache_log /dev/null",
        "cache_store_log none",
        "cache deny all",
        "memory_cache_shared off",
        "max_filedescriptors 4096",
        "shutdown_lifetime 0",
        "dns_nameservers 127.0.0.1",
        "dns_timeout 1 second",
        "dns_retransmit_interval 1 second",
        "pinger_enable off",
        "visible_hostname proxy.test",
        f"coredump_dir {folder}",
        "acl everything src all",
    ]
    allowed = "everything"
    if authenticates:
        script = folder / "accounts.sh"
        script.write_text(
            "#!/bin/sh\nwhile read -r account; do\n"
            f'if [ "$account" = "{USER} {PASSWORD}" ]; then echo OK; else echo ERR; fi\ndone\n'
        )
        script.chmod(0o755)
        lines += [
            f"auth_param basic program /bin/sh {script}",
            "auth_param basic children 1",
            "acl known proxy_auth REQUIRED",
        ]
        allowed = "known"
    lines += [f"http_access allow {allowed}", "http_access deny all"]
    (folder / "squid.conf").write_text("\n".join(lines) + "\n")
    return [program, "-N", "-d", "1", "-n", f"tests{port}", "-f", str(folder / "squid.conf")]


def _microsocks(program: str, folder: Path, host: str, port: int, authenticates: bool) -> list[str]:
    account = ["-u", USER, "-P", PASSWORD] if authenticates else []
    return [program, "-i", host, "-p", str(port), *account]


_COMMANDS: Final = {"tinyproxy": _tinyproxy, "squid": _squid, "microsocks": _microsocks}
