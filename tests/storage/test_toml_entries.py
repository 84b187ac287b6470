"""Entries of arrays of tables are added to a text and removed from it, and every other byte stays."""

from __future__ import annotations

import tomllib
from typing import Any, Final

import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel._storage.toml_entries import with_entry, without_entry
from pioneer_tunnel._storage.toml_statements import lines_of_keys, statements

ARRAY: Final = ("relay", "tunnels")
NEW: Final = {"id": "new", "url": "http://new.test"}

OPERATORS_FILE: Final = """\
# The relay of the office. Ask Kim before you change it.

[relay.limits]          # unusual: before [relay]
connections = 1_000     # not more

[relay]
id = "r"
names = [
    "a",  # ]
    "b",
]
motd = '''
[[relay.tunnels]]
id = "not one"
'''

# Tunnels

# Kim's
[[relay.tunnels]]
id = "kim"
# tls = "passthrough"

  [[ relay . "tunnels" ]]
  id = "lee"     # since May
    [relay.tunnels.access]
    deny = ["192.0.2.0/24"]
    # allow = []

  # The last one
  [[relay.tunnels]]
  id = "max"

  [[relay.tunnels.services]]
  name = "web"
# at the very end

[other]
x = nan
"""


def ids(text: str) -> list[str]:
    return [entry["id"] for entry in tomllib.loads(text)["relay"]["tunnels"]]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_entry_goes_behind_the_last_one(newline: str) -> None:
    text = OPERATORS_FILE.replace("\n", newline)
    edited = with_entry(text, ARRAY, NEW)
    added = '  [[relay.tunnels]]\n  id = "new"\n  url = "http://new.test"\n\n'.replace("\n", newline)
    assert added in edited
    assert edited.replace(added, "") == text
    assert edited.index("at the very end") < edited.index(added) < edited.index("[other]")
    assert ids(edited) == ["kim", "lee", "max", "new"]


@pytest.mark.parametrize(
    ("index", "removed"),
    [
        (0, '# Kim\'s\n[[relay.tunnels]]\nid = "kim"\n# tls = "passthrough"\n'),
        (
            1,
            """\
  [[ relay . "tunnels" ]]
  id = "lee"     # since May
    [relay.tunnels.access]
    deny = ["192.0.2.0/24"]
    # allow = []
""",
        ),
        (
            2,
            """\
  # The last one
  [[relay.tunnels]]
  id = "max"

  [[relay.tunnels.services]]
  name = "web"
# at the very end
""",
        ),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_entry_goes_with_the_comments_that_touch_it(index: int, removed: str, newline: str) -> None:
    text = OPERATORS_FILE.replace("\n", newline)
    edited, gone = without_entry(text, ARRAY, index)
    assert gone == removed.replace("\n", newline)
    assert edited == text.replace(gone + newline, "")
    assert "# Tunnels" in edited


def test_a_comment_between_two_entries_belongs_to_the_second_one() -> None:
    text = '[[relay.tunnels]]\nid = "a"\n# about b\n[[relay.tunnels]]\nid = "b"\n'
    assert without_entry(text, ARRAY, 0)[0] == '# about b\n[[relay.tunnels]]\nid = "b"\n'
    assert without_entry(text, ARRAY, 1)[0] == '[[relay.tunnels]]\nid = "a"\n'


@pytest.mark.parametrize("text", ["", "[relay]\nx = 1", "[relay]\r\nx = 1\r\n", "# only a comment\n"])
def test_the_first_entry_goes_to_the_end(text: str) -> None:
    edited = with_entry(text, ARRAY, NEW)
    assert edited.startswith(text)
    newline = "\r\n" if "\r" in text else "\n"
    assert edited.endswith(f'[[relay.tunnels]]{newline}id = "new"{newline}url = "http://new.test"{newline}')
    assert "\r" not in edited.replace("\r\n", "")


def test_services_are_tables_below_the_entry() -> None:
    entry = {"id": "new", "services": [{"name": "web", "url": "u"}, {"name": "ssh", "bind_addr": "b"}], "key": "k"}
    edited = with_entry('[relay]\nx = 1\n\n  [[relay.tunnels]]\n    id = "a"\n', ARRAY, entry)
    assert tomllib.loads(edited)["relay"]["tunnels"][1] == entry
    assert edited.count("[[relay.tunnels.services]]") == 2


INLINE: Final = {
    "empty": "[relay]\ntunnels = []  # none yet\n",
    "one line": '[relay]\ntunnels = [{ id = "a" }, {id = "b"}]  # two\n[x]\n',
    "a comma at the end": '[relay]\ntunnels = [{ id = "a" }, {id = "b"},]\n',
    "lines": '[relay]\ntunnels = [\n    # the first\n    { id = "a" }, # here\n    { id = "b" } # last\n    # end\n]\n',
    "lines with commas": '[relay]\r\ntunnels = [\r\n  { id = "a" },\r\n  { id = "b" },\r\n]\r\n',
    "dotted": 'relay.tunnels = [{id="a"}]\n',
}


@pytest.mark.parametrize("text", INLINE.values(), ids=[*INLINE])
def test_an_array_may_be_written_inline(text: str) -> None:
    before = ids(text)
    edited = with_entry(text, ARRAY, NEW)
    assert ids(edited) == [*before, "new"]
    for comment in ("# none yet", "# two", "# the first", "# here", "# last", "# end"):
        assert (comment in edited) is (comment in text)
    for index, name in enumerate(before):
        shorter, removed = without_entry(text, ARRAY, index)
        assert ids(shorter) == [*before[:index], *before[index + 1 :]]
        assert f'"{name}"' in removed
    back = without_entry(edited, ARRAY, len(before))[0]
    assert tomllib.loads(back) == tomllib.loads(text)


@pytest.mark.parametrize("text", ["relay = {x = 1}\n", "relay = {tunnels = [{id = 'a'}]}\n"])
def test_a_table_that_is_closed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="something else would change"):
        with_entry(text, ARRAY, NEW)


def test_entries_that_stand_apart_are_added_to_and_removed() -> None:
    text = '[[relay.tunnels]]\nid = "a"\n\n[other]\ny = 1\n\n[[relay.tunnels]]\nid = "b"\n'
    assert ids(with_entry(text, ARRAY, NEW)) == ["a", "b", "new"]
    assert without_entry(text, ARRAY, 1)[0] == '[[relay.tunnels]]\nid = "a"\n\n[other]\ny = 1\n'


def test_the_lines_of_keys() -> None:
    lines = lines_of_keys(OPERATORS_FILE)
    text = OPERATORS_FILE.splitlines()
    for key, content in {
        "relay": "[relay]",
        "relay.limits.connections": "connections = 1_000     # not more",
        "relay.names": "names = [",
        "relay.tunnels": "[[relay.tunnels]]",
        "relay.tunnels[1].access.deny": 'deny = ["192.0.2.0/24"]',
        "relay.tunnels[2].services[0].name": 'name = "web"',
        "other.x": "x = nan",
    }.items():
        assert text[lines[key] - 1].strip() == content


# In general


values: Final = st.one_of(
    st.integers(0, 9).map(str),
    st.sampled_from(
        [
            '"# ] \\" [x"',
            "'\\'",
            "[1, [2], # ]\n 3]",
            "{ a = '}', b = [] }",
            '"""\n[[relay.tunnels]]\n"""""',
            "'''\n#'''",
        ]
    ),
)
comments: Final = st.sampled_from(["", "", "\n", "# comment\n", "  # [[relay.tunnels]] 'x\n", "\n# x\n\n"])
fields: Final = st.lists(st.tuples(comments, values), max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A document with tables in any order, each with any comments between its lines."""
    parts = []

    def table(header: str, *statements: str) -> str:
        indent = draw(st.sampled_from(["", "  "]))
        lines = [draw(comments), f"{indent}{header}\n", *(f"{indent}{statement}\n" for statement in statements)]
        for number, (comment, value) in enumerate(draw(fields)):
            lines += [comment, f'{indent}"f {number}" = {value}{draw(st.sampled_from(["", " # [c"]))}\n']
        return "".join([*lines, draw(comments)])

    for number in range(draw(st.integers(0, 3))):
        entry = table("[[relay.tunnels]]", f'id = "{number}"')
        for name in ("[[relay.tunnels.services]]", "[[relay.tunnels.services]]", "[relay.tunnels.access]"):
            entry += table(name) if draw(st.booleans()) else ""
        parts.append(entry)
    for name in ("[relay]", "[relay.limits]", '["re.lay"]'):
        if draw(st.booleans()):
            parts.insert(draw(st.integers(0, len(parts))), table(name))
    text = "".join(parts)
    tomllib.loads(text)
    return draw(st.sampled_from([text, text.removesuffix("\n"), text.replace("\n", "\r\n")]))


@given(documents())
def test_statements_are_those_of_the_document(text: str) -> None:
    """Each statement by itself is TOML, and all lines between them are comments."""
    end = 0
    for statement in statements(text):
        lines_between = text[end : statement.start].split("\n")
        assert all(not line.strip() or line.lstrip().startswith("#") for line in lines_between)
        tomllib.loads(text[statement.start : statement.end])
        assert text.count("\n", 0, statement.start) + 1 == statement.line
        found: Any = tomllib.loads(text)
        for name in statement.path:
            found = found[name]
        end = statement.end


@given(documents())
def test_what_was_added_can_be_removed(text: str) -> None:
    edited = with_entry(text, ARRAY, NEW)
    count = len(tomllib.loads(text).get("relay", {}).get("tunnels", []))
    assert tomllib.loads(edited)["relay"]["tunnels"][count:] == [NEW]
    back, removed = without_entry(edited, ARRAY, count)
    assert removed.startswith(("[[relay.tunnels]]", "  [[relay.tunnels]]"))
    assert back.split() == text.split(), "no comment is lost, and no value"


@given(documents(), st.integers(0, 2))
def test_the_others_stay_when_one_is_removed(text: str, index: int) -> None:
    entries = tomllib.loads(text).get("relay", {}).get("tunnels", [])
    if index >= len(entries):
        return
    edited, removed = without_entry(text, ARRAY, index)
    left = tomllib.loads(edited).get("relay", {}).get("tunnels", [])
    assert left == [entry for entry in entries if entry is not entries[index]]
    assert f'id = "{index}"' in removed
    assert sorted(edited.split() + removed.split()) == sorted(text.split())
