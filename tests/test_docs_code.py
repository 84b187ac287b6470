"""Every code block of the documents is run, or read by what reads it in the end.

- Python runs, here or in the test that `RUN_ELSEWHERE` names.
- TOML is loaded as the configuration of a gateway or a relay, or as the client file of `expose`.
- Commands are parsed by the command line, or by what else they call.
- The five minutes of README.md are spent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import queue
import re
import shutil
import signal
import ssl
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import pytest
import trio
import trio.testing
import trustme
from documents import DOCS, ROOT, Block, blocks, commands_of, section_of, words_of
from example_programs import GREETING, relay, running
from rig import connect, eventually, free_port, no_hang, read_all

import pioneer_tunnel
from pioneer_tunnel import RemoteAccessConfig, State, aio, asgi, blocking, new_relay_key
from pioneer_tunnel.cli import relay_options
from pioneer_tunnel.cli.client_file import read_client_file
from pioneer_tunnel.cli.commands import pioneer_tunnel as command_line
from pioneer_tunnel.cli.expose import expose
from pioneer_tunnel.relay import RelayConfig
from pioneer_tunnel.relay.administration.fleet_file import FleetFile
from pioneer_tunnel.testing import ScriptedTransport, open_memory_relay

README: Final = ROOT / "README.md"
TRANSPORT: Final = DOCS / "writing-a-transport.md"
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN: Final = {name: getattr(pioneer_tunnel, name) for name in pioneer_tunnel.__all__}
KEY: Final = pioneer_tunnel.RelayKey("ptk1_any-key-will-do-0123456789abcdef")

RUN_ELSEWHERE: Final = {
    DOCS / "certificates.md": "tests/certificates/test_docs_certificates.py",
    DOCS / "headers.md": "tests/tunnel/test_headers_at_servers.py",
    DOCS / "testing.md": "tests/testing/test_plugin.py",
    TRANSPORT: "test_the_transport_of_the_guide_works",
}
RUN_HERE: Final = {
    "gateway": "rpc = RemoteAccessRpc(remote_access)",
    "switching on": "SettingsUpdate(enabled=True",
    "visitors' TLS": "terminate_tls(handler, certificate)",
    "descriptors": "resource.setrlimit",
    "ASGI": "shutdown_trigger=stop.wait",
    "asyncio": "async for status in tunnel.watch(): ...",
    "threads": "on_status=queue.put",
    "services": 'services["grafana"] = ',
    "first": 'b"hello, " + str(stream.visitor)',
    "start": "HTTP/1.1 200 OK",
}
"""Names for the blocks that are run here, and a part of each."""


def python(name: str, instead: dict[str, str] | None = None) -> str:
    """A block of `RUN_HERE`, with some texts replaced."""
    (block,) = [block for block in blocks(language="python") if RUN_HERE[name] in block.text]
    text = block.text
    for old, new in (instead or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    return text


async def awaited(name: str, around: dict[str, Any], instead: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a block in an async function; returns its variables."""
    body = textwrap.indent(python(name, instead), "    ")
    namespace = KNOWN | {"trio": trio} | around
    exec(f"async def block():\n{body}\n    return locals()", namespace)
    variables: dict[str, Any] = await namespace["block"]()
    return variables


def test_no_python_block_is_left_out() -> None:
    servers = section_of(README, "Your server behind the tunnel")  # tests/test_readme.py runs these
    for block in blocks(language="python"):
        if block.document not in RUN_ELSEWHERE and block.text not in servers:
            assert len([part for part in RUN_HERE.values() if part in block.text]) == 1, block.place


async def test_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gateway.toml").write_text("[gateway.remote_access]\n")
    ask = '    reply = await rpc.handle("settings/get", {}); nursery.cancel_scope.cancel()  '
    variables = await awaited("gateway", {}, {"    ...  ": ask})
    assert variables["reply"]["settings"]["remote_access"]["status"]["state"] == "disabled"


async def test_switching_on(tmp_path: Path) -> None:
    remote_access = pioneer_tunnel.RemoteAccess(
        pioneer_tunnel.RemoteAccessConfig(),
        settings=pioneer_tunnel.SettingsFile(tmp_path / "gateway-settings.toml"),
        keystore=pioneer_tunnel.FileKeystore(tmp_path / "keystore"),
    )
    key = "ptk1_" + "k" * 43
    await awaited("switching on", {"remote_access": remote_access, "key": key})
    shown = await pioneer_tunnel.RemoteAccessRpc(remote_access).handle("settings/get", {})
    assert shown["settings"]["remote_access"]["enabled"]
    assert shown["settings"]["remote_access"]["has_key"]
    update = section_of(DOCS / "embedding.md", "JSON-RPC").split("are `")[1].split("`")[0].replace("ptk1_…", key)
    await pioneer_tunnel.RemoteAccessRpc(remote_access).handle("settings/update", json.loads(update))


@asynccontextmanager
async def memory_tunnel() -> AsyncIterator[tuple[Any, Any]]:
    async with (
        open_memory_relay() as memory_relay,
        pioneer_tunnel.open_tunnel(memory_relay.url, key=memory_relay.key, dial=memory_relay.dial) as tunnel,
    ):
        await memory_relay.wait_reachable()
        yield memory_relay, tunnel


async def test_visitors_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    issued = authority.issue_cert("office.example.com")
    issued.private_key_pem.write_to_path("office.key")
    issued.cert_chain_pems[0].write_to_path("office.crt")
    client = ssl.create_default_context()
    authority.configure_trust(client)

    async def handler(stream: pioneer_tunnel.TunnelStream) -> None:
        async with stream:
            await stream.send_all(b"hello, " + await stream.receive_some())

    async with memory_tunnel() as (memory_relay, tunnel), trio.open_nursery() as nursery:
        nursery.start_soon(awaited, "visitors' TLS", {"tunnel": tunnel, "handler": handler})
        visitor = trio.SSLStream(await memory_relay.visit(), client, server_hostname="office.example.com")
        await visitor.send_all(b"visitor")
        assert await visitor.receive_some() == b"hello, visitor"
        nursery.cancel_scope.cancel()


def test_descriptors() -> None:
    check = "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard"
    subprocess.run([sys.executable, "-c", f"{python('descriptors')}\n{check}"], check=True, timeout=60)


async def test_asgi() -> None:
    stop = trio.Event()

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    around = {"app": app, "serve": asgi.serve, "Options": asgi.Options, "stop": stop}
    async with memory_tunnel() as (memory_relay, tunnel), trio.open_nursery() as nursery:
        nursery.start_soon(awaited, "ASGI", around | {"tunnel": tunnel})
        async with await memory_relay.visit() as visitor:
            await visitor.send_all(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
            assert (await visitor.receive_some()).startswith(b"HTTP/1.1 204 ")
        stop.set()


SCRIPTED: Final = {"forward_to": "transport=ScriptedTransport(), forward_to"}


def test_asyncio() -> None:
    around = {"open_tunnel": aio.open_tunnel, "key": KEY, "ScriptedTransport": ScriptedTransport}
    variables = asyncio.run(awaited("asyncio", around, SCRIPTED | {": ...": ": break"}))
    assert variables["status"].state is State.CONNECTED


def test_threads() -> None:
    statuses: queue.Queue[pioneer_tunnel.Status] = queue.Queue()
    around = {"open_tunnel": blocking.open_tunnel, "key": KEY, "ScriptedTransport": ScriptedTransport}
    exec(python("threads", SCRIPTED), KNOWN | around | {"queue": statuses})
    while statuses.get(timeout=60).state is not State.CONNECTED:
        pass


async def test_services() -> None:
    scripted = {
        "services=services": "services=services, transport=ScriptedTransport()",
        "print(status.services)": "nursery.cancel_scope.cancel()",
    }
    variables = await awaited(
        "services", {"key": KEY, "ScriptedTransport": ScriptedTransport, "partial": partial}, scripted
    )
    assert [*variables["services"]] == ["web", "grafana"]


@pytest.mark.parametrize(
    ("name", "address", "answer"),
    [
        ("first", "wss://relay.example.com", b"hello, 127.0.0.1:%d: GET / HTTP/1.1\r\n"),
        ("start", "ws://127.0.0.1:7300", b"HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\nhello, 127.0.0.1:%d\n"),
    ],
)
async def test_a_program_greets_visitors(name: str, address: str, answer: bytes, tmp_path: Path) -> None:
    async with relay(tmp_path) as (url, rig):
        (tmp_path / "main.py").write_text(python(name, {address: url}))
        async with running("main.py", cwd=tmp_path) as program:

            async def greeted() -> bool:
                assert program.process.returncode is None, program.said
                try:
                    async with await connect(rig.addresses.tunnels["office"]) as visitor:
                        port = visitor.socket.getsockname()[1]
                        await visitor.send_all(GREETING)
                        await visitor.send_eof()
                        heard = await read_all(visitor)
                except (OSError, trio.BrokenResourceError):
                    return False  # the tunnel is not up yet: the relay resets the connection
                assert heard.startswith(answer % port), heard
                return True

            await eventually(greeted)


async def test_the_transport_of_the_guide_works() -> None:
    guide: dict[str, Any] = {"__name__": "guide"}
    exec("".join(block.text for block in blocks(TRANSPORT, language="python")), guide)
    tests = [value for name, value in guide.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        with no_hang():
            await test()

    async def pair() -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            return guide["SocketVisitor"](ours), await listener.accept()

    await trio.testing.check_half_closeable_stream(pair, None)


# TOML


RELAY: Final = {
    "id": '"relay-1"',
    "control_addr": '"127.0.0.1:7300"',
    "ingress_addr": '"127.0.0.1:7380"',
    "public_names": '["relay.example.com"]',
}
"""The required keys of a relay, for blocks that leave them out."""

PROCESS: Final = """
[gateway.remote_access]
transport = "process"
proxy = "http://proxy.example.com:3128"
[gateway.remote_access.process]
command = ["program", "{config}"]
"""
"""What a block with keys of a tunnel program alone belongs to."""


def toml_blocks() -> list[Any]:
    return [pytest.param(block, id=block.place) for block in blocks(language="toml")]


@pytest.mark.parametrize("block", toml_blocks())
def test_a_configuration_is_accepted(block: Block, tmp_path: Path) -> None:
    text = block.text
    if "# [gateway.remote_access]" in text:  # two files side by side: the right one is ours
        text = "\n".join(line.partition("# ")[2].partition("(")[0] for line in text.splitlines()[1:])
    text = re.sub("ed25519:…", lambda _: str(new_relay_key().identity().public_key), text)
    tables = tomllib.loads(text)
    if not tables.keys() & {"relay", "gateway", "expose"}:
        text = PROCESS + text
        tables = tomllib.loads(text)
    if "relay" in tables:
        missing = [f"{key} = {value}" for key, value in RELAY.items() if key not in tables["relay"]]
        text = "\n".join(["[relay]", *missing, text.replace("[relay]\n", "", 1)])
    file = tmp_path / "config.toml"
    file.write_text(text)
    if "relay" in tables and "node" not in tables["relay"].get("fleet", {"node"}):
        FleetFile.load(file)  # an operator's
    elif "relay" in tables:
        RelayConfig.load(file)
    if "gateway" in tables:
        RemoteAccessConfig.load(file)
    if "expose" in tables:
        (tmp_path / tables["expose"]["key_file"]).touch()
        assert read_client_file(file, expose.params).keys() == tables["expose"].keys()


# Commands


def commands() -> list[Any]:
    return [
        pytest.param(command, id=f"{block.place} {command[:40]}")
        for block in blocks(language="console")
        for command in commands_of(block)
    ]


OTHER_PROGRAMS: Final = {
    *("apt-get", "chmod", "curl", "echo", "env", "htpasswd", "mkdir", "openssl", "pebble-challtestsrv", "python"),
    *("tail", "touch", "uvicorn"),
}


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(command)
    match Path(words[0]).name, *words[1:]:
        case "pioneer-tunnel", *arguments:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(relay_options, "USUAL_CONFIG", tmp_path / "usual.toml")
            (tmp_path / "usual.toml").touch()
            for option, value in itertools.pairwise(arguments):
                if re.fullmatch("--(config|.*-(file|certificate|private-key))", option):
                    Path(value).touch()
            parse(command_line, arguments)
        case "make", target, *variables:
            makefile = (ROOT / "Makefile").read_text()
            assert f"\n{target}:" in makefile
            for variable in variables:
                assert f"\n{variable.partition('=')[0]} ?=" in makefile
        case "pip", "install", what:
            extras = re.fullmatch(r"(?:\.|pioneer-tunnel|\$\(ls build/compiled/\*\.whl\))\[([\w,]+)\]", what)
            assert extras
            assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
        case "python" | "python3", "-m", module, *options:
            if not module.startswith(("venv", "http.")):
                path = ROOT / ("tests" if module == "simulation" else "") / module.replace(".", "/")
                source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
                assert [option for option in options if option.startswith("-") and f'"{option}"' not in source] == []
        case program, *_:
            assert program in OTHER_PROGRAMS


def parse(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> None:
    """Parse as `main` would, and call nothing."""
    with command.make_context(command.name, [*arguments], parent=parent) as context:
        # click 8.2 has renamed it.
        name = "_protected_args" if hasattr(context, "_protected_args") else "protected_args"
        rest = [*getattr(context, name), *context.args]
        if isinstance(command, click.Group) and rest:
            _, sub_command, rest = command.resolve_command(context, rest)
            assert sub_command is not None
            parse(sub_command, rest, context)


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("curl") is None, reason="needs bash and curl")
async def test_the_five_minutes(tmp_path: Path) -> None:
    """The commands of README.md, typed in three terminals. Only the ports are others."""
    section = section_of(README, "Start in five minutes")
    _install, run_relay, expose, visit = [
        block for block in blocks(README) if block.text in section and block.language == "console"
    ]
    ports = {port: str(free_port()) for port in ("7300", "8000")}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def with_ports(text: str) -> str:
        return re.sub("|".join(ports), lambda port: ports[port[0]], text)

    def terminal(block: Block) -> dict[str, Any]:
        script = with_ports("\n".join(commands_of(block)))
        return {"command": ["bash", "-ec", script], "cwd": tmp_path, "env": environment}

    with no_hang():
        async with open_terminal(**terminal(run_relay)) as relay_says:
            await relay_says("visitors at")
            async with open_terminal(**terminal(expose)) as says:
                await says(f"connected    visitors come in at http://home.localhost:{ports['7300']}")
                heard = await trio.run_process(**terminal(visit), capture_stdout=True)
                assert heard.stdout.decode() == visit.text.partition("\n")[2] == "hello\n"


@asynccontextmanager
async def open_terminal(command: list[str], cwd: Path, env: dict[str, str]) -> AsyncIterator[Any]:
    """Run a program that goes on; yields a function that waits until it has said something."""
    log = cwd / f"terminal-{len(list(cwd.iterdir()))}.log"
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )

    async def says(text: str) -> None:
        while text not in log.read_text():
            assert process.poll() is None, log.read_text()
            await trio.sleep(0.05)

    try:
        yield says
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with trio.CancelScope(shield=True), no_hang():
            await process.wait()
