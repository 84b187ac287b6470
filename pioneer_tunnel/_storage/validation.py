"""Read a TOML table into an attrs class, and report all problems in one error.

The class declares what each key may hold with attrs converters and validators, and which values do not go together
with `Rule`s. By itself, attrs stops at the first converter or validator that raises, and cattrs does not report unknown
keys together with broken rules. So:

- `hold_back`, the class's `field_transformer`, catches the error of each field and puts a `_Rejected` into the field;
- `settle`, called by `__attrs_post_init__`, applies the rules to the valid fields, and raises one error for all
  problems. So a constructor never returns an instance with a `_Rejected` in it;
- `structure` does the same for a table from a file, where keys may also be unknown or missing.

Validation is the same for every way to make an instance: a file, a mapping, keywords, `attrs.evolve`.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, ClassVar, Final, Protocol, TypeVar, cast, final

import attrs

from .._model.errors import InvalidSettingsError, Problem, TunnelError, UnsupportedTransportError
from .._model.keys import KEY_PREFIX, PublicKey
from .._model.status import ErrorKind
from .._model.text import cut, hide_secrets, redact_reason, shown

__all__ = [
    "NOT_A_KEY",
    "RefusedItemsError",
    "Rule",
    "Table",
    "a_flag",
    "a_path",
    "a_public_key",
    "a_text",
    "examine_each",
    "hold_back",
    "label",
    "nearest",
    "one_of",
    "refusal",
    "settle",
    "structure",
    "whole_number",
]

NOT_A_KEY: Final = "pioneer_tunnel: not a key"
"""In a field's metadata: only a program may set this field, a file may not."""

_NAME_LIMIT: Final = 60
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@final
@attrs.frozen
class Rule:
    """A rule about several keys of a table.

    Attributes:
        about: the keys; the problem names the first one.
        why_not: called with their values, each valid by itself; returns what is wrong, or None.
    """

    about: tuple[str, ...]
    why_not: Callable[..., str | None]


class Table(attrs.AttrsInstance, Protocol):
    """An attrs class for a table, with `field_transformer=hold_back`; its `__attrs_post_init__` calls `settle`."""

    _RULES: ClassVar[tuple[Rule, ...]]


_T = TypeVar("_T", bound=Table)


@final
class RefusedItemsError(ValueError):
    """Raised by the converter of an array, with the problems of its items. Their keys are like `[2].url`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__("an item is refused")
        self.problems: Final = tuple(problems)


@final
@attrs.frozen
class _Rejected:
    """Replaces an invalid value of a field while the instance is made. It does not hold the value."""

    problems: tuple[Problem, ...]


@final
@attrs.frozen
class _Catcher:
    """The converter of a field of a `Table`: calls the declared converter and validator, and returns their errors."""

    field: attrs.Attribute[Any]
    convert: Callable[[Any], Any] | None

    def __call__(self, value: Any) -> Any:
        name = self.field.name
        try:
            read = value if self.convert is None else self.convert(value)
            if self.field.validator is not None:
                self.field.validator(None, self.field, read)
        except RefusedItemsError as refused:
            return _Rejected(tuple(_located(problem, name) for problem in refused.problems))
        except UnsupportedTransportError as error:
            return _Rejected((_problem(name, value, str(error), kind=error.kind),))
        except (TypeError, ValueError) as error:
            return _Rejected((_problem(name, value, str(error)),))
        return read

    @property
    def __signature__(self) -> inspect.Signature:
        """The declared converter's signature. attrs reads it for the constructor's."""
        if self.convert is not None:
            return inspect.signature(self.convert)
        value = inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY, annotation=self.field.type)
        return inspect.Signature([value])


def hold_back(_cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """The `field_transformer` of a `Table`: errors of fields are not raised before `settle`."""
    return [field.evolve(converter=_Catcher(field, cast("Any", field.converter)), validator=None) for field in fields]


def settle(instance: Table) -> None:
    """Raise all problems of `instance` in one error. Called by its `__attrs_post_init__`.

    Raises:
        InvalidSettingsError: with `problems`.
        UnsupportedTransportError: with `problems`, when one of them is an unknown transport.
    """
    _, problems = _check(type(instance), {f.name: getattr(instance, f.name) for f in attrs.fields(type(instance))})
    if problems:
        raise refusal(problems)


def structure(cls: type[_T], table: object, *, where: str = "", source: str | None = None, **given: object) -> _T:
    """Make a `cls` from a table.

    Args:
        cls: the class of the table.
        table: the table, as the TOML parser returned it.
        where: the table's key path.
        source: the file it came from.
        given: values of fields that the table does not have; a key of the table wins.

    Raises:
        InvalidSettingsError: with `problems`.
        UnsupportedTransportError: with `problems`, when one of them is an unknown transport.
    """
    values, problems = _read_table(cls, table, given)
    if problems:
        raise refusal(_located(problem, where, source) for problem in problems)
    return cls(**values)


def examine_each(cls: type[Table], items: object) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Read each item of an array: an instance of `cls` or a table. Returns their valid values, and all problems.

    Raises:
        TypeError: `items` is not an array.
    """
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise TypeError("allowed is an array of tables")
    all_values: list[dict[str, Any]] = []
    all_problems: list[Problem] = []
    for index, item in enumerate(items):
        if isinstance(item, cls):
            all_values.append({field.name: getattr(item, field.name) for field in attrs.fields(cls)})
        else:
            values, problems = _read_table(cls, item, {})
            all_values.append(values)
            all_problems += [_located(problem, f"[{index}]") for problem in problems]
    return all_values, all_problems


def refusal(problems: Iterable[Problem]) -> TunnelError:
    """One error for all `problems`: its text has a line for each, its attribute `problems` has them all.

    An unknown transport has an error kind of its own, and the gateway contract checks the transport before the
    addresses. So it decides the kind of the error, whatever else is wrong.
    """
    problems = tuple(problems)
    lines = [str(problem) for problem in problems]
    text = "\n".join(lines if len(lines) == 1 else [f"{len(lines)} problems:", *lines])
    if any(problem.kind is ErrorKind.UNSUPPORTED_TRANSPORT for problem in problems):
        return UnsupportedTransportError(text, problems=problems)
    return InvalidSettingsError(text, problems=problems)


def _read_table(cls: type[Table], table: object, given: Mapping[str, object]) -> tuple[dict[str, Any], list[Problem]]:
    """The valid values of `table`, by field, and all its problems."""
    if not isinstance(table, Mapping):
        return {}, [Problem(value=shown("", table), message="allowed is a table")]
    keys = [field.name for field in attrs.fields(cls) if NOT_A_KEY not in field.metadata]
    values: dict[str, Any] = {}
    for field in attrs.fields(cls):
        if field.name in keys and field.name in table:
            value = table[field.name]
        elif field.name in given:
            value = given[field.name]
        elif field.default is attrs.NOTHING:
            values[field.name] = _Rejected((Problem(key=field.name, message="is missing"),))
            continue
        else:
            value = _default(field, values)
        values[field.name] = cast("_Catcher", field.converter)(value)
    good, problems = _check(cls, values)
    # Never quote the value of an unknown key: it may be a misspelt `key`, whose value is a secret.
    problems += [
        Problem(key=_name_shown(str(name)), message="unknown key", nearest=nearest(str(name), keys))
        for name in table
        if name not in keys
    ]
    return good, problems


def _default(field: attrs.Attribute[Any], values: Mapping[str, Any]) -> Any:
    """The default of `field`. A factory may use the fields before it."""
    default: Any = field.default
    if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default
    return default.factory(SimpleNamespace(**values)) if default.takes_self else default.factory()


def _check(cls: type[Table], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The valid values; and the problems of the rejected ones and of the rules about valid ones."""
    good = {name: value for name, value in values.items() if not isinstance(value, _Rejected)}
    problems = [problem for value in values.values() if isinstance(value, _Rejected) for problem in value.problems]
    for rule in cls._RULES:
        if good.keys() >= set(rule.about):
            why_not = rule.why_not(*(good[name] for name in rule.about))
            if why_not is not None:
                problems.append(_problem(rule.about[0], good[rule.about[0]], why_not))
    return good, problems


def _problem(key: str, value: object, reason: str, *, kind: ErrorKind = ErrorKind.INVALID_SETTINGS) -> Problem:
    return Problem(key=key, value=shown(key, value), message=redact_reason(reason, value), kind=kind)


def _located(problem: Problem, where: str, source: str | None = None) -> Problem:
    """`problem` with its key path under the table at `where`."""
    dot = "." if where and problem.key and not problem.key.startswith("[") else ""
    return attrs.evolve(problem, key=where + dot + problem.key, source=source)


def _name_shown(name: str) -> str:
    """An unknown key's name, for a key path in an error. A person typed it, so it may be anything."""
    name = cut(hide_secrets(name), _NAME_LIMIT)
    return name if _BARE_KEY.fullmatch(name) else repr(name)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` that is most similar to `name`."""
    import difflib  # noqa: PLC0415  # only errors need it

    return next(iter(difflib.get_close_matches(name[:_NAME_LIMIT], known, n=1, cutoff=0.0)), None)


# What a key may hold


def whole_number(least: int, most: int | None = None) -> Callable[[Any, Any, Any], None]:
    """A validator: a whole number in a range. A bool is not a number here."""
    allowed = f"allowed is a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"

    def validate(_instance: Any, _field: Any, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(allowed)
        if value < least or (most is not None and value > most):
            raise ValueError(allowed)

    return validate


def a_flag(_instance: Any, _field: Any, value: Any) -> None:
    """A validator: true or false."""
    if not isinstance(value, bool):
        raise TypeError("allowed are true and false")


def one_of(*allowed: str | None) -> Callable[[Any, Any, Any], None]:
    """A validator: one of these words; None among them if the key may be left out."""
    words = [f"'{word}'" for word in allowed if word is not None]
    text = f"allowed {'is' if len(words) == 1 else 'are'} {' and '.join(words)}"
    if None in allowed:
        text += "; leave it out for none"

    def validate(_instance: Any, _field: Any, value: Any) -> None:
        if value not in allowed:
            raise ValueError(text)

    return validate


def label(most: int) -> Callable[[Any, Any, Any], None]:
    """A validator: a name that people see and that is sent to the relay: 1 to `most` printable characters."""
    allowed = f"allowed are 1 to {most} printable characters, without outer white space"

    def validate(_instance: Any, _field: Any, value: Any) -> None:
        text = a_text(value, allowed)
        unprintable = any(unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" for char in text)
        if not 1 <= len(text) <= most or text != text.strip() or unprintable:
            raise ValueError(allowed)
        if KEY_PREFIX in text:
            raise ValueError("looks like a relay key, which belongs in the keystore")

    return validate


def a_text(value: object, allowed: str) -> str:
    """`value`, if it is a string.

    Raises:
        TypeError: with the text `allowed`, if it is not.
    """
    if not isinstance(value, str):
        raise TypeError(allowed)
    return value


def a_path(value: str | Path) -> Path:
    """A converter: a path, not empty."""
    given: object = value
    text = str(given) if isinstance(given, str | PurePath) else ""
    if not text or "\0" in text:
        raise ValueError("allowed is a path")
    return Path(text)


def a_public_key(value: str | PublicKey) -> PublicKey:
    """A converter: a public key. An error does not quote the value: it may be the secret key, put there by mistake."""
    if isinstance(value, PublicKey):
        return value
    return PublicKey.parse(a_text(value, "allowed is a public key, 'ed25519:' and 64 hexadecimal digits"))
