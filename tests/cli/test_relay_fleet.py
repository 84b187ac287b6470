"""`relay fleet key`, `publish`, `revoke` and `status`, with a real Redis."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner, Result
from redis_server import RealRedis, real_redis

from pioneer_tunnel import RelayKey
from pioneer_tunnel.cli.commands import pioneer_tunnel

FILE: Final = "operator.toml"


@pytest.fixture(scope="module")
def redis() -> Iterator[RealRedis]:
    with real_redis() as server:
        server.call("CONFIG", "SET", "requirepass", "swordfish")
        yield server


@pytest.fixture
def operator(tmp_path: Path, redis: RealRedis, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an operator, which is the current one."""
    monkeypatch.chdir(tmp_path)
    made = json.loads(fleet("key", "--operator", "--json").output)
    Path("redis.password").write_text("swordfish\n")
    Path("redis.password").chmod(0o600)
    Path(FILE).write_text(
        f'[relay.fleet]\nredis = "{redis.url}"\nredis_password_file = "redis.password"\n'
        f'operator_key = "{made["operator_key"]}"\n'
    )
    return tmp_path


def fleet(*words: str, config: bool = False) -> Result:
    more = ["--config", FILE] if config else []
    return CliRunner().invoke(pioneer_tunnel, ["relay", "fleet", *words, *more])


def status() -> list[dict[str, Any]]:
    tunnels: list[dict[str, Any]] = json.loads(fleet("status", "--json", config=True).output)["tunnels"]
    return tunnels


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = fleet("key", "--node", "fra1")
    assert made.exit_code == 0
    assert 'certificate = "fra1.pem"' in made.output
    assert stat.S_IMODE(Path("fra1.key").stat().st_mode) == 0o600
    assert "PRIVATE" not in made.output
    assert "--node NAME or --operator" in fleet("key").output
    assert "--node NAME or --operator" in fleet("key", "--node", "x", "--operator").output
    assert "--node" in fleet("key", "--node", "Fra 1").output
    assert "exists already" in fleet("key", "--node", "fra1").output


def test_from_publishing_to_revoking(operator: Path) -> None:
    published = fleet("publish", "office", "--url", "https://office.example.com", config=True)
    assert published.exit_code == 0, published.output
    key = RelayKey((operator / "office-key.txt").read_text().splitlines()[0])
    assert stat.S_IMODE((operator / "office-key.txt").stat().st_mode) == 0o600
    assert key.reveal() not in published.output
    (office,) = [one for one in status() if one["id"] == "office"]
    assert office["keys"] == [str(key.identity().public_key)]
    assert (office["urls"], office["revoked"]) == (["https://office.example.com"], False)
    shown = fleet("status", config=True).output
    assert "https://office.example.com" in shown
    revoked = fleet("revoke", "office", config=True)
    assert revoked.exit_code == 0, revoked.output
    (after,) = [one for one in status() if one["id"] == "office"]
    assert after["revoked"]
    assert after["serial"] > office["serial"]
    again = fleet("revoke", "office", config=True)
    assert again.exit_code == 1
    assert "--anyway" in again.output
    assert fleet("revoke", "office", "--anyway", config=True).exit_code == 0


def test_several_services_and_a_key_on_standard_output(operator: Path) -> None:
    words = ["box", "web=https://box.example.com", "api=https://api.example.com", "--key-file", "-"]
    published = CliRunner().invoke(pioneer_tunnel, ["relay", "fleet", "publish", *words, "--config", FILE])
    assert published.exit_code == 0
    RelayKey(published.stdout.splitlines()[0])
    assert "published 'box'" in published.stderr
    (box,) = [one for one in status() if one["id"] == "box"]
    assert box["urls"] == ["https://box.example.com", "https://api.example.com"]


def test_a_file_of_tunnels(operator: Path) -> None:
    keys = [RelayKey(f"a key for tests, which is long enough {index}") for index in range(2)]
    Path("tunnels.toml").write_text(
        "".join(
            f'[[relay.tunnels]]\nid = "many-{index}"\nurl = "https://many-{index}.example.com"\n'
            f'key = "{key.identity().public_key}"\n'
            for index, key in enumerate(keys)
        )
    )
    published = fleet("publish", "--tunnels", "tunnels.toml", "--valid-days", "10", "--json", config=True)
    assert published.exit_code == 0, published.output
    ids = [one["id"] for one in json.loads(published.stdout)["published"]]
    assert ids == ["many-0", "many-1"]
    assert {*ids} <= {one["id"] for one in status()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["publish"], "write NAME, or --tunnels FILE"),
        (["publish", "x"], "--url or SERVICE=URL"),
        (["publish", "x", "--url", "ftp://x"], "--url: the address 'ftp://x'"),
        (["publish", "x", "ssh=0.0.0.0:22"], "SERVICE=URL"),
        (["publish", "x", "--url", "https://x.example", "--public-key", "ed25519:00"], "--public-key"),
        (["publish", "x", "--url", "https://x.example", "--valid-days", "401"], "--valid-days"),
        (["publish", "x", "--url", "https://x.example", "--public-key", "k", "--key-file", "f"], "--key-file"),
        (["publish", "x", "--tunnels", FILE], "write NAME, or --tunnels FILE"),
        (["publish", "--tunnels", FILE, "--url", "https://x.example"], "--tunnels FILE has all"),
        (["publish", "--tunnels", FILE], "relay.tunnels"),
        (["revoke", "nobody"], "no published tunnel 'nobody'"),
    ],
)
def test_errors_name_the_option(operator: Path, words: list[str], message: str) -> None:
    result = fleet(*words, config=True)
    assert result.exit_code != 0
    assert message in result.output
    assert not (operator / "x-key.txt").exists()


def test_a_host_of_another_tunnel_is_refused(operator: Path) -> None:
    assert fleet("publish", "first", "--url", "https://taken.example.com", config=True).exit_code == 0
    second = fleet("publish", "second", "--url", "https://taken.example.com", config=True)
    assert second.exit_code == 2
    assert "--url: the published tunnel 'first' has 'taken.example.com' already" in second.output
    assert not (operator / "second-key.txt").exists()


def test_the_key_of_somebody_else_signs_nothing(operator: Path) -> None:
    (operator / "else").mkdir()
    assert fleet("key", "--operator", "--folder", "else").exit_code == 0
    words = ["publish", "x", "--url", "https://x.example", "--operator-key", "else/operator.key"]
    result = fleet(*words, config=True)
    assert result.exit_code == 2
    assert "--operator-key" in result.output


def test_secrets_that_others_may_read_are_refused(operator: Path) -> None:
    Path("operator.key").chmod(0o644)
    assert "chmod 600" in fleet("publish", "x", "--url", "https://x.example", config=True).output
    Path("operator.key").chmod(0o600)
    Path("redis.password").chmod(0o644)
    assert "chmod 600" in fleet("status", config=True).output


def test_a_wrong_password_and_a_redis_that_is_away_are_told(operator: Path) -> None:
    Path("redis.password").write_text("wrong")
    wrong = fleet("status", config=True)
    assert wrong.exit_code == 1
    assert "cannot be used" in wrong.output
    assert "wrong" not in wrong.output.replace("wrong number", "")
    Path(FILE).write_text(Path(FILE).read_text().replace('/redis"', '/nowhere"'))
    away = fleet("status", config=True)
    assert away.exit_code == 1
    assert "cannot be used" in away.output
