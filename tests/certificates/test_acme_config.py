"""The key `acme`, its table, and what does not go together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rig import relay_config, tunnel_entry

from pioneer_tunnel import AcmeConfig, CertificateStatus, InvalidSettingsError, RemoteAccessConfig, State, Status
from pioneer_tunnel.cli.commands import pioneer_tunnel
from pioneer_tunnel.cli.status_lines import StatusLines
from pioneer_tunnel.relay import RelayConfig

STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"


def relay_table(**changes: Any) -> RelayConfig:
    table: dict[str, Any] = {
        "control_addr": "127.0.0.1:8443",
        "ingress_addr": "127.0.0.1:443",
        "id": "relay",
        "public_names": ["relay.example.com:8443"],
    }
    return RelayConfig.from_table(table | changes, base_dir="/srv")


def test_true_is_short_for_lets_encrypt() -> None:
    config = relay_table(acme=True)
    assert config.acme == AcmeConfig(terms_accepted=True)
    assert config.acme_config is not None
    assert config.acme_config.directory == "https://acme-v02.api.letsencrypt.org/directory"
    assert config.acme_config.folder == Path("/srv/certificates")
    assert (config.control_tls, config.ingress_tls) == (True, True)
    assert relay_table(acme=False) == relay_table()


def test_a_table_says_all() -> None:
    table = {"directory": "letsencrypt-staging", "email": "me@example.com", "terms_accepted": True, "ca_file": "ca.pem"}
    acme = relay_table(acme=table).acme_config
    assert acme is not None
    assert (acme.directory, acme.email, acme.ca_file) == (STAGING, "me@example.com", Path("/srv/ca.pem"))
    config = RemoteAccessConfig.from_table({"relay_addr": "wss://relay.test", "acme": table}, base_dir="/home")
    assert config.acme_config is not None
    assert config.acme_config.folder == Path("/home/certificates")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "acme.terms_accepted = false: is not true; read the authority's terms of service"),
        ({"terms_accepted": True, "directory": "http://ca.test/dir"}, "acme.directory = 'http://ca.test/dir': allowed"),
        ({"terms_accepted": True, "directory": "letsencript"}, "acme.directory = 'letsencript': allowed is an https"),
        ({"terms_accepted": True, "email": "me"}, "acme.email = 'me': allowed is an e-mail address"),
        ({"terms_accepted": True, "mail": "a@b.test"}, "acme.mail"),
        ("yes", "acme"),
    ],
)
def test_what_is_wrong_with_it_is_named(table: object, told: str) -> None:
    with pytest.raises(InvalidSettingsError) as refused:
        relay_table(acme=table)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tls_certificate": "a", "tls_private_key": "b"}, "stands beside tls_certificate; leave one of them out"),
        ({"control_tls": False, "ingress_tls": False}, "its certificates would serve nobody"),
        ({"http_addr": "127.0.0.1:443"}, "is ingress_addr too, '127.0.0.1:443'; it needs an address of its own"),
        ({"http_addr": "127.0.0.1:80", "ingress_tls": False}, "here ingress_addr takes them itself"),
        (
            {"http_addr": "127.0.0.1:80", "tunnels": [tunnel_entry(bind_addr="127.0.0.1:80")]},
            "tunnels[0].bind_addr is http_addr too",
        ),
        (
            {"tunnels": [tunnel_entry(url="https://relay.example.com", tls="passthrough")]},
            "takes all TLS for the public name 'relay.example.com', for which the relay cannot order then",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSettingsError) as refused:
        relay_table(acme=True, **changes)
    assert told in str(refused.value)


def test_an_address_in_clear_goes_with_certificates_from_files_too() -> None:
    config = relay_config(tls_certificate="a", tls_private_key="b", http_addr=["127.0.0.1:80", "[::1]:80"])
    assert len(config.all_addresses) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--acme-email", "me@example.com"], "the other options --acme-… are for --acme"),
        (["--acme", "--acme-directory", "ftp://ca.test"], "allowed is an https:// URL"),
        (["--acme", "--transport", "tls"], "--acme is for a relay of --transport websocket"),
        (["--acme", "--tls-certificate", "KEY", "--tls-private-key", "KEY"], "leave one of them out"),
    ],
)
def test_options_of_expose_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key = tmp_path / "key"
    key.write_text("ptk1_the-key-of-the-tests-0123456789abcdef\n")
    words = [str(key) if word == "KEY" else word for word in options]
    relay = ["--relay", "wss://relay.test", "--key-file", str(key)]
    result = CliRunner().invoke(pioneer_tunnel, ["expose", "8000", *relay, *words])
    assert result.exit_code == 2
    assert told in result.output


def test_certificates_go_to_no_folder_below_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "key").write_text("ptk1_the-key-of-the-tests-0123456789abcdef\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    options = ["--acme", "--transport", "tls", "--relay", "tls://relay.test", "--key-file", str(tmp_path / "key")]
    CliRunner().invoke(pioneer_tunnel, ["expose", "8000", *options])
    assert [*(tmp_path / "here").iterdir()] == []


def test_without_a_folder_for_certificates_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(pioneer_tunnel, ["expose", "8000", "--acme", "--relay", "wss://relay.test"])
    assert result.exit_code == 2
    assert "name one with --acme-folder" in result.output


def test_expose_says_what_is_wrong_with_a_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    certificates = {"a.test": CertificateStatus(message="no"), "b.test": CertificateStatus(not_after_unix=1)}
    status = Status(state=State.CONNECTED, public_url="https://a.test", certificates=certificates)
    StatusLines(as_json=False).catch_up([status], 0)
    assert capsys.readouterr().err == "connected    visitors come in at https://a.test (TLS of a.test: no)\n"
