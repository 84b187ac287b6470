"""A TOML file that cannot be used is told with file, line and column, and nothing of what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._storage.toml_read import read_toml, subtable


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "gateway.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.toml cannot be read: No such file"):
        read_toml(tmp_path / "nowhere.toml")
    with pytest.raises(StorageError, match="is not a regular file"):
        read_toml(tmp_path)
    with pytest.raises(StorageError, match="cannot be read"):
        read_toml(Path("a\0b"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a = 1\nb = oops\n", "line 2, column 5"),
        ("a = 1\r\nb = oops\r\n", "line 2, column 5"),
        ("[gateway\n", "line 1, column 9"),
        ("a =", "line 1, column 4"),
        ('\n\na = "open', "line 3, column 10"),
        (b"a = 1\nb\xc3\xa9 = '\xff'\n", "line 2, column 7"),
    ],
)
def test_a_syntax_error_names_file_line_and_column(tmp_path: Path, text: str | bytes, where: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidSettingsError) as error:
        read_toml(path)
    assert str(error.value).startswith(f"{path}: {where}: not ")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000])
def test_toml_that_python_cannot_hold(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSettingsError, match="not TOML that can be read"):
        read_toml(write(tmp_path, text))


@settings(deadline=None)
@given(data=st.binary(max_size=60) | st.text(alphabet="ab=[]\".#\n\r 019{}'\\u", max_size=60).map(str.encode))
def test_a_junk_file_gives_a_document_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "gateway.toml"
    path.write_bytes(data)
    try:
        document = read_toml(path)
    except InvalidSettingsError as error:
        text = str(error)
    else:
        assert isinstance(document, dict)
        return
    assert text.startswith(f"{path}: ")


def test_a_subtable_is_found_or_not_there() -> None:
    document = {"a": {"b": {"c": 1}}, "x": 3}
    assert subtable(document, "a.b") == {"c": 1}
    assert subtable(document, "a.c") is None
    assert subtable(document, "c.a") is None
    with pytest.raises(InvalidSettingsError, match=r"^file: x = 3: allowed is a table$"):
        subtable(document, "x.y", source="file")
    with pytest.raises(InvalidSettingsError, match=r"^a\.b\.c = 1: allowed is a table$"):
        subtable(document, "a.b.c")
