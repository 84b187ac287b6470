"""`[gateway.remote_access]`: no secret in what it says, wherever it was put by mistake."""

from __future__ import annotations

import random
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from configs import KEYS, complaint_of, refused, write

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.text import shown
from pioneer_tunnel.gateway.config import RemoteAccessConfig

RANDOM = random.Random(0)

PATHS = ("runtime_dir", "ca_file")


def secret_places(secret: str) -> list[dict[str, Any]]:
    """Tables with `secret` where it does not belong."""
    return [
        *({key: secret} for key in KEYS if key not in PATHS),
        *({key: [secret]} for key in KEYS),
        *({key: {secret: secret}} for key in KEYS),
        *({key: f" {secret}\n"} for key in KEYS if key not in PATHS),
        {"key": secret},
        {"relay_kye": secret},
        {"token": {"value": secret}},
        {secret: True},
        {f"{secret} {secret}": True},
        {"relay_addr": f"wss://user:{secret}@relay.example"},
        {"relay_addr": f"wss://relay.example?key={secret}"},
        {"proxy": f"http://user:{secret}@proxy.example:3128"},
        {"proxy": f"http://{secret}@proxy.example:3128"},
        {"proxy": f"user:{secret}@proxy.example:3128"},
        {"relay_addr": f"wss://relay.example/{secret}#"},
        {"relay_addr": f"https://{secret}"},
        {"local_addr": f"{secret}@127.0.0.1:1"},
        {"relay_identity": f"ed25519:{secret}"},
    ]


def texts_of(error: BaseException | None) -> str:
    """All that a log could show of an error: its text, its repr, its problems and what it came from."""
    texts = ""
    while error is not None:
        texts += f"{error} {error!r} {getattr(error, 'problems', '')!r}"
        error = error.__cause__ or error.__context__
    return texts


@pytest.mark.parametrize(
    "secret",
    [
        "ptk1_" + urlsafe_b64encode(RANDOM.randbytes(32)).decode().rstrip("="),
        "ptk1_short",
        RANDOM.randbytes(32).hex(),
        urlsafe_b64encode(RANDOM.randbytes(32)).decode(),
        urlsafe_b64encode(RANDOM.randbytes(16)).decode(),
        b64encode(b"\xff" + RANDOM.randbytes(16) + b"\xff" * 4).decode(),
    ],
    ids=["relay key", "short relay key", "seed", "token", "short token", "token with slashes"],
)
def test_a_secret_in_a_wrong_place_never_shows(tmp_path: Path, secret: str) -> None:
    complaints = [complaint_of(RemoteAccessConfig.from_table, table) for table in secret_places(secret)]
    assert sum(complaint is not None for complaint in complaints) > 40
    for complaint in complaints:
        assert secret not in texts_of(complaint)
    for text in (f"key = {secret}", f'key = "{secret}', f"{secret}", f"[{secret}]\n[{secret}]"):
        with pytest.raises(InvalidSettingsError) as refusal:
            RemoteAccessConfig.load(write(tmp_path, text))
        assert secret not in texts_of(refusal.value)


@pytest.mark.parametrize("name", ["key", "relay_key", "api-token", "password", "client_secret", "PASSPHRASE"])
def test_the_value_of_a_key_that_sounds_secret_is_never_shown(name: str) -> None:
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.from_table({name: "hunter2"})
    assert "hunter2" not in texts_of(error.value)
    assert name in str(error.value)
    assert shown(name, "hunter2") is None


def test_a_passphrase_of_words_is_not_shown_where_an_address_belongs() -> None:
    (problem,) = refused(relay_addr="correct-horse-battery-staple")
    assert "horse" not in str(problem)
    assert "has no port" in problem.message
