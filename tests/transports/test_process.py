"""Transport `process`, with real programs: what they are given, what they say, how they end, and that nothing stays."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import signal
import ssl
import stat
import subprocess
import sys
import textwrap
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import pytest
import trio
import trio.testing
import trustme
from hypothesis import given, strategies as st
from rig import HANG, eventually, no_hang, nothing_left_behind, wait_until

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    MissingBinaryError,
    ProcessExitedError,
    RelayConnectError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.proxies import Proxy, ProxyCredentials
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.proxies.choice import WITHOUT_PROXY, ProxyChoice
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.runtime_folder import load_instance
from pioneer_tunnel.gateway.settings import SettingsFile, SettingsUpdate
from pioneer_tunnel.transports.interface import Session, Target
from pioneer_tunnel.transports.process import program as program_module
from pioneer_tunnel.transports.process.config import ProbeUrl, ProcessConfig, TunnelProgram
from pioneer_tunnel.transports.process.http_probe import ask_for_status
from pioneer_tunnel.transports.process.output import LINE_LIMIT, Budget, Output, Secrets
from pioneer_tunnel.transports.process.program import ProcessTransport

SECRET: Final = "ptk1_the-key_of/the tests\"with'quotes-0123456789"
KEY: Final = RelayKey(SECRET)
READY: Final = "print('ready', flush=True)\n"
FOR_EVER: Final = READY + "time.sleep(600)\n"
LINUX: Final = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")


Run: TypeAlias = functools.partial[Any]
"""A transport with its target."""


def write_program(folder: Path, source: str) -> list[str]:
    """A program that does as `source` says, as a command whose processes `programs_in` finds."""
    path = folder / "program.py"
    path.write_text("import json, os, signal, subprocess, sys, time\n" + textwrap.dedent(source))
    return [sys.executable, "-I", "-S", str(path)]


def run_for(
    folder: Path,
    source: str,
    *arguments: str,
    dial: Any = trio.open_tcp_stream,
    proxy: ProxyChoice = WITHOUT_PROXY,
    **changes: Any,
) -> Run:
    options: dict[str, Any] = {
        "command": [*write_program(folder, source), *arguments],
        "connected_pattern": "^ready$",
        "stop_grace_ms": 1500,
    }
    return run_of(ProcessConfig(**(options | changes)), folder, dial=dial, proxy=proxy)


def run_of(
    config: ProcessConfig,
    folder: Path,
    *,
    key: RelayKey = KEY,
    dial: Any = trio.open_tcp_stream,
    proxy: ProxyChoice = WITHOUT_PROXY,
) -> Run:
    program = TunnelProgram(config, local=Address("::1", 8080), runtime_folder=folder / "run", folder=folder)
    address = RelayAddress(None, "relay.test", 2333)
    target = Target(address=address, key=key, service="a service", dial=dial, proxy=proxy)
    return functools.partial(ProcessTransport(program=program), target)


def no_visitors(_: object) -> None:
    raise AssertionError("this transport has neither visitors nor events")


async def serve(run: Run, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    await run(no_visitors, no_visitors, task_status=task_status)


async def failure_of(run: Run) -> TunnelError:
    """What comes of a program that does not go on."""
    with no_hang(), pytest.raises(TunnelError) as error:
        await serve(run)
    return error.value


async def failure_by_timeout(run: Run, clock: trio.testing.MockClock, condition: Callable[[], bool]) -> TunnelError:
    """What comes of a program when 60 seconds of its startup are over, which they are as soon as `condition` holds."""
    clock.rate = 1
    starting_up = trio.Event()
    until_connected = program_module._until_connected

    async def note(*arguments: Any) -> None:
        starting_up.set()
        await until_connected(*arguments)

    async def let_time_pass() -> None:
        await starting_up.wait()
        await eventually(condition)
        clock.jump(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "_until_connected", note)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_time_pass)
            return await failure_of(run)


@asynccontextmanager
async def connected(run: Run) -> AsyncIterator[Session]:
    async with trio.open_nursery() as nursery:
        with no_hang():
            session: Session = await nursery.start(lambda task_status: serve(run, task_status=task_status))
        yield session
        nursery.cancel_scope.cancel()


def programs_in(folder: Path) -> dict[int, list[str]]:
    """The living processes that run something of `folder`, zombies left out, with their arguments."""
    found = {}
    for name in filter(str.isdigit, (path.name for path in Path("/proc").iterdir())):
        try:
            command = Path("/proc", name, "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX" and any(word.startswith(f"{folder}/") for word in command):
            found[int(name)] = command
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def no_process_left(folder: Path) -> Iterator[None]:
    """Fail when the block leaves a process, a zombie, a file, a descriptor or a task behind."""
    before = descriptors()
    with nothing_left_behind():
        yield
    assert programs_in(folder) == {}
    assert run_files(folder) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert descriptors() <= before


def run_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("*") if not path.name.startswith("instance"))


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)


# Coming up


@LINUX
async def test_connected_when_the_pattern_matches_a_line(tmp_path: Path) -> None:
    source = "sys.stderr.write('not ready\\n\\x1b[32mready\\x1b[0m\\r\\n'); sys.stderr.flush(); time.sleep(600)"
    with no_process_left(tmp_path):
        run = run_for(tmp_path, source, public_url="https://office.example.com")
        async with connected(run) as session:
            assert session == Session(public_url="https://office.example.com")
            assert len(programs_in(tmp_path)) == 1


@LINUX
async def test_connected_when_it_has_run_for_a_while(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        started = trio.current_time()
        async with connected(run_for(tmp_path, FOR_EVER, connected_pattern=None, settle_ms=150)):
            assert trio.current_time() - started >= 0.15


@pytest.mark.parametrize(("status", "accepted"), [(404, ()), (502, (200,)), (401, (200, 401))])
async def test_connected_when_the_probe_is_answered(
    tmp_path: Path, status: int, accepted: tuple[int, ...], mock_clock: trio.testing.MockClock
) -> None:
    """The site answers badly, then with the status."""
    asked: list[bytes] = []
    mock_clock.rate = 1

    async def site(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append(bytes(await stream.receive_some(4096)))
            answer = {1: b"", 2: b"SSH-2.0-x\r\n"}.get(len(asked), f"HTTP/1.1 {status} Whatever\r\n\r\n".encode())
            await stream.send_all(answer)

    async def dial(host: str, port: int) -> trio.SocketStream:
        assert (host, port) == ("office.test", 8000)
        return await trio.testing.open_stream_to_socket_listener(listener)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    run = run_for(
        tmp_path,
        FOR_EVER,
        connected_pattern=None,
        probe_url="http://office.test:8000/health",
        probe_interval_ms=10,
        probe_statuses=accepted,
        startup_timeout_ms=60_000,
        dial=dial,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, site, [listener])
        if accepted == (200,):
            error = await failure_by_timeout(run, mock_clock, lambda: len(asked) > 3)
            assert isinstance(error, RelayConnectError)
            assert "answers with HTTP status 502" in str(error)
        else:
            async with connected(run):
                assert asked[0].startswith(b"GET /health HTTP/1.1\r\nHost: office.test:8000\r\n")
                assert len(asked) == 3
        nursery.cancel_scope.cancel()


async def test_a_probe_inside_tls() -> None:
    authority = trustme.CA()
    server, client, stranger = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), *(client_tls() for _ in range(2))
    authority.issue_cert("office.test").configure_cert(server)
    authority.configure_trust(client)

    async def site(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.0 204\r\n\r\n")

    async def dial(host: str, port: int) -> trio.SocketStream:
        return await trio.testing.open_stream_to_socket_listener(listener)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = ProbeUrl.parse("https://office.test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, site, [trio.SSLListener(listener, server)])
        assert await ask_for_status(url, dial=dial, make_tls=lambda: client, timeout=HANG) == 204
        refused = await ask_for_status(url, dial=dial, make_tls=lambda: stranger, timeout=HANG)
        assert "not trusted" in str(refused)
        nursery.cancel_scope.cancel()


async def test_the_startup_is_bounded(
    tmp_path: Path, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run = run_for(tmp_path, "print('login failed', flush=True); time.sleep(600)", startup_timeout_ms=60_000)
    with no_process_left(tmp_path):
        error = await failure_by_timeout(run, mock_clock, lambda: "says: login failed" in caplog.text)
    assert isinstance(error, RelayConnectError)
    assert not error.final
    assert "after 60 seconds: no line of its output matches connected_pattern; it says: login failed" in str(error)


# What the program is given

TELL: Final = """
    fds = {}
    for fd in range(1024):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
    with open(sys.argv[1], "w") as told:
        json.dump({
            "argv": sys.argv[2:],
            "env": dict(os.environ),
            "cwd": os.getcwd(),
            "stdin": sys.stdin.buffer.read().decode(),
            "fds": fds,
            "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
            "session": os.getsid(0) == os.getpid() == os.getpgid(0),
            "files": {p: [open(p).read(), os.stat(p).st_mode] for p in sys.argv[2:] if os.path.isfile(p)},
        }, told)
"""


async def told_by(folder: Path, *arguments: str, **changes: Any) -> dict[str, Any]:
    source = textwrap.dedent(TELL) + FOR_EVER
    async with connected(run_for(folder, source, str(folder / "told"), *arguments, **changes)):
        told: dict[str, Any] = json.loads((folder / "told").read_text())
        for pid, command in programs_in(folder).items():
            assert SECRET not in " ".join(command)
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert (SECRET.encode() in environment) == ("key_variable" in changes)
            guardian = parent_of(pid)
            assert SECRET.encode() not in Path(f"/proc/{guardian}/environ").read_bytes()
            assert SECRET.encode() not in Path(f"/proc/{guardian}/cmdline").read_bytes()
    return told


@LINUX
async def test_placeholders_are_filled_in(tmp_path: Path) -> None:
    names = ["relay", "relay_host", "relay_port", "local", "local_host", "local_port", "service", "runtime_dir"]
    told = await told_by(tmp_path, *(f"{name}={{{name}}}" for name in names), "{{x}}", "", "a b")
    assert dict(word.split("=") for word in told["argv"][: len(names)]) == {
        "relay": "relay.test:2333",
        "relay_host": "relay.test",
        "relay_port": "2333",
        "local": "[::1]:8080",
        "local_host": "::1",
        "local_port": "8080",
        "service": "a service",
        "runtime_dir": str(tmp_path / "run"),
    }
    assert told["argv"][len(names) :] == ["{x}", "", "a b"]
    assert told["cwd"] == str(tmp_path)
    assert told["stdin"] == ""
    assert told["session"]


@LINUX
async def test_nothing_of_ours_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_TOKEN", "somebody else's")
    monkeypatch.setenv("KEPT", "as named")
    monkeypatch.setenv("LANG", f"has {SECRET} in it")
    told = await told_by(tmp_path, inherit=["KEPT", "MISSING"], environment={"SERVICE": "{service}"})
    environment = told["env"]
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["KEPT"] == "as named"
    assert environment["SERVICE"] == "a service"
    assert environment.keys().isdisjoint({"GATEWAY_API_TOKEN", "MISSING", "LANG"})
    assert SECRET not in json.dumps(told["env"])
    assert told["fds"].keys() == {"0", "1", "2"}
    assert not any("socket:" in link for link in told["fds"].values())
    # As every Python program ignores them by itself.
    assert set(told["ignored"]) <= {signal.SIGPIPE, signal.SIGXFSZ}


@LINUX
async def test_the_key_in_a_file(tmp_path: Path) -> None:
    template = 'token = "{key}"\nfile = "{key_file}"\n{{braces}}\nremote = "{relay}"\n'
    told = await told_by(tmp_path, "{config}", "{key_file}", config_template=template)
    config, key_file = told["argv"]
    (text, mode), (key, key_mode) = told["files"][config], told["files"][key_file]
    assert text == f'token = "{SECRET}"\nfile = "{key_file}"\n{{braces}}\nremote = "relay.test:2333"\n'
    assert key == SECRET + "\n"
    assert stat.S_IMODE(mode) == stat.S_IMODE(key_mode) == 0o600
    assert Path(config).parent == Path(key_file).parent == tmp_path / "run"
    assert run_files(tmp_path) == []


PROXY_PASSWORD = "p@ss word:1"


@LINUX
async def test_the_proxy_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URL may be an argument; the credentials are in the file alone, and no other proxy is in the environment."""
    monkeypatch.setenv("HTTPS_PROXY", "http://other.test")
    monkeypatch.setenv("no_proxy", "*")
    credentials = tmp_path / "credentials"
    credentials.write_text(f"user:{PROXY_PASSWORD}\n")
    credentials.chmod(0o600)
    proxy = ProxyChoice(configured=Proxy("socks5", "proxy.test", 1080), credentials_file=credentials)
    template = "{proxy} {proxy_with_credentials}"
    told = await told_by(tmp_path, "{proxy}", "{config}", config_template=template, proxy=proxy)
    assert told["argv"][0] == "socks5://proxy.test:1080"
    written = "socks5://proxy.test:1080 socks5://user:p%40ss%20word%3A1@proxy.test:1080"
    assert told["files"][told["argv"][1]][0] == written
    assert told["env"].keys().isdisjoint({"HTTPS_PROXY", "no_proxy"})


@LINUX
@pytest.mark.parametrize("configured", [None, "none"])
async def test_the_proxies_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: Literal["none"] | None
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://other.test")
    told = await told_by(tmp_path, proxy=ProxyChoice(configured=configured))
    assert told["env"].get("HTTPS_PROXY") == (None if configured else "http://other.test")


async def test_a_password_that_a_program_prints_is_not_shown(tmp_path: Path) -> None:
    proxy = ProxyChoice(configured=Proxy("http", "proxy.test", 80, ProxyCredentials("user", PROXY_PASSWORD)))
    source = "print('no proxy at http://user:p%40ss%20word%3A1@proxy.test, nor " + PROXY_PASSWORD + "'); sys.exit(3)"
    error = await failure_of(run_for(tmp_path, source, "{proxy}", proxy=proxy))
    assert "no proxy at http://user:…@proxy.test, nor …" in str(error)


@LINUX
async def test_the_key_on_standard_input(tmp_path: Path) -> None:
    assert (await told_by(tmp_path, key_on_stdin=True))["stdin"] == SECRET + "\n"


@LINUX
async def test_the_key_in_a_variable_that_the_operator_names(tmp_path: Path) -> None:
    assert (await told_by(tmp_path, key_variable="FRP_TOKEN"))["env"]["FRP_TOKEN"] == SECRET


async def test_a_program_that_does_not_read_its_standard_input(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, "sys.stdin.close(); os.close(0)\n" + FOR_EVER, key_on_stdin=True)):
            pass


async def test_the_key_itself_among_the_arguments_is_refused(tmp_path: Path) -> None:
    for word in (SECRET, f"--token={SECRET}", b64encode(SECRET.encode()).decode()):
        error = await failure_of(run_for(tmp_path, FOR_EVER, word))
        assert isinstance(error, InvalidSettingsError)
        assert "among the arguments" in str(error)
        assert SECRET not in str(error)


# Not there, not executable


@pytest.mark.parametrize(
    ("make", "command", "says"),
    [
        (None, "no-such-program", "is not installed"),
        (None, "./no-such-program", "no-such-program is not there"),
        (None, "run/", "is a folder"),
        (0o600, "./program", "not executable by this user"),
        (0o755, "./program", "no program for this machine"),
    ],
)
async def test_a_missing_program(tmp_path: Path, make: int | None, command: str, says: str) -> None:
    if make is not None:
        (tmp_path / "program").write_bytes(b"\x00\x01")
        (tmp_path / "program").chmod(make)
    config = ProcessConfig(command=[command, "{config}"], config_template="{key}")
    with no_process_left(tmp_path):
        error = await failure_of(run_of(config, tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert says in str(error)
    if command == "no-such-program":
        assert str(error).endswith(os.environ["PATH"])


async def test_a_script_without_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program").write_text("#!/no/such/interpreter\n")
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = await failure_of(run_of(ProcessConfig(command=["program"]), tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert "interpreter" in str(error)
    (tmp_path / "program").chmod(0o644)
    error = await failure_of(run_of(ProcessConfig(command=["program"]), tmp_path))
    assert isinstance(error, MissingBinaryError)
    assert f"{tmp_path}/program is not executable" in str(error)


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    config = ProcessConfig(command=[sys.executable])
    program = TunnelProgram(config, local=Address("::1", 1), runtime_folder=tmp_path, folder=tmp_path / "none")
    error = await failure_of(
        functools.partial(
            ProcessTransport(program=program), Target(address=RelayAddress(None, "relay.test", 1), key=KEY)
        )
    )
    assert isinstance(error, InvalidSettingsError)
    assert str(tmp_path / "none") in str(error)


async def test_where_a_program_cannot_be_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_for(tmp_path, FOR_EVER)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert isinstance(await failure_of(run), UnsupportedTransportError)
    monkeypatch.setattr(program_module, "_IS_POSIX", False)
    error = await failure_of(run)
    assert isinstance(error, UnsupportedTransportError)
    assert "POSIX" in str(error)


# Its end


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("sys.exit('cannot log in')", "'python' ended with exit status 1, saying: cannot log in"),
        ("pass", "'python' ended with exit status 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "'python' was ended by SIGKILL"),
        (READY + "print('lost', end='')", "'python' ended with exit status 0, saying: ready | lost"),
        ("[print(i) for i in range(99)]; sys.exit(7)", "exit status 7, saying: 89 | 90 | 91 |"),
    ],
)
async def test_an_end_is_told_with_its_last_words(tmp_path: Path, source: str, says: str) -> None:
    with no_process_left(tmp_path):
        error = await failure_of(run_for(tmp_path, source))
    assert isinstance(error, ProcessExitedError)
    assert not error.final
    assert says in str(error).replace("python3.11", "python").replace("python3", "python")


LEAKS: Final = """
    import base64, hashlib
    key = sys.stdin.readline().rstrip("\\n")
    raw = key.encode()
    for text in [
        key, key[:20], key[9:31], f"token={key}!", "\\x1b[1m".join(key), "\\0".join(key), key.upper(), repr(key),
        json.dumps(key),
        base64.b64encode(raw).decode(), base64.b64encode(b"user:" + raw).decode(), raw.hex(), raw.hex().upper(),
        hashlib.sha256(raw).hexdigest(), "x" * 980 + key, "y" * 4090 + key, key[:24] + "\\n" + key[24:],
    ]:
        print(text)
    print("ready", flush=True)
    sys.stderr.write(key + "\\n" + key)
"""


async def test_the_key_that_a_program_prints_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    error = await failure_of(run_for(tmp_path, LEAKS, key_on_stdin=True))
    assert isinstance(error, ProcessExitedError)
    assert "the tunnel program says: ready" in caplog.text
    assert "token=…!" in caplog.text
    for text in (str(error), caplog.text):
        for form in (SECRET, b64encode(SECRET.encode()).decode(), SECRET.encode().hex(), SECRET.upper(), repr(SECRET)):
            for start in range(len(form) - 8):
                assert form[start : start + 8] not in text
        assert hashlib.sha256(SECRET.encode()).hexdigest() not in text
    assert all(len(record.getMessage()) < 1100 for record in caplog.records)


@LINUX
@pytest.mark.parametrize("separator", ["", "\\n"])
async def test_a_program_that_prints_without_end_is_read_without_end(tmp_path: Path, separator: str) -> None:
    source = f"""
        {READY.strip()}
        for i in range(400):
            os.write(1, b"flood{separator}" * 10_000)
        open(sys.argv[1], "w").close()
        while True:
            os.write(1, b"flood{separator}" * 10_000)
    """
    done = tmp_path / "done"
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, source, str(done))):
            await eventually(done.exists)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            await trio.sleep(0.3)
            grown = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - resident
            assert grown < 8 * 1024 * 1024


@LINUX
async def test_a_program_that_closes_its_output_goes_on(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, READY + "os.close(1); os.close(2); time.sleep(600)")):
            await trio.sleep(0.1)
            assert len(programs_in(tmp_path)) == 1


# Being ended

STUBBORN: Final = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def branch(depth, leave):
        if os.fork() == 0:
            if leave:
                os.setsid()
            if depth:
                branch(depth - 1, leave)
            time.sleep(600)
            os._exit(0)
    branch(1, False)
    branch(1, True)
"""


@LINUX
async def test_it_is_asked_first(tmp_path: Path) -> None:
    source = f"""
        def end(*_):
            os.write(1, b"bye\\n" * 100_000)
            open(sys.argv[1], "w").close()
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        {READY.strip()}
        time.sleep(600)
    """
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, source, str(tmp_path / "polite"), stop_grace_ms=60_000)):
            pass
    assert (tmp_path / "polite").exists()


@LINUX
async def test_one_that_does_not_listen_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        run = run_for(tmp_path, textwrap.dedent(STUBBORN) + FOR_EVER, stop_grace_ms=300)
        async with connected(run):
            await eventually(lambda: len(programs_in(tmp_path)) == 5)
            started = trio.current_time()
        assert trio.current_time() - started >= 0.3


@LINUX
async def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    source = textwrap.dedent(STUBBORN) + "print('gone', flush=True); os._exit(3)"
    with no_process_left(tmp_path):
        error = await failure_of(run_for(tmp_path, source, stop_grace_ms=200))
    assert "exit status 3, saying: gone" in str(error)


@LINUX
async def test_its_guardian_is_killed(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        run = run_for(tmp_path, textwrap.dedent(STUBBORN.replace("(1, True)", "(1, False)")) + FOR_EVER)

        async def kill_the_guardian() -> None:
            async with connected(run):
                os.kill(parent_of(min(programs_in(tmp_path))), signal.SIGKILL)
                await trio.sleep_forever()

        with pytest.raises(ProcessExitedError, match="guardian"), lone_error_bare():
            await kill_the_guardian()
        await eventually(lambda: not programs_in(tmp_path))


async def test_a_guardian_that_cannot_be_started_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tmp_path, FOR_EVER)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with nothing_left_behind():
        error = await failure_of(run)
    assert isinstance(error, ProcessExitedError)
    assert "the guardian of the tunnel program cannot be started" in str(error)
    assert "no-python" in str(error)


@LINUX
async def test_its_guardian_is_asked_to_end(tmp_path: Path) -> None:
    """As a service manager does that ends all processes of a service at once."""

    async def ask_the_guardian() -> None:
        async with connected(run_for(tmp_path, FOR_EVER)):
            os.kill(parent_of(min(programs_in(tmp_path))), signal.SIGTERM)
            await trio.sleep_forever()

    with no_process_left(tmp_path), pytest.raises(ProcessExitedError, match="ended by SIGTERM"), lone_error_bare():
        await ask_the_guardian()


@LINUX
async def test_cancelled_anywhere_nothing_is_left(tmp_path: Path) -> None:
    """Each checkpoint of the start, one after the other, until it is up."""
    run = run_for(tmp_path, FOR_EVER, "{config}", config_template="{key}", key_on_stdin=True)
    checkpoints = 0
    with no_process_left(tmp_path):
        while True:
            up = trio.Event()
            with trio.CancelScope() as scope:
                instrument = _CancelAt(checkpoints, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with connected(run):
                        up.set()
                finally:
                    if not instrument.spent:
                        trio.lowlevel.remove_instrument(instrument)
            assert programs_in(tmp_path) == {}
            assert run_files(tmp_path) == []
            if up.is_set():
                break
            checkpoints += 1
    assert checkpoints > 5


class _CancelAt(trio.abc.Instrument):
    """Cancels when tasks have been resumed so many times."""

    def __init__(self, steps: int, scope: trio.CancelScope) -> None:
        self._steps = steps
        self._scope = scope
        self.spent = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._steps == 0 and not self.spent:
            self.spent = True
            trio.lowlevel.remove_instrument(self)
            self._scope.cancel()
        self._steps -= 1


GATEWAY: Final = """
    import sys, threading, trio
    trio._core._thread_cache.IDLE_TIMEOUT = 0.2
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../support"]
    from pathlib import Path
    from test_process import FOR_EVER, STUBBORN, connected, run_for
    import textwrap

    async def main():
        run = run_for(Path(sys.argv[2]), textwrap.dedent(STUBBORN) + FOR_EVER, "{key_file}")
        async with connected(run):
            print("up", flush=True)
            while threading.active_count() > 1:
                await trio.sleep(0.01)
            print("still", flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


@LINUX
def test_killed_ourselves_nothing_survives(tmp_path: Path) -> None:
    """The thread that has forked ends when it is idle; nobody may take that for our death."""
    gateway = [sys.executable, "-c", textwrap.dedent(GATEWAY), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(gateway, stdout=subprocess.PIPE, text=True) as us:
        assert us.stdout is not None
        assert us.stdout.readline() == "up\n"
        wait_until(lambda: len(living(tmp_path, us.pid)) == 5)
        before = living(tmp_path, us.pid)
        assert us.stdout.readline() == "still\n"
        assert living(tmp_path, us.pid) == before
        assert len(run_files(tmp_path)) == 1
        us.kill()
        us.wait()
        wait_until(lambda: not living(tmp_path, us.pid))
        wait_until(lambda: not run_files(tmp_path))


def living(folder: Path, us: int) -> set[int]:
    return set(programs_in(folder)) - {us}


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    instance = load_instance(folder)
    mine = ["process-0123456789abcdef.key", ".process-0123456789abcdef.conf.0a1b2c3d4e5f6071.pioneer-tmp"]
    others = ["process-of-mine.key", "frpc.toml", "process-0123456789abcdef.d", ".process.pioneer-tmp"]
    (folder / others[2]).mkdir()
    for name in [*mine, *others[:2], others[3]]:
        (folder / name).write_text("x")
    (folder / others[2]).rename(folder / "folder")
    assert load_instance(folder) == instance
    assert {path.name for path in folder.iterdir()} == {"instance", "instance.lock", "folder", *others[:2], others[3]}


# As a gateway sees it


@asynccontextmanager
async def gateway(folder: Path, source: str, **changes: Any) -> AsyncIterator[RemoteAccess]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    config = RemoteAccessConfig(
        transport="process",
        runtime_dir="run",
        base_dir=folder,
        local_addr=f"127.0.0.1:{listener.socket.getsockname()[1]}",
        restart_initial_ms=50,
        process={"command": write_program(folder, source), "connected_pattern": "^ready$", **changes},
    )
    keystore = MemoryKeystore()
    remote_access = RemoteAccess(config, settings=SettingsFile(folder / "settings.toml"), keystore=keystore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, lambda stream: stream.aclose(), [listener])
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        yield remote_access
        nursery.cancel_scope.cancel()


async def test_as_a_gateway_sees_it(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        async with gateway(tmp_path, FOR_EVER, public_url="https://office.example.com") as remote_access:
            await eventually(lambda: remote_access.status.state is State.CONNECTED)
            wire = (await remote_access.snapshot()).to_wire()
            assert (wire["transport"], wire["transport_detail"]) == ("tcp", "process")
            assert wire["status"]["public_url"] == "https://office.example.com"
            (tmp_path / "run" / "frpc.log").touch()
            await remote_access.apply(SettingsUpdate(enabled=False))
            await eventually(lambda: remote_access.status.state is State.DISABLED)
            assert programs_in(tmp_path) == {}
        (tmp_path / "run" / "frpc.log").unlink()  # the program's own, and not ours to remove


async def test_a_program_that_ends_is_started_again(tmp_path: Path) -> None:
    source = """
        runs = os.path.join(os.path.dirname(__file__), "runs")
        with open(runs, "a") as file:
            file.write("x")
        if os.path.getsize(runs) != 2:
            sys.exit("no")
        print("ready", flush=True)
        while not os.path.exists(runs + "-end"):
            time.sleep(0.01)
        sys.exit("enough")
    """
    async with gateway(tmp_path, source) as remote_access:
        await eventually(lambda: remote_access.status.state is State.CONNECTED)
        (tmp_path / "runs-end").touch()
        await eventually(lambda: remote_access.status.state is State.RECONNECTING)
        seen = [(status.state, status.error_kind) for status in remote_access.history]
        message = remote_access.status.message
    for moment in (
        (State.FAILED, ErrorKind.PROCESS_EXITED),
        (State.CONNECTED, None),
        (State.RECONNECTING, ErrorKind.PROCESS_EXITED),
    ):
        assert moment in seen
    assert message is not None
    assert message.endswith("ended with exit status 1, saying: ready | enough")


async def test_a_missing_program_is_final(tmp_path: Path) -> None:
    async with gateway(tmp_path, "", command=["no-such-program"]) as remote_access:
        await eventually(lambda: remote_access.status.state is State.FAILED)
        status = remote_access.status
    assert status.error_kind is ErrorKind.MISSING_BINARY
    assert status.retry_at_unix is None
    assert status.message is not None
    assert "'no-such-program' is not installed" in status.message


# What it says, without processes


@given(st.lists(st.binary(max_size=40)), st.booleans())
def test_lines_do_not_depend_on_how_they_arrive(pieces: list[bytes], every_line: bool) -> None:
    output, whole = (Output(None, Secrets(KEY)) for _ in range(2))
    lines = [line for piece in pieces for line in output.receive(piece, every_line=True)] + output.end()
    assert lines == whole.receive(b"".join(pieces), every_line=True) + whole.end()
    brief = Output(None, Secrets(KEY))
    for piece in pieces:
        brief.receive(piece, every_line=every_line)
    brief.end()
    assert brief.last_words == output.last_words == whole.last_words


def test_a_line_without_end_is_kept_in_little() -> None:
    output = Output(None, Secrets(KEY))
    for _ in range(100):
        output.receive(b"x " * 50_000)
    (line,) = output.receive(b"y\nshort")
    assert len(line) == LINE_LIMIT
    assert output.end() == [b"short"]
    assert len(output.last_words) <= 160


@given(st.text(min_size=1, max_size=60), st.text(max_size=30), st.text(max_size=30))
def test_a_key_is_hidden_whatever_stands_around_it(key: str, before: str, after: str) -> None:
    try:
        secret = RelayKey(key)
    except ValueError:
        return
    around = dict.fromkeys(map(ord, "\r\n" + secret.reveal()))
    printed = before.translate(around) + secret.reveal() + after.translate(around)
    output = Output(None, Secrets(secret))
    (line,) = output.receive(printed.encode("utf-8", "replace") + b"\n") or [b""]
    assert secret.reveal() not in output.shown(line) or secret.reveal() == "…"
    assert SECRET not in repr([output, Secrets(secret)])


def test_what_a_pattern_looks_at() -> None:
    """A line as a person sees it: whole, without colours, and only until one has matched."""
    output = Output(re.compile("^up 1$"), Secrets(KEY))
    for data in (b"up 12\n", b"up ", b"1"):
        output.receive(data)
        assert not output.matched
    output.receive(b"\x1b[0m\x1b]0;title\x07\r")
    assert output.matched


def test_a_budget() -> None:
    budget = Budget(2, now=0)
    assert [budget.spend(0.1), budget.spend(0.2), budget.spend(0.3), budget.is_over, budget.spend(0.4)] == [
        *(True, True, False, True, False)
    ]
    assert not budget.is_over
    assert budget.spend(1.1)
    assert "***" in repr(Secrets(KEY))
