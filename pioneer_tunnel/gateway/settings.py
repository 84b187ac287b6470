"""The gateway's settings: the table `[remote_access]` of `gateway-settings.toml`, a file that others write, too.

The gateway keeps other tables in it, people edit and comment it, and other programs write it. So an update changes only
the bytes of its values, and never overwrites content that it has not read. It takes the lock, reads the file, applies
its change, and checks right before the rename that the file is still the one that it read. So a write of a program that
does not use our lock is lost only if it falls into the microseconds between that check and the rename.

`Settings` is the content of the table. `SettingsUpdate` is what a client asks for. `SettingsFile` is the file. The
relay key is not a setting: an update only carries it to the keystore.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from .._model.errors import Problem, StorageError
from .._model.keys import RelayKey
from .._model.text import hide_secrets, shown
from .._storage import files
from .._storage.toml_edit import TomlValue, edit_table
from .._storage.validation import refusal
from .keystore import DEFAULT_SECRET_REF, is_secret_ref

__all__ = ["Settings", "SettingsFile", "SettingsUpdate"]

MAX_SERVER_LENGTH: Final = 512
_MAX_NAME_LENGTH: Final = 255
_FILE_LIMIT: Final = 1024 * 1024
_WRITE_ATTEMPTS: Final = 5
_SETTLED_SECONDS: Final = 2.0
_TABLE: Final = "remote_access"
_BOM: Final = "\ufeff"
_LOGGER: Final = logging.getLogger("pioneer_tunnel.settings")

_Signature: TypeAlias = tuple[int, int, int, int, int]


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_server(value: object) -> bool:
    # JSON can contain half of a surrogate pair; a UTF-8 file cannot.
    return value is None or (
        isinstance(value, str)
        and len(value.strip()) <= MAX_SERVER_LENGTH
        and not any("\ud800" <= char <= "\udfff" for char in value)
    )


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _MAX_NAME_LENGTH and value.isprintable())


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and is_secret_ref(value)


# For each field: a check of its value, and a description of what is allowed.
_RULES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "enabled": (_is_flag, "true or false"),
    "server": (_is_server, f"text of at most {MAX_SERVER_LENGTH} characters"),
    "service_name": (_is_name, f"printable text of at most {_MAX_NAME_LENGTH} characters"),
    "transport": (_is_name, f"printable text of at most {_MAX_NAME_LENGTH} characters"),
    "secret_ref": (_is_reference, "1 to 64 of A-Z a-z 0-9 _ . - with no dot first"),
    "clear_key": (_is_flag, "true or false"),
}


def _problem_with(name: str, value: object) -> Problem | None:
    is_allowed, allowed = _RULES[name]
    if is_allowed(value):
        return None
    # `shown` hides values of names that sound like secrets. A reference is not a secret, so pass no name.
    quoted = shown("" if name == "secret_ref" else name, value)
    return Problem(key=name, value=quoted, message=f"allowed is {allowed}")


def _validate(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    problem = _problem_with(attribute.name, value)
    if problem is not None:
        raise ValueError(str(problem))


def _none_when_empty(value: str | None) -> str | None:
    return (value.strip() or None) if isinstance(value, str) else value


@final
@attrs.frozen(kw_only=True)
class Settings:
    """The content of `[remote_access]`.

    Attributes:
        enabled: whether the tunnel should be up (default False).
        server: the relay's address; None for the configuration's; trimmed, at most 512 characters.
        service_name: the service's label; None for the configuration's; trimmed, at most 255 printable characters.
        transport: the transport's name; None for the configuration's. An unknown name is allowed here; the tunnel then
            fails with `unsupported_transport`.
        secret_ref: the reference of the relay key in the keystore.

    Raises:
        ValueError: a value is not allowed; it names the field, the value and what is allowed.
    """

    enabled: bool = attrs.field(default=False, validator=_validate)
    server: str | None = attrs.field(default=None, converter=_none_when_empty, validator=_validate)
    service_name: str | None = attrs.field(default=None, converter=_none_when_empty, validator=_validate)
    transport: str | None = attrs.field(default=None, converter=_none_when_empty, validator=_validate)
    secret_ref: str = attrs.field(default=DEFAULT_SECRET_REF, validator=_validate)


@final
class _RefusedError(ValueError):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem: Final = problem


def _checked(name: str) -> Any:
    def structure(value: Any, _type: object) -> Any:
        problem = _problem_with(name, value)
        if problem is not None:
            raise _RefusedError(problem)
        return value

    return override(struct_hook=structure)


# These hooks check each field before the class does, so that all problems of a file are reported together. Unknown keys
# are ignored: a newer gateway may have written them.
_CONVERTER: Final = cattrs.Converter(detailed_validation=True)
_CONVERTER.register_structure_hook(
    Settings,
    make_dict_structure_fn(
        Settings,
        _CONVERTER,
        enabled=_checked("enabled"),
        server=_checked("server"),
        service_name=_checked("service_name"),
        transport=_checked("transport"),
        secret_ref=_checked("secret_ref"),
    ),
)


def _trimmed(value: str | None) -> str | None:
    return value.strip() if isinstance(value, str) else value


def _validate_key(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, RelayKey):
        raise TypeError(f"key is a RelayKey, not {type(value).__name__}")


@final
@attrs.frozen(kw_only=True)
class SettingsUpdate:
    """A change that a client asks for.

    Attributes:
        enabled: switch the tunnel on or off; None for no change.
        server: the relay's address, trimmed, at most 512 characters; empty clears it; None for no change.
        key: a new relay key; None for no change.
        clear_key: delete the stored key, unless `key` is given.
    """

    enabled: bool | None = attrs.field(default=None, validator=attrs.validators.optional(_validate))
    server: str | None = attrs.field(default=None, converter=_trimmed, validator=_validate)
    key: RelayKey | None = attrs.field(default=None, validator=_validate_key)
    clear_key: bool = attrs.field(default=False, validator=_validate)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> SettingsUpdate:
        """Read the `UPDATE` object of the gateway contract. Unknown keys are ignored. Absent and null mean no change.

        Raises:
            ValueError: a field is malformed; it names each one, and quotes no value.
        """
        fields, problems = _read_wire(wire)
        del wire  # it may hold the key: a traceback that shows local variables must not show it
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**fields)

    @property
    def deletes_key(self) -> bool:
        """Whether to delete the stored key: `clear_key` is set, and there is no new key."""
        return self.clear_key and self.key is None

    def apply_to(self, settings: Settings) -> Settings:
        """`settings` with this change. The key is not part of them."""
        return attrs.evolve(
            settings,
            enabled=settings.enabled if self.enabled is None else self.enabled,
            server=settings.server if self.server is None else self.server,
        )


def _read_wire(wire: object) -> tuple[dict[str, Any], list[str]]:
    """The fields of an update, and their problems. It never raises, because a traceback would hold the key."""
    if not isinstance(wire, Mapping):
        return {}, [f"{_TABLE} is not an object"]
    fields: dict[str, Any] = {}
    problems: list[str] = []
    for name in ("enabled", "server", "clear_key"):
        value = wire.get(name)
        if value is not None:
            fields[name] = value
            is_allowed, allowed = _RULES[name]
            if not is_allowed(value):
                # Not quoted: a client that confuses fields may have put the key here.
                problems.append(f"{_TABLE}.{name} is not {allowed}")
    if wire.get("key") is not None:
        try:
            fields["key"] = RelayKey(wire["key"])
        except (TypeError, ValueError) as error:
            problems.append(f"{_TABLE}.key: {error}")
    return fields, problems


@final
@attrs.frozen(repr=False)
class _Document:
    """The content of the file: its bytes, its text without a byte order mark, the parsed TOML, and our table.

    Other tables may hold secrets. So this has no repr, and is never a local variable of a frame that raises.
    """

    content: bytes | None
    text: str
    data: dict[str, Any]
    settings: Settings

    @classmethod
    def parse(cls, content: bytes | None) -> _Document | tuple[Problem, ...]:
        """Parse strictly, since we must not overwrite what we do not understand. It never raises: see the class."""
        try:
            text = (content or b"").decode().removeprefix(_BOM)
            data = tomllib.loads(text)
        except UnicodeDecodeError as error:
            return (Problem(message=f"is not UTF-8 text, from byte {error.start}; mend or remove it"),)
        except (ValueError, RecursionError) as error:
            # Other exceptions are limits of Python: the digits of a number, or the depth of arrays.
            what = hide_secrets(str(error)) if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__
            return (Problem(message=f"is not TOML: {what}; mend or remove it"),)
        table = data.get(_TABLE, {})
        if not isinstance(table, dict):
            return (Problem(key=_TABLE, value=shown(_TABLE, table), message="allowed is a table"),)
        try:
            return cls(content, text, data, _CONVERTER.structure(table, Settings))
        except cattrs.ClassValidationError as group:
            refused = [error.problem for error in group.exceptions if isinstance(error, _RefusedError)]
            return tuple(attrs.evolve(problem, key=f"{_TABLE}.{problem.key}") for problem in refused)


@final
class SettingsFile:
    """`gateway-settings.toml`. Its methods block: call them in a thread.

    Args:
        path: the file. It need not exist. To write it, its folder must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._last: _Document | None = None
        self._signature: _Signature | None = None

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self._path

    def read(self) -> Settings:
        """The settings in the file; the defaults when it does not exist.

        The file is read again when its inode, size or times have changed, or when it was changed less than 2 seconds
        ago.

        Raises:
            StorageError: the file cannot be read.
            InvalidSettingsError: it is not TOML, or a value is not allowed. Each of its `problems` names the file, the
                key path, the value and what is allowed.
        """
        return self._load().settings

    def update(self, change: Callable[[Settings], Settings]) -> Settings:
        """Write the settings that `change` returns.

        Only the fields that `change` changes are written. A field that becomes None is removed. If nothing changes, the
        file is not written. When another program writes the file meanwhile, its content is kept, and `change` is called
        again with it. So `change` may be called several times.

        Args:
            change: from the current settings to the new ones, such as `SettingsUpdate.apply_to`.

        Returns:
            The settings in the file now.

        Raises:
            StorageError: the file cannot be read, locked or written. The old content is kept, unless only the last
                step, to make the rename durable, failed.
            InvalidSettingsError: it is not TOML, or a value is not allowed. The file is not written.
        """
        here = self._load()
        if change(here.settings) == here.settings:
            return here.settings
        with files.locked(self._path):
            files.remove_temporaries(self._path)
            for _ in range(_WRITE_ATTEMPTS):
                here = self._load(trust_times=False)
                wanted = change(here.settings)
                if wanted == here.settings:
                    return wanted
                written = self._edited(here, wanted)
                if files.replace(
                    self._path, memoryview(written.content or b""), only_if=functools.partial(self._is_unchanged, here)
                ):
                    self._last, self._signature = written, None
                    return wanted
        raise StorageError(f"{self._path} keeps being changed by another program; our change was not written")

    def __repr__(self) -> str:
        return f"SettingsFile({str(self._path)!r})"

    def _content(self) -> bytes | None:
        content = files.read(self._path, limit=_FILE_LIMIT)
        return None if content is None else bytes(content)

    def _load(self, *, trust_times: bool = True) -> _Document:
        last, signature = self._last, _signature(self._path)
        if trust_times and last is not None and signature is not None and signature == self._signature:
            return last
        document = self._read_after(last)
        if isinstance(document, tuple):
            raise refusal(attrs.evolve(problem, source=str(self._path)) for problem in document)
        if last is not None and last is not document:
            _LOGGER.info("%s was changed by another program since we last read it; its change is kept", self._path)
        # The signature was taken before the content was read. So the next read notices a change in between.
        self._last, self._signature = document, signature
        return document

    def _read_after(self, last: _Document | None) -> _Document | tuple[Problem, ...]:
        """The content of the file. It is not parsed again when it is the same as `last`."""
        content = self._content()
        return last if last is not None and last.content == content else _Document.parse(content)

    def _is_unchanged(self, read: _Document) -> bool:
        return self._content() == read.content

    def _edited(self, here: _Document, wanted: Settings) -> _Document:
        """The new content: the settings `wanted`, and all else as it is `here`."""
        before, after = attrs.asdict(here.settings), attrs.asdict(wanted)
        changes: dict[str, TomlValue] = {name: value for name, value in after.items() if value != before[name]}
        written = _edit(here, changes)
        if isinstance(written, str) or written.settings != wanted:
            names = ", ".join(f"{_TABLE}.{name}" for name in changes)
            reason = written if isinstance(written, str) else "not what was asked for"
            raise StorageError(
                f"{self._path} cannot be changed while all else in it stays as it is ({reason}); "
                f"change {names} there by hand"
            )
        return written


def _signature(path: Path) -> _Signature | None:
    """A value that changes when the file does; None when there is no reliable one.

    The clock of a file system is coarse: two changes within one tick may have the same times.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_SECONDS:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _edit(here: _Document, changes: Mapping[str, TomlValue]) -> _Document | str:
    """`here` with `changes`, or the reason why that is not possible. It never raises: frames would show the file."""
    try:
        text = edit_table(here.text, _TABLE, changes)
    except ValueError as error:
        return str(error)
    bom = _BOM.encode() if (here.content or b"").startswith(_BOM.encode()) else b""
    written = _Document.parse(bom + text.encode())
    return "; ".join(map(str, written)) if isinstance(written, tuple) else written
