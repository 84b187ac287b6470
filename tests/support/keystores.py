"""One keystore of each kind, for the tests of keystores."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.gateway.keystore import FileKeystore, KeyringKeystore, Keystore, MemoryKeystore, envelope

CANARY: Final = "ptk1_canary-1a2b3c4d5e6f"
PASSPHRASE: Final = "canary-passphrase"


@pytest.fixture
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    def cheap(*, salt: bytes, length: int, n: int, r: int, p: int) -> Scrypt:
        return Scrypt(salt=salt, length=length, n=2, r=r, p=p)

    monkeypatch.setattr(envelope, "Scrypt", cheap)


def attempts_on(keystore: Keystore, reference: str = "a") -> dict[str, Callable[[], Awaitable[object]]]:
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: keystore.get(reference),
        "put": lambda: keystore.put(reference, RelayKey(CANARY)),
        "delete": lambda: keystore.delete(reference),
        "exists": lambda: keystore.exists(reference),
    }
    if isinstance(keystore, FileKeystore):
        attempts["rotate"] = keystore.rotate
    return attempts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keystore"


class Backend:
    """What the package `keyring` would hand us."""

    def __init__(self) -> None:
        self.passwords: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.passwords.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.passwords[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.passwords[service, username]


KINDS: Final[dict[str, Callable[[Path], Keystore]]] = {
    "memory": lambda _folder: MemoryKeystore(),
    "file": FileKeystore,
    "file with a passphrase": lambda folder: FileKeystore(folder, PASSPHRASE),
    "keyring": lambda _folder: KeyringKeystore(backend=Backend()),
}


@pytest.fixture(params=KINDS)
def keystore(request: pytest.FixtureRequest, folder: Path) -> Keystore:
    return KINDS[request.param](folder)
