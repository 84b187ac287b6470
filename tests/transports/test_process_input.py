"""Transport `process`: what a program is given, and what it does not get."""

from __future__ import annotations

import json
import os
import signal
import stat
import textwrap
from base64 import b64encode
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from process_rig import (
    FOR_EVER,
    LINUX,
    REAL_PROGRAMS,
    SECRET,
    connected,
    failure_of,
    no_process_left,
    parent_of,
    programs_in,
    run_files,
    run_for,
)

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.proxies import Proxy, ProxyCredentials
from pioneer_tunnel._net.proxies.choice import ProxyChoice

pytestmark = REAL_PROGRAMS


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
