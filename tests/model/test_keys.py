"""A relay key shows itself nowhere; what is derived from it, signed and verified is what the vectors say."""

from __future__ import annotations

import base64
import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from shown import everything_shown

from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity, new_relay_key

CANARY: Final = "ptk1_canary-0f1e2d3c4b5a"
VECTORS: Final[list[dict[str, str]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "native-auth.json").read_text(encoding="utf-8")
)
SEEDS: Final = st.binary(min_size=32, max_size=32)


# The relay key


@pytest.mark.parametrize("text", ["k", "k" * 4096, "with a gap", "schlüssel", "😀", "\u200b", "k\xa0k"])
def test_a_key_is_text_that_is_trimmed_once(text: str) -> None:
    for written in (text, f"  {text}\n", f"\t{text}\r\n\u2003"):
        assert RelayKey(written).reveal() == text
    assert RelayKey(f" {text} ") == RelayKey(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        (" \t\n", "is empty"),
        (CANARY * 200, "is longer than 4096 characters"),
        (f"{CANARY}\n{CANARY}", "holds a control character"),
        (f"{CANARY}\0{CANARY}", "holds a control character"),
        (f"{CANARY}\x7f{CANARY}", "holds a control character"),
        (f"{CANARY}\x9b{CANARY}", "holds a control character"),
        (f"{CANARY}\ud800", "holds half of a surrogate pair"),
        (f"\udfff{CANARY}", "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        RelayKey(text)
    assert CANARY not in everything_shown(raised.value)


@pytest.mark.parametrize("wrong", [CANARY.encode(), [CANARY], None, 3, bytearray(CANARY.encode())])
def test_what_is_no_text_is_refused_without_showing_it(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a relay key is a str, not ") as raised:
        RelayKey(wrong)
    assert CANARY not in everything_shown(raised.value)


def test_a_key_shows_itself_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = RelayKey(CANARY)
    logging.getLogger("test").debug("%s %r %.100s", key, key, {"key": key})

    @attrs.frozen
    class Holder:
        key: RelayKey

    shown = [repr(key), str(key), f"{key}", f"{key!r:>40}", f"{key:^40}", "%s" % key, repr([key]), ascii(key)]  # noqa: UP031
    shown += [repr(Holder(key)), repr(attrs.asdict(Holder(key))), caplog.text]
    shown += [repr(getattr(key, name)) for name in RelayKey.__slots__]
    shown += [repr(key.identity()), str(key.identity())]
    shown += [repr(getattr(key.identity(), name)) for name in SigningIdentity.__slots__]
    assert repr(key) == str(key) == "RelayKey(***)"
    assert not hasattr(key, "__dict__")
    for text in shown:
        assert CANARY not in text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_neither_a_key_nor_an_identity_is_pickled(protocol: int) -> None:
    for secret in (RelayKey(CANARY), RelayKey(CANARY).identity()):
        with pytest.raises(TypeError, match="not pickled") as raised:
            pickle.dumps(secret, protocol)
        assert CANARY not in everything_shown(raised.value)
    with pytest.raises(TypeError):
        json.dumps(RelayKey(CANARY))


def test_a_traceback_with_local_variables_does_not_show_a_key() -> None:
    leaky: dict[str, Any] = {}
    code = "def work(key):\n    identity = key.identity()\n    return {'key': key, 'identity': identity}['missing']"
    exec(compile(code, "elsewhere.py", "exec"), leaky)
    with pytest.raises(KeyError) as raised:
        leaky["work"](RelayKey(CANARY))
    shown = everything_shown(raised.value)
    assert "RelayKey(***)" in shown
    assert CANARY not in shown


def test_keys_are_equal_when_their_text_is() -> None:
    key = RelayKey(CANARY)
    assert key == RelayKey(CANARY)
    assert hash(key) == hash(RelayKey(CANARY))
    assert key != RelayKey(CANARY + "x")
    assert (key == CANARY) is False
    assert len({key, RelayKey(CANARY), RelayKey("other")}) == 2
    assert RelayKey("schlüssel") == RelayKey("schlüssel")
    assert copy.copy(key) is key
    assert copy.deepcopy({"key": key})["key"] is key


def test_a_key_under_20_characters_is_weak() -> None:
    assert RelayKey("k" * 19).is_weak
    assert not RelayKey("k" * 20).is_weak


def test_a_new_key_is_strong_and_another_each_time() -> None:
    keys = {new_relay_key() for _ in range(20)}
    assert len(keys) == 20
    for key in keys:
        assert key.reveal().startswith("ptk1_")
        assert len(base64.urlsafe_b64decode(key.reveal().removeprefix("ptk1_") + "=")) == 32
        assert not key.is_weak


# The vectors


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors(vector: dict[str, str]) -> None:
    identity = RelayKey(vector["key"]).identity()
    assert identity.public_key == SigningIdentity.from_seed(bytes.fromhex(vector["seed"])).public_key
    assert str(identity.public_key) == vector["public_key"]
    assert identity.public_key == PublicKey.parse(vector["public_key"])
    assert identity.key_id == identity.public_key.key_id == vector["key_id"]


# Public keys


@given(seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_every_public_key_is_read_back(seed: bytes) -> None:
    public_key = SigningIdentity.from_seed(seed).public_key
    assert PublicKey.parse(str(public_key)) == public_key
    assert PublicKey.parse(str(public_key).upper().replace("ED25519", "ed25519")) == public_key
    assert len(public_key.key_id) == 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        CANARY,
        f"ed25519:{CANARY}",
        "ed25519:" + "0" * 63,
        "ed25519:" + "0" * 65,
        "ed25519:" + "0" * 62 + "  ",
        "ed25519:" + " ".join(["00"] * 22)[:64],
        "ed25519:" + "g" * 64,
        "ed25519:" + "\u0660" * 64,
        "ED25519:" + VECTORS[0]["public_key"].removeprefix("ed25519:"),
        " " + VECTORS[0]["public_key"],
        VECTORS[0]["public_key"] + "\n",
        VECTORS[0]["public_key"].removeprefix("ed25519:"),
        "ed25519:ed25519:" + "0" * 56,
    ],
)
def test_what_is_no_public_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="a public key is 'ed25519:' and 64 hexadecimal digits") as raised:
        PublicKey.parse(text)
    assert CANARY not in everything_shown(raised.value)


@pytest.mark.parametrize(
    "raw",
    [
        (2).to_bytes(32, "little"),
        (2**255 - 19).to_bytes(32, "little"),  # zero, not in its shortest form
        b"\xff" * 32,
        (1 | 1 << 255).to_bytes(32, "little"),  # x = 0 has no negative
    ],
)
def test_a_public_key_is_a_point_of_the_curve(raw: bytes) -> None:
    with pytest.raises(ValueError, match="a point of the curve") as raised:
        PublicKey.parse(f"ed25519:{raw.hex()}")
    assert raw.hex() not in everything_shown(raised.value)


def torsion_points() -> list[bytes]:
    """The eight points whose order divides 8, by doubling and adding on the curve."""
    prime = 2**255 - 19
    d = -121665 * pow(121666, -1, prime) % prime

    def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        (x1, y1), (x2, y2) = one, other
        product = d * x1 * x2 * y1 * y2
        x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, prime)
        y = (y1 * y2 + x1 * x2) * pow(1 - product, -1, prime)
        return x % prime, y % prime

    # An order of 8, as published in lists of such points.
    raw = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
    y = int.from_bytes(raw, "little")
    square = (y * y - 1) * pow(d * y * y + 1, -1, prime) % prime
    x = pow(square, (prime + 3) // 8, prime)
    if x * x % prime != square:
        x = x * pow(2, (prime - 1) // 4, prime) % prime
    assert x * x % prime == square
    points = [(0, 1)]
    while len(points) < 8:
        points.append(add(points[-1], (x, y)))
    assert len(set(points)) == 8
    assert add(points[-1], (x, y)) == (0, 1)
    return [(y | (x & 1) << 255).to_bytes(32, "little") for x, y in points]


@pytest.mark.parametrize("number", range(8))
def test_a_public_key_of_small_order_is_refused(number: int) -> None:
    """For such a key there are signatures that anybody can make, which verify one message in eight, or each."""
    raw = torsion_points()[number]
    with pytest.raises(ValueError, match="anybody can sign") as raised:
        PublicKey.parse(f"ed25519:{raw.hex()}")
    assert raw.hex() not in everything_shown(raised.value)
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    for sign in (0, 1 << 255):
        for written in (y | sign, (y + 2**255 - 19) | sign):  # in every form that some library takes
            if written < 2**256 and (written & (2**255 - 1)) in {y, y + 2**255 - 19}:
                with pytest.raises(ValueError, match="a public key is"):
                    PublicKey.parse(f"ed25519:{written.to_bytes(32, 'little').hex()}")


def test_a_signature_that_anybody_can_make_verifies_with_a_key_of_small_order() -> None:
    """Why they are refused."""
    neutral = torsion_points()[0]
    assert PublicKey(neutral).verify(neutral + bytes(32), b"whatever")


@given(signature=st.binary(max_size=70), message=st.binary(max_size=20), raw=st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_verifying_never_raises(signature: bytes, message: bytes, raw: bytes) -> None:
    assert PublicKey(raw).verify(signature, message) is False
    identity = SigningIdentity.generate()
    assert identity.public_key.verify(signature, message) is False
    assert identity.public_key.verify(identity.sign(message), message)


def test_a_signing_identity_shows_its_public_name_alone() -> None:
    identity = SigningIdentity.generate()
    assert repr(identity) == f"SigningIdentity({identity.key_id})"
    assert identity.public_key != SigningIdentity.generate().public_key
    for seed in (b"", CANARY.encode(), CANARY.encode() * 2):
        with pytest.raises(ValueError, match="a private seed has 32 bytes, not ") as raised:
            SigningIdentity.from_seed(seed)
        assert CANARY not in everything_shown(raised.value)
