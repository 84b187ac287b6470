"""`SettingsUpdate`: from the wire or from a program, checked, applied, and without the key in what it shows."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from settings_files import CANARY
from shown import everything_shown

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.gateway.settings import Settings, SettingsFile, SettingsUpdate


def test_an_update_says_what_it_says() -> None:
    assert SettingsUpdate.from_wire({}) == SettingsUpdate()
    nothing = {"enabled": None, "server": None, "key": None, "clear_key": None}
    assert SettingsUpdate.from_wire(nothing) == SettingsUpdate()
    update = SettingsUpdate.from_wire(
        {"enabled": True, "server": " wss://r/ ", "key": f" {CANARY}\n", "clear_key": True, "later": [1]}
    )
    assert update == SettingsUpdate(enabled=True, server="wss://r/", key=RelayKey(CANARY), clear_key=True)
    assert not update.deletes_key
    assert SettingsUpdate.from_wire({"clear_key": True}).deletes_key
    assert not SettingsUpdate.from_wire({"clear_key": False}).deletes_key


def test_an_update_is_applied_to_what_is_there() -> None:
    here = Settings(enabled=True, server="s", service_name="n", secret_ref="r")
    assert SettingsUpdate().apply_to(here) == here
    assert SettingsUpdate(key=RelayKey(CANARY), clear_key=True).apply_to(here) == here
    assert SettingsUpdate(enabled=False).apply_to(here) == attrs.evolve(here, enabled=False)
    assert SettingsUpdate(server="t").apply_to(here) == attrs.evolve(here, server="t")
    for empty in ("", "  \n"):
        assert SettingsUpdate.from_wire({"server": empty}).apply_to(here) == attrs.evolve(here, server=None)


@pytest.mark.parametrize(
    ("wire", "told"),
    [
        ({"enabled": 1}, "remote_access.enabled is not true or false"),
        ({"enabled": "true"}, "remote_access.enabled is not true or false"),
        ({"server": 3}, "remote_access.server is not text of at most 512 characters"),
        ({"server": "s" * 513}, "remote_access.server is not text of at most 512 characters"),
        ({"server": "\ud800"}, "remote_access.server is not text of at most 512 characters"),
        ({"clear_key": 0}, "remote_access.clear_key is not true or false"),
        ({"key": 3}, "remote_access.key: a relay key is a str, not int"),
        ({"key": [CANARY]}, "remote_access.key: a relay key is a str, not list"),
        ({"key": ""}, "remote_access.key: the relay key is empty"),
        ({"key": " \t "}, "remote_access.key: the relay key is empty"),
        ({"key": "k" * 4097}, "remote_access.key: the relay key is longer than 4096 characters"),
        ({"key": f"{CANARY}\x00x"}, "remote_access.key: the relay key holds a control character"),
        ({"key": f"{CANARY}\ud800"}, "remote_access.key: the relay key holds half of a surrogate pair"),
        ({"server": 3, "key": ""}, "remote_access.server is not text of at most 512 characters; remote_access.key: "),
        ([], "remote_access is not an object"),
        (None, "remote_access is not an object"),
        (CANARY, "remote_access is not an object"),
    ],
)
def test_what_is_malformed_is_named_and_nothing_is_quoted(wire: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"^remote_access") as raised:
        SettingsUpdate.from_wire(wire)
    assert str(raised.value).startswith(told)
    assert CANARY not in str(raised.value)


def test_the_longest_of_all_is_taken() -> None:
    update = SettingsUpdate.from_wire({"server": f" {'s' * 512} ", "key": f" {'k' * 4096} "})
    assert update.server == "s" * 512
    assert update.key == RelayKey("k" * 4096)


@pytest.mark.parametrize("name", ["enabled", "server", "clear_key", "key"])
@given(value=st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({}))
@hypothesis_settings(max_examples=30, deadline=None)
def test_any_json_is_an_update_or_a_value_error(name: str, value: Any) -> None:
    try:
        update = SettingsUpdate.from_wire({name: value})
    except ValueError as error:
        if name not in str(error):
            raise
    else:
        assert value is None or isinstance(value, bool | str)
        assert isinstance(update, SettingsUpdate)


def test_an_update_made_by_a_program_is_checked_as_well() -> None:
    assert SettingsUpdate(server=" s ").server == "s"
    wrong: list[dict[str, Any]] = [{"enabled": 1}, {"server": "s" * 513}, {"clear_key": None}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="allowed is"):
            SettingsUpdate(**arguments)
    text: Any = CANARY
    with pytest.raises(TypeError, match="key is a RelayKey, not str"):
        SettingsUpdate(key=text)


def test_the_search_for_the_key_finds_one(settings_path: Path) -> None:
    leaky: dict[str, Any] = {}
    code = (
        "def leak(key):\n    try:\n        {}[key]\n    except KeyError:\n        pass\n    raise ValueError('wrong')"
    )
    exec(compile(code, "elsewhere.py", "exec"), leaky)
    with pytest.raises(ValueError, match="wrong") as raised:
        leaky["leak"](CANARY)
    assert CANARY in everything_shown(raised.value)


def test_the_key_is_in_nothing_that_an_update_shows(caplog: pytest.LogCaptureFixture, settings_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    update = SettingsUpdate.from_wire({"enabled": True, "key": CANARY})
    logging.getLogger("test").debug("%s %r %s", update, update, attrs.asdict(update))
    shown = [repr(update), str(update), f"{update}", f"{update.key!s:>30}", caplog.text]
    with pytest.raises(TypeError) as unpickled:
        pickle.dumps(update)
    shown.append(everything_shown(unpickled.value))
    SettingsFile(settings_path).update(update.apply_to)
    assert settings_path.exists()
    shown += [caplog.text, *(entry.read_text() for entry in settings_path.parent.iterdir())]
    for wire in ({"key": CANARY, "enabled": 1}, {"key": f"{CANARY}\x07"}, {"key": {"key": CANARY}}, [CANARY]):
        with pytest.raises(ValueError, match=r"^remote_access") as malformed:
            SettingsUpdate.from_wire(wire)  # type: ignore[arg-type]
        shown.append(everything_shown(malformed.value))
    assert all(CANARY not in text for text in shown)
