"""`config check` and `config show`: every problem with its line, where values are from, and no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from programs import KEY

from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.transports.interface import IN_CLEAR, TLS_OF_NATIVE, TLS_OF_RATHOLE

pytestmark = pytest.mark.usefixtures("user_config")


def ask(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(pioneer_tunnel, ["config", *map(str, arguments)])
    return result.exit_code, result.output


def write(folder: Path, *lines: str) -> Path:
    path = folder / "gateway.toml"
    path.write_text("\n".join(["[gateway.remote_access]", *lines]))
    return path


def with_key(config: Path) -> None:
    CliRunner().invoke(pioneer_tunnel, ["key", "set", "--config", str(config)], input=KEY.reveal())


def test_a_good_configuration(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addr = "wss://relay.example.com"')
    with_key(config)
    assert ask("check", "--config", config) == (0, f"{config}: nothing is wrong\n")


def test_a_key_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addr = "wss://relay.example.com"')
    code, said = ask("check", "--config", config)
    assert (code, f"{config}: warning: no relay key is stored" in said) == (0, True)


def test_each_problem_has_its_line(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        'relay_adr = "x"',
        "restart_max_ms = [",
        "  1,",
        "]",
        "[gateway.remote_access.access]",
        'alow = ["x"]',
    )
    (tmp_path / "gateway-settings.toml").write_text('[other]\n[remote_access]\nenabled = "yes"\n')
    code, said = ask("check", "--config", config)
    assert code == 1
    for told in (
        f"{config}:2: error: gateway.remote_access.relay_adr: unknown key; the nearest known one is 'relay_addr'",
        f"{config}:3: error: gateway.remote_access.restart_max_ms: ",
        f"{config}:7: error: gateway.remote_access.access.alow: ",
        f"{tmp_path / 'gateway-settings.toml'}:3: error: remote_access.enabled: 'yes' is refused: allowed is",
    ):
        assert told in said


def test_what_is_no_toml_has_line_and_column(tmp_path: Path) -> None:
    code, said = ask("check", "--config", write(tmp_path, "relay_addr"))
    assert (code, "line 2, column 11: not TOML" in said) == (1, True)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('ca_file = "gone.pem"', "ca_file"),
        ('access = { basic_auth = "gone" }', "access"),
        ('tls = { certificate = "gone.pem", private_key = "gone.pem" }', "tls"),
    ],
)
def test_files_that_are_named_are_read(tmp_path: Path, line: str, key: str) -> None:
    config = write(tmp_path, 'relay_addr = "wss://relay.example.com"', line)
    code, said = ask("check", "--config", config)
    assert (code, f"{config}:3: error: gateway.remote_access.{key}: " in said) == (1, True)
    assert "gone" in said


def test_settings_that_contradict_the_configuration_are_named_where_they_are(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addr = "wss://relay.example.com"')
    settings = tmp_path / "gateway-settings.toml"
    settings.write_text('[remote_access]\ntransport = "tcp"\n')
    code, said = ask("check", "--config", config)
    assert (code, f"{settings}:2: error: remote_access.transport: " in said) == (1, True)


@pytest.mark.parametrize(
    ("address", "instead"),
    [("relay.example.com:2333", TLS_OF_RATHOLE), ("ws://relay.example.com", TLS_OF_NATIVE)],
)
def test_a_link_without_tls_is_a_warning_in_the_words_of_the_log(tmp_path: Path, address: str, instead: str) -> None:
    config = write(tmp_path, f'relay_addr = "{address}"')
    with_key(config)
    told = f"{config}:2: warning: gateway.remote_access.relay_addr: {IN_CLEAR % (address, instead)}\n"
    assert ask("check", "--config", config) == (0, told)


def test_a_bare_address_means_no_encryption_and_the_warning_says_so() -> None:
    assert "bare host:port alone means tcp" in TLS_OF_RATHOLE


def test_each_of_several_relays_is_warned_about(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addrs = ["wss://one.test", "ws://two.test", "ws://three.test"]')
    with_key(config)
    begin = f"{config}:2: warning: gateway.remote_access.relay_addrs: "
    told = [begin + IN_CLEAR % (address, TLS_OF_NATIVE) for address in ("ws://two.test", "ws://three.test")]
    assert ask("check", "--config", config)[1].splitlines() == told


@pytest.mark.parametrize("address", ["127.0.0.1:2333", "ws://localhost:80", "wss://relay.example.com"])
def test_no_warning_on_this_machine_or_with_tls(tmp_path: Path, address: str) -> None:
    config = write(tmp_path, f'relay_addr = "{address}"')
    with_key(config)
    assert ask("check", "--config", config)[1].endswith("nothing is wrong\n")


def shown(*arguments: str | Path) -> dict[str, Any]:
    code, said = ask("show", "--json", *arguments)
    assert code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


def test_show_says_where_each_value_is_from(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addr = "relay.example.com:1"', "", 'ca_file = "ca.pem"')
    settings = tmp_path / "gateway-settings.toml"
    settings.write_text('[remote_access]\nenabled = true\ntransport = "websocket"\n')
    with_key(config)
    rows = shown("--config", config)
    assert rows["relay_addr"] == {"value": "'wss://relay.example.com:1'", "source": f"{config}:2"}
    assert rows["ca_file"] == {"value": "'ca.pem'", "source": f"{config}:4"}
    assert rows["transport"] == {"value": "'websocket'", "source": f"{settings}:3"}
    assert rows["enabled"] == {"value": "true", "source": f"{settings}:2"}
    assert rows["max_restarts"] == {"value": "0", "source": "default"}
    assert rows["proxy"] == {"value": None, "source": "default"}
    assert KEY.reveal() not in ask("show", "--config", config)[1]


def test_show_says_where_several_relays_are_from(tmp_path: Path) -> None:
    config = write(tmp_path, 'relay_addrs = ["wss://one.test", "wss://two.test"]', "allow_server_override = true")
    with_key(config)
    rows = shown("--config", config)
    assert rows["relay_addr"] == {"value": "'wss://one.test'", "source": f"{config}:2"}
    assert rows["relay_addrs"] == {"value": "'wss://one.test', 'wss://two.test'", "source": f"{config}:2"}
    settings = tmp_path / "gateway-settings.toml"
    settings.write_text('[remote_access]\nserver = "wss://mine.test"\n')
    rows = shown("--config", config)
    assert rows["relay_addr"] == {"value": "'wss://mine.test'", "source": f"{settings}:2"}
    assert rows["relay_addrs"]["value"] is None


def test_show_of_the_client(user_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = user_config / "pioneer-tunnel.toml"
    file.write_text('[expose]\nrelay = "wss://relay.example.com"\n\nheartbeat = 15\n')
    file.chmod(0o600)
    monkeypatch.setenv("PIONEER_TUNNEL_HEARTBEAT", "20")
    rows = shown()
    assert rows["relay"] == {"value": "'wss://relay.example.com'", "source": f"{file}:2"}
    assert rows["heartbeat"] == {"value": "'20'", "source": "environment PIONEER_TUNNEL_HEARTBEAT"}
    assert rows["transport"] == {"value": "'websocket'", "source": "default"}
    assert rows["ca_file"] == {"value": None, "source": "default"}
    assert ask("check") == (0, f"{file}: nothing is wrong\n")
    file.write_text('[expose]\n\nproxy = "http://user:hunter2-hunter2@proxy"\n')
    code, said = ask("check")
    assert (code, f"{file}:3: error: expose.proxy: " in said) == (1, True)
    assert "hunter2" not in said


def test_check_without_a_client_file() -> None:
    assert ask("check") == (0, "there is no client file: nothing is wrong\n")
