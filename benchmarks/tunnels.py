"""Who runs: an origin, and tunnels to it, as real processes that end with the `with` that started them.

What a process costs is read from /proc, so this is for Linux.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Final, Literal, TypeAlias, final

import attrs
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from pioneer_tunnel import new_relay_key
from pioneer_tunnel.websocket import EngineName

from .traffic import HOST, Endpoint, dial_echo

__all__ = [
    "PROCESSES",
    "Contestant",
    "Process",
    "Way",
    "contestants",
    "counted_tunnel",
    "peer",
    "rathole_contestants",
    "start_origin",
]

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT: Final = 20.0
STOP_TIMEOUT: Final = 10.0
PROCESSES: Final = ("relay", "gateway")
OURS: Final = (sys.executable, "-m", "pioneer_tunnel")
TLS_LINES: Final = 'tls_certificate = "relay.crt"\ntls_private_key = "relay.key"\ningress_tls = false'
RATHOLE_HOST: Final = "localhost"
"""What its server is dialled by: the client of rathole checks no certificate for an address."""


@final
@attrs.frozen
class Process:
    """What a running process has cost so far."""

    pid: int

    @property
    def cpu(self) -> float:
        """Seconds, user and system, of all its threads."""
        # Its second field, the name, stands in brackets and may hold anything.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> float:
        """MiB that are resident."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@final
@attrs.frozen
class Way:
    """A way to the origin that is open now, and the processes that carry it, by the names in `PROCESSES`."""

    endpoint: Endpoint
    processes: dict[str, Process] = attrs.field(factory=dict)


Contestant: TypeAlias = Callable[[], AbstractContextManager[Way]]


def contestants(origin: Endpoint) -> dict[str, Contestant]:
    """All ways to `origin` that this project can open, by name. `direct` is the one that others are compared with.

    The peer `snitun` is among them where its package is installed.
    """
    ways: dict[str, Contestant] = {
        "direct": lambda: nullcontext(Way(origin)),
        "websockets": partial(_tunnel, origin, "websockets"),
        "trio-websocket": partial(_tunnel, origin, "trio-websocket"),
        "wss": partial(_tunnel, origin, "websockets", tls=True),
    }
    if find_spec("snitun") is not None:
        ways["snitun"] = partial(_snitun, origin)
    return ways


def rathole_contestants(origin: Endpoint, program: Path) -> dict[str, Contestant]:
    """Ways to `origin` through the server of rathole, which `program` is: with its own client, and with ours."""
    return {
        f"{client}-{transport}": partial(_rathole_tunnel, origin, program, client, transport)
        for transport in ("tcp", "tls")
        for client in ("rathole", "ours")
    }


def counted_tunnel(origin: Endpoint, folder: Path) -> AbstractContextManager[Way]:
    """The tunnel of `websockets`, by programs that count and write to `folder`; see counted.py."""
    return _tunnel(origin, "websockets", command=(sys.executable, "-m", f"{__package__}.counted", str(folder)))


def peer(text: str) -> tuple[str, Contestant]:
    """Somebody else's tunnel, which runs already, from `NAME=HOST:PORT:PID,PID`.

    Raises:
        ValueError: `text` is not of that form.
    """
    name, equals, rest = text.partition("=")
    host, port, *pids = rest.split(":")
    if not (name and equals) or len(pids) > 1:
        raise ValueError(text)
    processes = [Process(int(pid)) for pid in ",".join(pids).split(",") if pid]
    way = Way((host, int(port)), dict(zip(PROCESSES, processes, strict=False)))
    return name, lambda: nullcontext(way)


@contextmanager
def start_origin(port: int) -> Iterator[Endpoint]:
    """The origin, at `port` or at a free one for 0."""
    command = [sys.executable, "-m", f"{__package__}.traffic", str(port)]
    with _ended(Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        yield LOOPBACK, int(process.stdout.readline())


@contextmanager
def _tunnel(origin: Endpoint, engine: EngineName, *, tls: bool = False, command: Sequence[str] = OURS) -> Iterator[Way]:
    """A relay and an exposed origin. With `tls` the link is wss; visitors come without TLS in any case."""
    key = new_relay_key()
    control, ingress = (f"{LOOPBACK}:{_free_port()}" for _ in range(2))
    with TemporaryDirectory() as name:
        folder = Path(name)
        if tls:
            _certify(folder, LOOPBACK)
        key_file = folder / "key"
        key_file.touch(mode=0o600)
        key_file.write_text(key.reveal())
        (folder / "relay.toml").write_text(
            f"""
            [relay]
            id = "bench"
            control_addr = "{control}"
            ingress_addr = "{ingress}"
            public_names = ["{control}"]
            {TLS_LINES if tls else ""}

            [[relay.tunnels]]
            id = "bench"
            url = "http://{HOST}"
            key = "{key.identity().public_key}"
            """
        )
        host, port = origin
        relay = [*command, "relay", "--config", "relay.toml", "--websocket-engine", engine]
        expose = [*command, "expose", f"{host}:{port}", "--relay", f"{'wss' if tls else 'ws'}://{control}"]
        expose += ["--key-file", "key", "--websocket-engine", engine, *(["--ca-file", "ca.pem"] if tls else [])]
        with _program(folder, "relay", relay) as first, _program(folder, "expose", expose) as second:
            endpoint = (LOOPBACK, int(ingress.rpartition(":")[2]))
            _wait_until_open(endpoint, folder, first, second)
            yield Way(endpoint, dict(zip(PROCESSES, (Process(first.pid), Process(second.pid)), strict=True)))


@contextmanager
def _snitun(origin: Endpoint) -> Iterator[Way]:
    """A relay and a gateway of snitun. Its link is TCP, and encrypts only the headers of its frames."""
    control, visitors = _free_port(), _free_port()
    told = {"control": control, "visitors": visitors, "origin": origin, "fernet": Fernet.generate_key().decode()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "told.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps({**told, "key": os.urandom(32).hex(), "iv": os.urandom(16).hex()}))
        command = [sys.executable, "-m", f"{__package__}.snitun_peer"]
        with _program(folder, "relay", [*command, "relay", str(file)], Path()) as first:
            _wait_until_listening((LOOPBACK, control), folder, first)
            with _program(folder, "expose", [*command, "gateway", str(file)], Path()) as second:
                endpoint = (LOOPBACK, visitors)
                _wait_until_open(endpoint, folder, first, second)
                yield Way(endpoint, dict(zip(PROCESSES, (Process(first.pid), Process(second.pid)), strict=True)))


@contextmanager
def _rathole_tunnel(
    origin: Endpoint, program: Path, client: Literal["rathole", "ours"], transport: Literal["tcp", "tls"]
) -> Iterator[Way]:
    """A server of rathole, and as its client either its own or `pioneer-tunnel expose`."""
    control, visitors, key = _free_port(), _free_port(), new_relay_key().reveal()
    host, port = origin
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_text(key)
        tls = transport == "tls"
        if tls:
            _certify(folder, RATHOLE_HOST)
            _make_pkcs12(folder)
        (folder / "server.toml").write_text(
            f"""
            [server]
            bind_addr = "{LOOPBACK}:{control}"
            default_token = "{key}"
            [server.services.bench]
            bind_addr = "{LOOPBACK}:{visitors}"
            [server.transport]
            type = "{transport}"
            {"[server.transport.tls]" if tls else ""}
            {'pkcs12 = "relay.p12"' if tls else ""}
            {'pkcs12_password = "bench"' if tls else ""}
            """
        )
        (folder / "client.toml").write_text(
            f"""
            [client]
            remote_addr = "{RATHOLE_HOST}:{control}"
            default_token = "{key}"
            [client.services.bench]
            local_addr = "{host}:{port}"
            [client.transport]
            type = "{transport}"
            {"[client.transport.tls]" if tls else ""}
            {'trusted_root = "ca.pem"' if tls else ""}
            """
        )
        gateway = [str(program), "--client", "client.toml"]
        if client == "ours":
            gateway = [*OURS, "expose", f"{host}:{port}", "--relay", f"{RATHOLE_HOST}:{control}"]
            gateway += ["--transport", transport, "--key-mode", "rathole", "--service", "bench", "--key-file", "key"]
            gateway += ["--ca-file", "ca.pem"] if tls else []
        relay = [str(program), "--server", "server.toml"]
        with _program(folder, "relay", relay) as first:
            _wait_until_listening((LOOPBACK, control), folder, first)
            with _program(folder, "expose", gateway) as second:
                endpoint = (LOOPBACK, visitors)
                _wait_until_open(endpoint, folder, first, second)
                yield Way(endpoint, dict(zip(PROCESSES, (Process(first.pid), Process(second.pid)), strict=True)))


def _certify(folder: Path, name: str) -> None:
    """Make `relay.crt` and `relay.key` for a relay of that name, and the `ca.pem` that vouches for them."""
    import trustme  # only who races with TLS needs it

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert(name)
    certificate.cert_chain_pems[0].write_to_path(str(folder / "relay.crt"))
    certificate.private_key_pem.write_to_path(str(folder / "relay.key"))


def _make_pkcs12(folder: Path) -> None:
    """The same pair in the form that rathole's server takes."""
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
    from cryptography.x509 import load_pem_x509_certificate

    private_key = load_pem_private_key((folder / "relay.key").read_bytes(), None)
    certificate = load_pem_x509_certificate((folder / "relay.crt").read_bytes())
    assert isinstance(private_key, EllipticCurvePrivateKey)
    bundle = pkcs12.serialize_key_and_certificates(
        b"relay", private_key, certificate, None, BestAvailableEncryption(b"bench")
    )
    (folder / "relay.p12").write_bytes(bundle)


@contextmanager
def _program(folder: Path, name: str, command: list[str], cwd: Path | None = None) -> Iterator[Popen[str]]:
    """Run `command` in `folder`, or in `cwd`."""
    with (folder / f"{name}.log").open("w") as log:
        process = Popen(command, cwd=cwd or folder, stdout=log, stderr=log, text=True)
    with _ended(process):
        yield process


@contextmanager
def _ended(process: Popen[str]) -> Iterator[Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_open(endpoint: Endpoint, folder: Path, *programs: Popen[str]) -> None:
    _wait_until(lambda: dial_echo(endpoint).close(), folder, *programs)


def _wait_until_listening(endpoint: Endpoint, folder: Path, program: Popen[str]) -> None:
    _wait_until(lambda: socket.create_connection(endpoint).close(), folder, program)


def _wait_until(works: Callable[[], None], folder: Path, *programs: Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return works()
        except OSError:
            time.sleep(0.05)
        if time.monotonic() > deadline or any(program.poll() is not None for program in programs):
            logs = "\n".join(log.read_text() for log in folder.glob("*.log"))
            raise SystemExit(f"the tunnel does not come up\n{logs}")


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
