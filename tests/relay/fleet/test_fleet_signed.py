"""What an operator signs, and what a node takes for signed."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel import InvalidSettingsError
from pioneer_tunnel._model.keys import SigningIdentity, new_relay_key
from pioneer_tunnel.relay.fleet.claims import Claim, UnknownNode, read_claim, sign_claim
from pioneer_tunnel.relay.fleet.signed import MOST_BYTES, MOST_VALID, Forged, SignedEntry, read_entry, sign

OPERATOR: Final = SigningIdentity.from_seed(b"o" * 32)
NODE: Final = SigningIdentity.from_seed(b"n" * 32)
KEY: Final = str(new_relay_key().identity().public_key)
NOW: Final = 1_790_000_000
TABLE: Final = {"id": "office", "url": "https://office.example.com", "key": KEY}


def signed(serial: int = NOW * 1000, **changes: object) -> SignedEntry:
    return sign(OPERATOR, {**TABLE, **changes}, serial=serial, not_after=NOW + 1000)


def test_a_signed_entry_is_read_as_it_was_signed() -> None:
    entry = signed()
    assert read_entry(entry.text, OPERATOR.public_key) == entry
    assert entry.tunnel is not None
    assert (entry.id, entry.serial, entry.not_after) == ("office", NOW * 1000, NOW + 1000)
    assert entry.ways == (f"key:{entry.tunnel.valid_keys[0].key_id}", "host:office.example.com")


def test_a_tombstone_names_the_tunnel_and_outlives_what_it_revokes() -> None:
    tombstone = sign(OPERATOR, "office", serial=NOW * 1000 + 5, not_after=NOW + MOST_VALID)
    read = read_entry(tombstone.text, OPERATOR.public_key)
    assert (read.id, read.tunnel, read.ways) == ("office", None, ())
    assert read.memorable_until >= NOW + MOST_VALID


@given(place=st.integers(min_value=0), flip=st.integers(1, 255))
def test_every_changed_byte_is_noticed(place: int, flip: int) -> None:
    text = bytearray(signed().text)
    text[place % len(text)] ^= flip
    with pytest.raises(Forged):
        read_entry(bytes(text), OPERATOR.public_key)


@given(st.binary(max_size=300))
def test_anything_else_is_forged(text: bytes) -> None:
    with pytest.raises(Forged):
        read_entry(text, OPERATOR.public_key)
    with pytest.raises(Forged):
        read_claim(text, {"fra1": NODE.public_key})


def test_a_text_with_another_serial_is_forged() -> None:
    text = signed().text
    later = b"%d " % (NOW * 1000 + 1)
    with pytest.raises(Forged, match="has not signed"):
        read_entry(later + text.partition(b" ")[2], OPERATOR.public_key)


def test_another_key_signs_nothing() -> None:
    with pytest.raises(Forged, match="has not signed"):
        read_entry(signed().text, NODE.public_key)


def test_a_signature_for_another_purpose_is_none_of_ours() -> None:
    serial, _, content = signed().text.split(b" ", 2)
    for prefix in (b"", b"pioneer-tunnel/v1 fleet name\0", b"pioneer-tunnel/v1 relay proof\0"):
        text = b"%s %s %s" % (serial, OPERATOR.sign(prefix + serial + b" " + content).hex().encode(), content)
        with pytest.raises(Forged, match="has not signed"):
            read_entry(text, OPERATOR.public_key)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"not_after":1}',
        b'{"not_after":1,"tunnel":{"id":"x"}}',
        b'{"not_after":1,"revoked":7}',
        b'{"not_after":1,"revoked":""}',
        b'{"not_after":"soon","revoked":"office"}',
        b'{"not_after":99999999999999,"revoked":"office"}',
        b"{" + b"[" * 10_000 + b"}",
        b'{"not_after":1,"tunnel":{"id":"x","key":"ed25519:%s","bind_addr":"0.0.0.0:22","url":"https://x.example"}}'
        % (b"00" * 32),
    ],
)
def test_what_is_signed_and_makes_no_sense_is_refused(content: bytes) -> None:
    serial = b"%d" % (NOW * 1000)
    signature = OPERATOR.sign(b"pioneer-tunnel/v1 fleet entry\0" + serial + b" " + content)
    with pytest.raises(Forged, match="it is signed"):
        read_entry(b"%s %s %s" % (serial, signature.hex().encode(), content), OPERATOR.public_key)


def test_a_signed_tunnel_has_nothing_of_one_machine() -> None:
    with pytest.raises(InvalidSettingsError, match=r"bind_addr: is an address of one node"):
        signed(bind_addr="0.0.0.0:2222")
    with pytest.raises(InvalidSettingsError, match=r"services\[0\]\.bind_addr: is an address of one node"):
        sign(
            OPERATOR,
            {"id": "box", "key": KEY, "services": [{"name": "ssh", "bind_addr": "0.0.0.0:22"}]},
            serial=1,
            not_after=2,
        )
    with pytest.raises(InvalidSettingsError, match=r"access\.bearer_tokens: is a file"):
        signed(access={"bearer_tokens": "tokens.txt"})
    assert signed(access={"allow": ["192.0.2.0/24"]}).tunnel is not None


def test_errors_of_a_tunnel_name_its_key() -> None:
    with pytest.raises(InvalidSettingsError, match="url: the address 'ftp://x'"):
        signed(url="ftp://x")


def test_nothing_is_valid_for_longer_than_its_tombstone_is_remembered() -> None:
    with pytest.raises(InvalidSettingsError, match="400 days"):
        sign(OPERATOR, TABLE, serial=NOW * 1000, not_after=NOW + MOST_VALID + 1)


def test_an_entry_is_bounded() -> None:
    with pytest.raises(InvalidSettingsError, match=f"{MOST_BYTES} bytes"):
        signed(access={"allow": [f"2001:db8:{index:x}::/48" for index in range(5000)]})


# Claims of names


def claim(keys: str, since: int = 5, node: str = "fra1") -> Claim:
    return sign_claim(node, NODE, host="blog.box.example.com", keys=frozenset(keys), since=since)


def test_a_claim_is_read_as_it_was_signed() -> None:
    made = claim("ab")
    assert read_claim(made.text, {"fra1": NODE.public_key}) == made


@given(place=st.integers(min_value=0), flip=st.integers(1, 255))
def test_every_changed_byte_of_a_claim_is_noticed(place: int, flip: int) -> None:
    text = bytearray(claim("ab").text)
    text[place % len(text)] ^= flip
    with pytest.raises(Forged):
        read_claim(bytes(text), {"fra1": NODE.public_key})


def test_only_nodes_of_the_configuration_claim() -> None:
    with pytest.raises(UnknownNode, match="'fra9'"):
        read_claim(claim("ab", node="fra9").text, {"fra1": NODE.public_key})
    with pytest.raises(Forged, match="has not signed"):
        read_claim(claim("ab").text, {"fra1": OPERATOR.public_key})


def test_the_earlier_claim_counts() -> None:
    assert claim("a", 6).yields_to(claim("b", 5))
    assert not claim("b", 5).yields_to(claim("a", 6))


def test_of_two_claims_of_one_owner_the_one_with_more_keys_counts() -> None:
    assert claim("a", 5).yields_to(claim("ab", 9))
    assert not claim("ab", 9).yields_to(claim("a", 5))


@given(st.lists(st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.integers(0, 3)), min_size=2, max_size=2))
def test_of_two_claims_exactly_one_counts(parts: list[tuple[set[str], int]]) -> None:
    one, other = (claim("".join(keys), since) for keys, since in parts)
    assert one.text == other.text or one.yields_to(other) is not other.yields_to(one)
