"""`relay init`, `add`, `remove`, `list` and `check`: from an empty folder to a visitor's answer.

What serves runs as a process of its own, the rest in the process of the tests.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import time
from pathlib import Path
from typing import Final

import pytest
import trustme
from click.testing import CliRunner, Result
from programs import Program, run, running
from rig import HANG, free_port

from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.certificates.config import AcmeConfig
from pioneer_tunnel.cli import relay_options
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.exit_codes import EXIT_CODES
from pioneer_tunnel.relay import RelayConfig
from pioneer_tunnel.relay.tunnels import each_address


def invoke(*words: str | Path, answers: str = "") -> Result:
    return CliRunner().invoke(pioneer_tunnel, ["relay", *map(str, words)], input=answers)


def ask(port: int, host: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as visitor:
        visitor.sendall(f"GET /one HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return b"".join(iter(lambda: visitor.recv(65536), b""))


def ask_until(port: int, host: str, answer: bytes) -> None:
    deadline, answered = time.monotonic() + HANG, b""
    while answer not in answered:
        assert time.monotonic() < deadline, answered
        answered = ask(port, host)
        time.sleep(0.05)


def expose_words(output: str, local: str) -> list[str]:
    """The arguments of the command that `relay add` has printed, with the local server's address."""
    command = shlex.split(re.search(r"pioneer-tunnel (expose .*)", output)[1])  # type: ignore[index]
    return [local if word == "8000" else word for word in command]


def test_from_an_empty_folder_to_a_visitor_and_back(tmp_path: Path, local_gateway: str) -> None:
    port = free_port()
    config = tmp_path / "relay.toml"
    made = run("relay", "init", "--yes", "--host", f"localhost:{port}", "--tls", "none", "--folder", tmp_path)
    assert made.process.returncode == 0, made.errors
    assert invoke("add", "home", "--config", config).exit_code == 0
    secret = (tmp_path / "home-key.txt").read_text().split()[0]

    with running("relay", "--config", config) as relay:
        relay.wait_for("gateways at")
        # A running relay takes another tunnel.
        added = run("relay", "add", "office", "--config", config)
        assert secret.encode() not in made.out + added.out + added.err
        relay.wait_for("added 'office'")
        words = expose_words(added.out.decode(), local_gateway)
        with running(*words, cwd=tmp_path) as gateway:
            gateway.wait_for(f"connected .*http://office.localhost:{port}")
            assert ask(port, f"office.localhost:{port}").endswith(b"hello from /one")
            assert 'id = "office"' in invoke("remove", "office", "--config", config).output
            gateway.wait_for("(?s)(reconnecting|failed)")
            ask_until(port, f"office.localhost:{port}", b"404 Not Found")
            gateway.process.kill()
        assert relay.interrupt(signal.SIGTERM) == 0
        assert [tunnel.id for tunnel in RelayConfig.load(config).tunnels] == ["home"]


def test_commands_at_the_same_time_lose_no_tunnel(tmp_path: Path) -> None:
    assert invoke("init", "--yes", "--host", "localhost:7300", "--tls", "none", "--folder", tmp_path).exit_code == 0
    config = tmp_path / "relay.toml"
    assert invoke("add", "t0", "--config", config).exit_code == 0
    programs = [Program("relay", "add", f"t{number}", "--config", config) for number in range(1, 4)]
    programs.append(Program("relay", "remove", "t0", "--config", config))
    assert [program.finish() for program in programs] == [0] * 4, [program.errors for program in programs]
    for program in programs:
        for pipe in (program.process.stdout, program.process.stderr):
            assert pipe is not None
            pipe.close()
    assert sorted(tunnel.id for tunnel in RelayConfig.load(config).tunnels) == ["t1", "t2", "t3"]
    for number in range(1, 4):
        key = RelayKey((tmp_path / f"t{number}-key.txt").read_text().split()[0])
        (entry,) = [tunnel for tunnel in RelayConfig.load(config).tunnels if tunnel.id == f"t{number}"]
        assert entry.key == key.identity().public_key


# relay init


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    issued = trustme.CA().issue_cert("relay.example.com", "*.relay.example.com")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(paths[0]))
    issued.private_key_pem.write_to_path(str(paths[1]))
    paths[1].chmod(0o600)
    return paths


def test_three_questions(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    folder = tmp_path / "new"
    chain, key = certificate
    answers = [
        "not a name",
        "wss://relay.example.com",
        "sometimes",
        "files",
        tmp_path / "none",
        chain,
        chain,
        key,
        folder,
    ]
    result = invoke("init", answers="".join(f"{answer}\n" for answer in answers))
    assert result.exit_code == 0, result.output
    for said in (
        "the address 'not a name'",
        "allowed are files, acme, proxy, none",
        "there is no file",
        "cannot be used",
    ):
        assert said in result.output
    config = RelayConfig.load(folder / "relay.toml")
    assert config.public_names == ("relay.example.com",)
    assert config.tls_certificate_path == chain
    assert (folder / "identity.hex").stat().st_mode & 0o777 == 0o600
    public_key = (folder / "identity.hex").read_text().split()[1]
    assert f"the relay's address: wss://relay.example.com\n   its identity:        {public_key}" in result.output
    assert (folder / "identity.hex").read_text().split()[0] not in result.output
    assert f"--config {folder}/relay.toml" in (folder / "pioneer-relay.service").read_text()


def test_automatic_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "new relay"
    result = invoke("init", answers=f"relay.example.com\nacme\n{folder}\n")
    assert result.exit_code == 0, result.output
    assert "whose terms you accept by this: https://letsencrypt.org/repository/" in result.output
    assert "ports 80 and 443" in result.output
    assert invoke("add", "office", "--config", folder / "relay.toml").exit_code == 0
    text = (folder / "relay.toml").read_text()
    config = RelayConfig.load(folder / "relay.toml")
    assert config.acme_config == AcmeConfig(terms_accepted=True, folder=folder / "certificates")
    (ours,), (http,) = each_address(config.ingress_addr), each_address(config.http_addr)
    assert (ours.host, ours.port, http.port) == (http.host, 443, 80)
    assert config.control_tls
    assert config.ingress_tls
    # The unit lets it write its certificates, and nothing else that is not its own.
    assert (folder / "certificates").stat().st_mode & 0o777 == 0o700
    unit = (folder / "pioneer-relay.service").read_text()
    assert f'ReadWritePaths="{folder}/certificates"\n' in unit
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in unit
    # What is proposed in a comment is valid, too.
    (folder / "relay.toml").write_text(re.sub("^# (directory|email)", r"\1", text, flags=re.MULTILINE))
    tried = RelayConfig.load(folder / "relay.toml").acme_config
    assert tried is not None
    assert ("staging" in tried.directory, tried.email) == (True, "you@example.com")


def test_a_port_of_its_own_leaves_the_authority_port_80(tmp_path: Path) -> None:
    words: list[str | Path] = [
        "init",
        "--yes",
        "--host",
        "relay.example.com:8443",
        "--tls",
        "acme",
        "--folder",
        tmp_path,
    ]
    assert invoke(*words).exit_code == 0
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in (tmp_path / "pioneer-relay.service").read_text()


def test_what_exists_is_replaced_only_on_request(tmp_path: Path) -> None:
    words: list[str | Path] = ["init", "--host", "localhost:7300", "--tls", "none", "--folder", tmp_path]
    assert invoke(*words, "--yes").exit_code == 0
    (tmp_path / "relay.toml").write_text("mine")
    for more, answers in ((["--yes"], ""), ([], "n\n"), ([], "y\nn\n"), ([], "")):
        result = invoke(*words, *more, answers=answers)
        assert result.exit_code == 1, result.output
        assert (tmp_path / "relay.toml").read_text() == "mine"
    assert invoke(*words, answers="y\ny\n").exit_code == 0
    assert invoke(*words, "--yes", "--replace").exit_code == 0
    RelayConfig.load(tmp_path / "relay.toml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--yes"], "--host is missing"),
        (["--host", "a b"], "--host: the address 'a b'"),
        (["--host", "localhost", "--tls", "maybe"], "'--tls': allowed is files, acme, proxy, none"),
        (["--host", "localhost", "--tls", "acme", "--yes"], "certifies no 'localhost'.*name in the public DNS"),
        (["--host", "192.0.2.1", "--tls", "acme", "--yes"], "certifies no '192.0.2.1'"),
        (["--host", "localhost", "--tls", "files", "--yes"], "--tls-certificate is missing"),
        (["--host", "localhost", "--tls-certificate", "none.pem"], "--tls-certificate: there is no file"),
        (["--host", "localhost", "--tls", "none", "--yes", "--listen", "7300"], "the address '7300' has no port"),
        (["--host", "localhost", "--tls", "none", "--yes", "--user", "a b"], "--user.* it is not the name of a user"),
        (
            ["--host", "localhost", "--tls", "none", "--yes", "--folder", "no/such/folder"],
            "no/such/folder cannot be made",
        ),
        (
            ["--host", "localhost", "--tls", "none", "--yes", "--folder", "/dev/null/x"],
            "'/dev/null/x|/dev/null/x cannot",
        ),
        (["--host", "localhost", "--tls", "none", "--yes", "--folder", "/proc"], "/proc.* cannot be"),
    ],
)
def test_an_error_names_the_option(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("init", *words)
    assert result.exit_code != 0
    assert re.search(said, result.output.replace("\n", " ")), result.output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "option"),
    [([], "--host"), (["--host", "localhost"], "--tls"), (["--host", "h.test", "--tls", "none"], "--folder")],
)
def test_a_question_that_nobody_answers_names_the_option(words: list[str], option: str, tmp_path: Path) -> None:
    """A process: for the lowest click's `CliRunner`, the end of the input is the default, a folder of the system."""
    asked = run("relay", "init", *words, cwd=tmp_path)
    assert asked.process.returncode == 2
    assert f"nobody answers the question; give {option}" in asked.errors
    assert [*tmp_path.iterdir()] == []


# relay add, remove, list, check


CONFIG: Final = """\
# Kim's relay
[relay]
id = "relay-1"
control_addr = "127.0.0.1:0"
ingress_addr = "127.0.0.1:0"
public_names = ["relay.test"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "a b"], "NAME|--url or --bind: 'a b' and relay.test make no host"),
        (["add", "a\tb", "--url", "http://a.test", "--key-file", "k"], "NAME: allowed are 1 to 128 printable"),
        (["add", "../x", "--url", "http://a.test"], "'../x' is no name for a file; .* --key-file"),
        (["add", "x", "--url", "a.test"], "--url: the address 'a.test' is not a URL"),
        (["add", "x", "--url", "http://a.test", "--passthrough"], "--passthrough: its visitors come with TLS"),
        (["add", "x", "--bind", "7300"], "--bind: the address '7300' has no port"),
        (["add", "x", "web"], "SERVICE=WHERE: write a name"),
        (["add", "x", "WEB=http://a.test"], "SERVICE=WHERE: write a name"),
        (["add", "x", "web=nonsense"], "SERVICE=WHERE: the address 'nonsense' has no port"),
        (["add", "x", "web=http://a.test", "--url", "http://b.test"], "stands in place of --url"),
        (["add", "x", "--public-key", "ed25519:1234"], "--public-key: a public key is"),
        (["add", "x", "--public-key", "ed25519:1234", "--key-file", "y"], "--key-file is for a new key"),
        (["add", "x", "--service", " "], "--service: allowed are 1 to 128"),
        (["add", "x", "--key-file", "/proc/key"], "/proc/key cannot be written"),
        (["add", "x", "--key-file", "relay.toml"], "relay.toml exists already"),
        (["remove", "x"], "NAME: the relay has no tunnel 'x'"),
    ],
)
def test_what_cannot_be_done_names_the_option_and_changes_nothing(
    words: list[str], said: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    result = invoke(*words, "--config", config)
    assert result.exit_code != 0
    assert re.search(said, result.output.replace("\n", " ")), result.output
    assert config.read_text() == CONFIG
    assert {path.name for path in config.parent.iterdir()} <= {"relay.toml", "relay.toml.lock"}


def test_the_file_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay.toml in the current folder may be somebody else's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relay.toml").write_text(CONFIG)
    assert "name the relay's file with --config FILE" in invoke("list").output
    assert invoke("--config", "relay.toml", "list").exit_code == 0


def test_a_relay_finds_the_usual_file_as_its_commands_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tmp_path / "usual.toml"
    monkeypatch.setattr(relay_options, "USUAL_CONFIG", usual)
    assert "name the relay's file with --config FILE" in invoke().output
    usual.write_text("[relay]\nid = 3\n")
    for words in ((), ("list",)):
        result = invoke(*words)
        assert "usual.toml: relay.id" in result.output
        assert result.exit_code == EXIT_CODES[ErrorKind.INVALID_SETTINGS]


def test_a_key_on_standard_output_and_nowhere_else(config: Path) -> None:
    done = run("relay", "add", "home", "--config", config, "--key-file", "-")
    assert done.process.returncode == 0
    secret, public = done.out.decode().split()
    assert RelayKey(secret).identity().public_key == RelayConfig.load(config).tunnels[0].key
    assert public in config.read_text()
    assert secret.encode() not in done.err
    assert b"--key-file KEY-FILE" in done.err
    assert {path.name for path in config.parent.iterdir()} == {"relay.toml", "relay.toml.lock"}


def test_a_public_key_that_exists(config: Path) -> None:
    public_key = new_relay_key().identity().public_key
    words = ["web=http://a.test", "ssh=127.0.0.1:2222", "--service", "kims", "--public-key", str(public_key)]
    result = invoke("add", "box", *words, "--config", config)
    assert result.exit_code == 0, result.output
    assert expose_words(result.output, "8000")[1:3] == ["web=8000", "ssh=8001"]
    assert "--service kims" in result.output
    listed = json.loads(invoke("list", "--config", config, "--json").output)
    assert [(entry["id"], entry["keys"], entry["service_label"]) for entry in listed] == [
        ("box", [str(public_key)], "kims")
    ]
    assert [(one["name"], one["url"], one["bind_addr"]) for one in listed[0]["services"]] == [
        ("web", "http://a.test", []),
        ("ssh", None, ["127.0.0.1:2222"]),
    ]


def test_a_list_for_people(config: Path) -> None:
    assert "has no tunnels" in invoke("list", "--config", config).output
    for words in (["a", "--url", "https://a.test", "--passthrough"], ["b", "--bind", "127.0.0.1:7301"], ["c"]):
        assert invoke("add", *words, "--config", config).exit_code == 0
    assert invoke("list", "--config", config).output == (
        "tunnel  service  visitors come to     TLS ends at  keys\n"
        "a                https://a.test       gateway      1\n"
        "b       tcp      127.0.0.1:7301                    1\n"
        "c                http://c.relay.test  no TLS       1\n"
    )


def test_a_check_says_where(config: Path) -> None:
    good = invoke("check", "--config", config)
    assert (good.exit_code, good.output) == (0, f"{config}: nothing is wrong\n")
    config.chmod(0o666)
    warned = invoke("check", "--config", config)
    assert warned.exit_code == 0
    assert warned.output.startswith(f"{config}: warning: other users may write")
    config.write_text(CONFIG.replace("id =", "name ="))
    wrong = invoke("check", "--config", config)
    assert wrong.exit_code == 1
    assert f"{config}:3: error: relay.name: unknown key" in wrong.output
    found = json.loads(invoke("check", "--config", config, "--json").output)
    assert {(one["severity"], one["key"], one["line"]) for one in found} == {
        ("error", "relay.id", 2),
        ("error", "relay.name", 3),
    }


@pytest.mark.parametrize("name", ["init", "add", "remove", "list", "check"])
def test_help_has_examples(name: str) -> None:
    result = invoke(name, "--help")
    assert re.search(rf"Examples?:\n    pioneer-tunnel relay {name}", result.output), result.output
