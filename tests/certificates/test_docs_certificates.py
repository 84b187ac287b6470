"""The five minutes of docs/certificates.md, typed in terminals. Only the ports are others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from documents import DOCS, Block, blocks, commands_of, section_of
from pebble import missing
from rig import HANG, echo, eventually, free_port, no_hang, wait_until

from pioneer_tunnel import AcmeConfig, RelayKey, open_tunnel, terminate_tls

PAGE: Final = DOCS / "certificates.md"
PORTS: Final = re.compile(r"(?<=[ :])(?:7300|5443|5080|14000|15000|8053|8055|8000)\b")
ENVIRONMENT: Final = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.skipif(None in map(shutil.which, ("bash", "curl", "openssl")), reason="needs bash, curl and openssl"),
]


@contextmanager
def terminal(script: str, folder: Path) -> Iterator[Path]:
    """Run a command that goes on; yields the file of what it prints."""
    log = folder / f"terminal-{len([*folder.iterdir()])}.log"
    command = ["bash", "-ec", f"exec {script}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        yield log
    finally:
        process.terminate()
        process.wait(HANG)


def run(script: str, folder: Path) -> str:
    """What commands print; what fails prints less."""
    command = ["bash", "-ec", script]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, check=False, timeout=HANG)
    return done.stdout.decode()


def test_the_five_minutes(tmp_path: Path) -> None:
    section = section_of(PAGE, "Try it in five minutes")
    ports = {port: str(free_port()) for port in sorted({*PORTS.findall(section)})}

    def typed(block: Block) -> str:
        text = block.text if block.language == "toml" else "\n".join(commands_of(block))
        return PORTS.sub(lambda port: ports[port[0]], text)

    written = [typed(block) for block in blocks(PAGE) if block.text in section]
    _install, files, dns, authority, key, config, relay, expose, local, visit, passed = written
    run(files, tmp_path)
    config = config.replace("ed25519:…", run(key, tmp_path).strip())
    (tmp_path / "relay.toml").write_text(config)
    with ExitStack() as stack:
        for script in (dns, authority):
            stack.enter_context(terminal(script, tmp_path))
        said = stack.enter_context(terminal(relay, tmp_path))
        stack.enter_context(terminal(local, tmp_path))
        with terminal(expose, tmp_path) as gateway:
            wait_until(lambda: "visitors come in at https://office.localhost" in gateway.read_text())
            wait_until(lambda: "there is a new certificate for office.localhost" in said.read_text())
            wait_until(lambda: "relay.toml" in run(visit, tmp_path))
        url = f'url = "https://office.localhost:{ports["5443"]}"'
        (tmp_path / "relay.toml").write_text(config.replace(url, f'{url}\ntls = "passthrough"'))
        wait_until(lambda: "changes of tunnels: changed 'office'" in said.read_text())
        with terminal(passed, tmp_path) as gateway:
            wait_until(lambda: "there is a new certificate for office.localhost" in gateway.read_text())
            assert "relay.toml" in run(visit, tmp_path)
        assert [*(tmp_path / "certificates-of-the-gateway").glob("*/certificates/office.localhost.pem")]
        trio.run(the_program, tmp_path, ports)


async def the_program(folder: Path, ports: dict[str, str]) -> None:
    """The program of the page, with the authority of the five minutes."""
    (program,) = blocks(PAGE, language="python")
    text = program.text.replace("wss://relay.example.com", f"ws://127.0.0.1:{ports['7300']}")
    text = text.replace(
        "AcmeConfig(", "AcmeConfig(directory=directory, ca_file=folder / 'web.crt', folder=folder / 'c', "
    )
    assert "ca_file" in text
    names: dict[str, Any] = {
        "AcmeConfig": AcmeConfig,
        "directory": f"https://localhost:{ports['14000']}/dir",
        "folder": folder,
        "handler": echo,
        "key": RelayKey((folder / "relay-key.txt").read_text().splitlines()[0]),
        "open_tunnel": open_tunnel,
        "terminate_tls": terminate_tls,
        "trio": trio,
    }
    exec(f"async def program():\n{textwrap.indent(text, '    ')}", names)
    with no_hang():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(names["program"])
            await eventually(lambda: [*(folder / "c").glob("*/certificates/office.localhost.pem")])
            nursery.cancel_scope.cancel()
