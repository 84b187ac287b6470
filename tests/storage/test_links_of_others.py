"""Links and folders that another user puts on the way to a file are not followed, and nothing is given away."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from crashing_files import LEFTOVER, names
from rig import HANG

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._storage import files


def test_a_link_of_another_user_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by an attack: root, who writes in the folder of a gateway, overwrote the file that the gateway chose."""
    precious, link = tmp_path / "precious", tmp_path / "instance"
    precious.write_bytes(b"precious")
    link.symlink_to(precious)
    files.replace(link, b"through a link of ours")
    assert precious.read_bytes() == b"through a link of ours"
    give_away(link, monkeypatch)
    with pytest.raises(StorageError, match=r"instance is a symbolic link of another user \(uid [0-9]+\)"):
        files.replace(link, b"gone")
    with pytest.raises(StorageError, match="symbolic link of another user"), files.locked(link):
        pass
    assert precious.read_bytes() == b"through a link of ours"
    assert link.is_symlink()
    assert not (tmp_path / "precious.lock").exists()


def give_away(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `link` another user's."""
    if os.geteuid() == 0:
        os.chown(link, 65534, 65534, follow_symlinks=False)
    else:
        another_user = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another_user)


def test_a_folder_on_the_way_that_is_a_link_of_another_user_is_not_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious" / "inner").mkdir(parents=True)
    precious = tmp_path / "precious" / "inner" / "f"
    precious.write_bytes(b"precious")
    leftover = precious.with_name(f".f.0123456789abcdef{LEFTOVER}")
    leftover.write_bytes(b"")
    link = tmp_path / "link"
    link.symlink_to("precious")
    through = tmp_path / "link" / "inner" / ".." / "inner" / "f"
    files.replace(through, b"through a link of ours")
    assert precious.read_bytes() == b"through a link of ours"
    give_away(link, monkeypatch)
    attempts: list[Callable[[], object]] = [
        lambda: files.replace(through, b"gone"),
        lambda: files.remove(through),
        lambda: files.locked(through).__enter__(),
        lambda: files.make_private_folder(through.with_name("new")),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"/link is a symbolic link of another user \(uid [0-9]+\)"):
            attempt()
    files.remove_temporaries(through)
    files.remove_temporaries(through.parent)
    assert names(precious.parent) == [leftover.name, "f"]
    assert precious.read_bytes() == b"through a link of ours"
    read = files.read(through, limit=100)
    assert read is not None, "what is only read may be reached by any link"


def test_a_link_of_root_on_the_way_is_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /var on macOS; /proc/self/root is one of root's here."""
    path = Path("/proc/self/cwd") if os.geteuid() == 0 else Path("/bin")
    assert path.is_symlink()
    monkeypatch.chdir(tmp_path)
    if os.geteuid() == 0:
        files.replace(path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"new"
    else:
        with pytest.raises(StorageError, match="Permission denied"):
            files.replace(path / "f", b"new")


AS_ANOTHER_USER: Final = """
    import os, sys
    from pathlib import Path
    from pioneer_tunnel._storage import files
    from pioneer_tunnel._model.errors import StorageError

    os.setgid(12345)
    os.setuid(12345)
    for name in ("roots", "ours", "anothers"):
        path = Path(sys.argv[1], name, name)
        try:
            with files.locked(path):
                files.replace(path, b"new")
        except StorageError as error:
            print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_another_user_links_of_root_are_gone_through_and_those_of_a_third_are_not() -> None:
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o711)  # to go through, not to read
        (place / "folder").mkdir()
        os.chown(place / "folder", 12345, 12345)
        for name, owner in (("roots", 0), ("ours", 12345), ("anothers", 23456)):
            (place / name).symlink_to("folder")
            os.chown(place / name, owner, owner, follow_symlinks=False)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(AS_ANOTHER_USER), made],
            check=True,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        (told,) = done.stdout.splitlines()
        assert "/anothers is a symbolic link of another user (uid 23456)" in told
        assert names(place / "folder") == ["ours", "ours.lock", "roots", "roots.lock"]


class Swapped:
    """`os.mkdir`, and another user who puts something else in the place of the folder before it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], object], folder: Path) -> None:
        self._real = os.mkdir
        self._put = put
        self._folder = folder
        monkeypatch.setattr(os, "mkdir", self)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._real(*args, **kwargs)
        self._folder.rmdir()
        self._put(self._folder)


@pytest.mark.parametrize("kind", ["link", "folder"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_that_was_put_in_the_place_of_a_new_one_is_not_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Found by an attack: a folder of root's was given to the user who owns the folder above."""
    theirs, precious = tmp_path / "theirs", tmp_path / "precious"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    precious.mkdir(mode=0o700)
    (precious / "secret").write_bytes(b"")
    folder = theirs / "folder"
    Swapped(monkeypatch, precious.rename if kind == "folder" else lambda path: path.symlink_to(precious), folder)
    with contextlib.suppress(StorageError):
        files.make_private_folder(folder)
    assert (folder.stat().st_uid, folder.stat().st_gid) == (0, 0)
    assert (folder / "secret").exists()


def test_links_that_lead_nowhere_but_to_each_other_are_told(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(StorageError, match="one cannot be written: Too many levels of symbolic links"):
        files.replace(tmp_path / "one", b"")
