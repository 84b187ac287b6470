"""What an operator does with a relay's file: what is written, and what is found wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from rig import KEY, free_port

from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._model.keys import SigningIdentity, new_relay_key
from pioneer_tunnel._storage import files
from pioneer_tunnel.relay import RelayConfig
from pioneer_tunnel.relay.administration.check import Finding, check, check_file
from pioneer_tunnel.relay.administration.editing import add_tunnel, remove_tunnel
from pioneer_tunnel.relay.administration.for_gateways import default_url, expose_command, relay_url
from pioneer_tunnel.relay.administration.key_file import new_key_file
from pioneer_tunnel.relay.administration.new_relay import CertificateFiles, NewRelay, Tls, write_new_relay
from pioneer_tunnel.relay.administration.unit import is_user, unit_text

CONFIG: Final = f"""\
# Ask Kim first.
[relay]
id = "relay-1"
control_addr = "127.0.0.1:7300"
ingress_addr = "127.0.0.1:7380"   # visitors
public_names = ["relay.example.com:7300"]

[[relay.tunnels]]   # Kim's
id = "office"
url = "http://office.test"
key = "{KEY.identity().public_key}"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "relay.toml"
    path.write_bytes(CONFIG.encode())
    path.chmod(0o640)
    return path


def entry(name: str, **more: Any) -> dict[str, Any]:
    way = {"url": f"http://{name}.test"} if more.keys().isdisjoint({"url", "services"}) else {}
    return {"id": name, "key": str(new_relay_key().identity().public_key), **way, **more}


def names(config: Path) -> list[str]:
    return [tunnel.id for tunnel in RelayConfig.load(config).tunnels]


# Editing


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_the_operators_text_stays(config: Path, start: bytes, newline: bytes) -> None:
    before = start + CONFIG.encode().replace(b"\n", newline)
    config.write_bytes(before)
    changed = add_tunnel(config, entry("home"))
    assert changed == RelayConfig.load(config)
    assert names(config) == ["office", "home"]
    assert config.read_bytes().startswith(before)
    assert config.stat().st_mode & 0o777 == 0o640
    assert 'id = "home"' in remove_tunnel(config, "home")
    assert config.read_bytes() == before
    assert remove_tunnel(config, "office").startswith("[[relay.tunnels]]   # Kim's")
    assert names(config) == []
    assert config.read_bytes().startswith(start + b"# Ask Kim first." + newline)


def refused(do: Callable[[], object]) -> str:
    with pytest.raises(InvalidSettingsError) as refusal:
        do()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (entry("office"), "id: the relay has a tunnel 'office' already"),
        (entry("a\nb"), "id = 'a\\nb': allowed are 1 to 128 printable characters"),
        (entry("x" * 129), "id"),
        (entry("home", url="http://office.test"), "url = .*stands in tunnels"),
        (entry("home", url="ftp://x.test"), "url: the address 'ftp://x.test' has another scheme"),
        (entry("home", key=str(KEY.identity().public_key)), "key: stands in tunnels"),
        (entry("home", bind_addr="127.0.0.1:7380"), "tunnels.1..bind_addr is ingress_addr too"),
        (entry("home", url="http://*.box.test"), "relay.names_file: is missing"),
    ],
)
def test_what_is_not_valid_changes_nothing(config: Path, new: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidSettingsError, match=why.replace("\\n", r"\\n")):
        add_tunnel(config, new)
    assert config.read_text() == CONFIG


def test_a_file_that_is_not_valid_is_not_edited(config: Path) -> None:
    broken = CONFIG.replace("ingress_addr", "ingres_addr")
    config.write_text(broken)
    assert "relay.ingres_addr: unknown key; the nearest known one is 'ingress_addr'" in refused(
        lambda: add_tunnel(config, entry("home"))
    )
    assert "relay.ingres_addr" in refused(lambda: remove_tunnel(config, "office"))
    assert config.read_text() == broken


def test_removing_what_is_not_there(config: Path) -> None:
    assert refused(lambda: remove_tunnel(config, "offic")).endswith("the relay has no tunnel 'offic'; it has 'office'")
    with pytest.raises(StorageError, match="there is no file"):
        add_tunnel(config.with_name("other.toml"), entry("home"))
    assert {path.name for path in config.parent.iterdir()} == {"relay.toml", "relay.toml.lock"}


def test_edits_at_the_same_time_lose_nothing(config: Path) -> None:
    threads = [threading.Thread(target=add_tunnel, args=(config, entry(f"t{number}"))) for number in range(8)]
    threads.append(threading.Thread(target=remove_tunnel, args=(config, "office")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(config)) == [f"t{number}" for number in range(8)]


def test_the_edit_of_a_program_without_our_lock_is_not_lost(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor saves the file between our reading and our writing."""
    replace = files.replace
    saved: list[Path] = []

    def save_first(path: Path, content: bytes, **options: Any) -> bool:
        if not saved:
            saved.append(path)
            path.write_text(CONFIG.replace("# Ask Kim first.", "# Ask Lee first."))
        return replace(path, content, **options)

    monkeypatch.setattr(files, "replace", save_first)
    add_tunnel(config, entry("home"))
    assert saved
    assert names(config) == ["office", "home"]
    assert config.read_text().startswith("# Ask Lee first.")


def test_a_file_that_always_changes_is_given_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "replace", lambda *_, **__: False)
    with pytest.raises(StorageError, match="changes all the time"):
        add_tunnel(config, entry("home"))


def test_a_key_file_is_new_and_private_and_goes_with_a_failure(tmp_path: Path) -> None:
    path, key = tmp_path / "key.txt", new_relay_key()
    with new_key_file(path, key):
        assert path.read_text().splitlines() == [key.reveal(), str(key.identity().public_key)]
        assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    with pytest.raises(ZeroDivisionError), new_key_file(path, key):
        raise ZeroDivisionError
    assert not path.exists()
    path.write_text("another key")
    with pytest.raises(StorageError, match="exists already"), new_key_file(path, key):
        pytest.fail("it was replaced")
    assert path.read_text() == "another key"


def test_two_key_files_of_one_name_at_the_same_moment_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first, second = tmp_path / "key.txt", new_relay_key(), new_relay_key()
    replace = os.replace

    def after_another(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(StorageError, match="exists already"), new_key_file(path, second):
            pytest.fail("both were written")
        replace(*arguments, **options)

    monkeypatch.setattr(os, "replace", after_another)
    with new_key_file(path, first):
        assert os.replace is replace
    assert path.read_text().startswith(first.reveal())
    assert [*tmp_path.iterdir()] == [path]


# What gateways need


def loaded(text: str, folder: Path) -> RelayConfig:
    path = folder / "any.toml"
    path.write_text(text)
    return RelayConfig.load(path)


@pytest.mark.parametrize(
    ("change", "url", "default"),
    [
        ({}, "ws://relay.example.com:7300", "http://home.relay.example.com:7380"),
        ({'ingress_addr = "127.0.0.1:7380"': 'ingress_addr = "127.0.0.1:7300"'}, "ws://relay.example.com:7300",
         "http://home.relay.example.com:7300"),
        ({"[[relay": 'trust_forwarded_from = ["127.0.0.1"]\n[[relay', ":7300\"]": "\"]"}, "wss://relay.example.com",
         "https://home.relay.example.com"),
        ({"relay.example.com": "192.0.2.7"}, "ws://192.0.2.7:7300", None),
    ],
)  # fmt: skip
def test_addresses_follow_from_the_relays_name(
    change: dict[str, str], url: str, default: str | None, tmp_path: Path
) -> None:
    text = CONFIG
    for old, new in change.items():
        text = text.replace(old, new, 1)
    config = loaded(text, tmp_path)
    assert relay_url(config) == url
    found = default_url(config, "Home")
    assert (None if found is None else str(found)) == default
    assert default_url(config, "a home") is None


def test_the_command_for_the_gateway(tmp_path: Path) -> None:
    text = CONFIG.replace('url = "http://office.test"', 'service = "of Kim"') + (
        '[[relay.tunnels.services]]\nname = "web"\nurl = "http://office.test"\n'
        '[[relay.tunnels.services]]\nname = "ssh"\nbind_addr = "127.0.0.1:7322"\n'
    )
    config, identity = loaded(text, tmp_path), SigningIdentity.generate().public_key
    assert expose_command(config, config.tunnels[0], identity=identity, key_file="a key") == (
        "pioneer-tunnel expose web=8000 ssh=8001 --relay ws://relay.example.com:7300 --key-file 'a key'"
        f" --relay-identity {identity} --service 'of Kim'"
    )


# A new relay


@pytest.mark.parametrize(
    ("name", "tls", "address"),
    [
        ("localhost:7300", "none", "127.0.0.1:7300"),
        ("[::1]:7300", "none", "[::1]:7300"),
        ("relay.example.com", "proxy", "127.0.0.1:8080"),
        ("relay.example.com:8443", "none", "[::]:8443"),
        ("relay.example.com", "none", "[::]:80"),
    ],
)
def test_a_new_relay_is_valid(name: str, tls: Tls, address: str, tmp_path: Path) -> None:
    new = NewRelay(public_name=name, tls=tls, folder=tmp_path / "new")
    config, identity = write_new_relay(new, program=["/bin/relay"], user="kim", replace=False)
    assert config == RelayConfig.load(new.config_path)
    assert config.control_addr == config.ingress_addr
    assert str(config.control_addr).replace("0.0.0.0", "[::]") == address
    assert new.dialled.audience in config.public_names
    assert {path.stat().st_mode & 0o777 for path in new.folder.iterdir()} == {0o600}
    assert str(identity.public_key) in new.identity_path.read_text()
    assert check_file(new.config_path) == []


def test_what_exists_is_replaced_on_request_alone_and_the_identity_never(tmp_path: Path) -> None:
    new = NewRelay(public_name="localhost:7300", tls="none", folder=tmp_path)
    _, identity = write_new_relay(new, program=["/bin/relay"], user="kim", replace=False)
    add_tunnel(new.config_path, entry("home"))
    with pytest.raises(StorageError, match="exists already"):
        write_new_relay(new, program=["/bin/relay"], user="lee", replace=False)
    assert names(new.config_path) == ["home"]
    _, again = write_new_relay(new, program=["/bin/relay"], user="lee", replace=True)
    assert again.public_key == identity.public_key
    assert names(new.config_path) == []
    assert "User=lee" in new.unit_path.read_text()


@pytest.mark.parametrize("blocked", ["relay.toml", "pioneer-relay.service", "identity.hex"])
def test_if_one_file_cannot_be_written_none_is_new(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).mkdir()
    new = NewRelay(public_name="localhost:7300", tls="none", folder=tmp_path)
    with pytest.raises(StorageError, match=blocked):
        write_new_relay(new, program=["/bin/relay"], user="kim", replace=True)
    assert {path.name for path in tmp_path.iterdir()} == {blocked, "relay.toml.lock"}


@pytest.mark.parametrize("name", ["", "relay example", "https://relay", "relay:0", "user@relay"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="address"):
        NewRelay(public_name=name, tls="none", folder=tmp_path)


def test_a_path_adds_no_line_to_the_unit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be printed"):
        NewRelay(public_name="localhost", tls="none", folder=tmp_path / "x\nUser=root")
    with pytest.raises(ValueError, match="cannot be printed"):
        CertificateFiles(tmp_path, Path(os.fsdecode(b"\xff")))
    assert not is_user("kim\nUser=root")
    assert not is_user("")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    folder = tmp_path / "100% of $HOME; "
    folder.mkdir()
    (folder / "true").symlink_to("/bin/true")
    unit = tmp_path / "pioneer-relay.service"
    unit.write_text(unit_text(command=[str(folder / "true"), 'a "quoted" \\ word'], user="root", port=443))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Checking


def found(config: Path, *, now: datetime | None = None) -> dict[str, str]:
    return {
        finding.key: f"{finding.severity} {finding.line} {finding.message}" for finding in check_file(config, now=now)
    }


def test_each_problem_has_its_key_and_its_line(config: Path) -> None:
    config.write_text(CONFIG.replace('"relay-1"', "3").replace("url =", "uri =") + "[relay.limits]\npending = -1\n")
    lines = config.read_text().splitlines()
    at = {key: int(text.split()[1]) for key, text in found(config).items()}
    assert list(at.values()) == sorted(at.values())
    assert {key: lines[line - 1] for key, line in at.items()} == {
        "relay.id": "id = 3",
        "relay.tunnels[0].url": "[[relay.tunnels]]   # Kim's",  # where it is missing
        "relay.tunnels[0].uri": 'uri = "http://office.test"',
        "relay.limits.pending": "pending = -1",
    }
    assert re.search(r"error \d+ -1 is refused: allowed is", found(config)["relay.limits.pending"])


def test_a_file_that_is_not_toml(config: Path) -> None:
    config.write_text(CONFIG + "x = [\n")
    assert check_file(config) == [
        Finding(severity="error", key="", message="line 13, column 1: not TOML: Invalid value")
    ]
    config.write_bytes(b"\xff")
    assert "not UTF-8" in found(config)[""]
    config.unlink()
    with pytest.raises(StorageError, match="there is no file"):
        check_file(config)


def test_files_that_it_names(config: Path) -> None:
    config.write_text(
        CONFIG.replace("public_names", 'identity_key_file = "identity.hex"\nnames_file = "names.json"\npublic_names')
        + '[relay.tunnels.access]\nbearer_tokens = "tokens"\n'
    )
    (config.parent / "names.json").write_text("{}")
    config.chmod(0o666)
    assert {key: text.split()[0] for key, text in found(config).items()} == {
        "": "warning",
        "relay.identity_key_file": "error",
        "relay.names_file": "error",
        "relay.tunnels[0].access": "error",
    }
    assert "there is none" in found(config)["relay.identity_key_file"]


def with_certificate(config: Path, *hosts: str, more: str = "") -> None:
    issued = trustme.CA().issue_cert(
        *hosts, not_before=datetime(2026, 1, 1, tzinfo=UTC), not_after=datetime(2026, 4, 1, tzinfo=UTC)
    )
    issued.private_key_pem.write_to_path(config.with_name("key.pem"))
    issued.cert_chain_pems[0].write_to_path(config.with_name("cert.pem"))
    config.with_name("key.pem").chmod(0o600)
    files = 'tls_certificate = "cert.pem"\ntls_private_key = "key.pem"\n'
    config.write_text(CONFIG.replace("http:", "https:").replace("\n[[", f"{files}{more}\n[[", 1))


FEBRUARY: Final = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("days", "what"),
    [(-40, "error 7 the certificate is valid from 2026-01-01 00:00 UTC on, not yet"), (0, None),
     (50, "warning 7 the certificate expires on 2026-04-01, in 9 days; renew it"),
     (59, "error 7 the certificate has expired, on 2026-04-01 at 00:00 UTC")],
)  # fmt: skip
def test_the_dates_of_the_certificate(config: Path, days: int, what: str | None) -> None:
    with_certificate(config, "relay.example.com", "office.test")
    assert found(config, now=FEBRUARY + timedelta(days)).get("relay.tls_certificate") == what


def test_the_hosts_of_the_certificate(config: Path) -> None:
    with_certificate(config, "relay.example.com", "office.test")
    assert found(config, now=FEBRUARY) == {}
    with_certificate(config, "*.example.com", "*.office.test")
    why = "the certificate is not for 'office.test'; it is for *.example.com, *.office.test"
    assert found(config, now=FEBRUARY) == {"relay.tunnels[0].url": f"error 12 {why}"}
    with_certificate(config, "example.com")
    assert [*found(config, now=FEBRUARY)] == ["relay.public_names[0]", "relay.tunnels[0].url"]
    with_certificate(config, "example.com", more="announce_certificate = false\n")
    assert found(config, now=FEBRUARY) == {}, "a proxy in front shows another one"
    with_certificate(config, "relay.example.com", more="ingress_tls = false\n")
    assert found(config, now=FEBRUARY) == {}
    with_certificate(config, "relay.example.com", "office.test")
    config.write_text(config.read_text().replace("https:", "http:"))
    assert found(config, now=FEBRUARY)["relay.tunnels[0].url"].startswith("warning 12 visitors come with TLS")
    config.write_text(config.read_text().replace("relay.example.com:7300", "192.0.2.7:7300"))
    assert "not for '192.0.2.7'" in found(config, now=FEBRUARY)["relay.public_names[0]"]


def test_a_certificate_for_an_ip_address(config: Path) -> None:
    with_certificate(config, "192.0.2.7", "office.test")
    config.write_text(config.read_text().replace("relay.example.com:7300", "192.0.2.7:7300"))
    assert found(config, now=FEBRUARY) == {}


def test_a_certificate_that_cannot_be_used(config: Path) -> None:
    with_certificate(config, "relay.example.com", "office.test")
    config.with_name("key.pem").chmod(0o644)
    assert "chmod go=" in found(config, now=FEBRUARY)["relay.tls_private_key"]
    config.with_name("key.pem").write_text("none")
    assert "cannot be used" in found(config, now=FEBRUARY)["relay.tls_certificate"]


async def test_addresses_that_are_not_free(config: Path) -> None:
    control, bound = free_port(), free_port()
    config.write_text(
        CONFIG.replace("7300", str(control))
        .replace("7380", "0")
        .replace("url =", f'bind_addr = "127.0.0.1:{bound}"\nurl =')
    )
    assert await check(config, running=False) == []
    async with trio.open_nursery() as nursery:
        for port in (control, bound):
            await nursery.start(trio.serve_tcp, trio.sleep, port)
        taken = await check(config, running=False)
        assert [(finding.key, finding.line) for finding in taken] == [
            ("relay.control_addr", 4),
            ("relay.tunnels[0].bind_addr", 10),
        ]
        assert all("Address already in use" in finding.message for finding in taken)
        assert await check(config, running=True) == []
        nursery.cancel_scope.cancel()


async def test_the_address_that_an_authority_asks_at_is_not_free(config: Path) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        text = CONFIG.replace("7300", str(free_port())).replace("7380", "0").replace("http:", "https:")
        config.write_text(text.replace("[[", f'http_addr = "127.0.0.1:{port}"\nacme = true\n\n[[', 1))
        assert [finding.key for finding in await check(config, running=False)] == ["relay.http_addr"]


def test_a_missing_extra_for_automatic_certificates_is_found(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG.replace("http:", "https:").replace("[[", "acme = true\n\n[[", 1)
    config.write_text(text)
    assert check_file(config) == []
    monkeypatch.setitem(sys.modules, "pioneer_tunnel.certificates.client", None)
    (finding,) = check_file(config)
    assert (finding.severity, finding.key) == ("error", "relay.acme")
    assert "pip install 'pioneer-tunnel[acme]'" in finding.message
    assert config.read_text().splitlines()[(finding.line or 0) - 1] == "acme = true"
    assert [*config.parent.iterdir()] == [config], "nothing was made"
