"""One TOML table, read into one attrs class, with everything that is wrong with it told at once.

A class that stands for a table says what each key may hold with an attrs converter or validator, and what keys may
hold together with `Rule`s. Left to itself, attrs stops at the first that raises (and cattrs before it looks at unknown
keys and contradictions together). So

- `hold_back`, the class's `field_transformer`, makes a value that is refused a `_Wrong` for the moment;
- `settle`, called from `__attrs_post_init__`, raises one error for all of them and for the rules that the good ones
  break, so no instance with a `_Wrong` in it ever leaves its constructor;
- `structure` does the same for a table from a file, where keys can be unknown or missing too.

There is one way of validation however an instance is made: a file, a mapping, keywords, `attrs.evolve`.

Neighbours: `config.py` and `relay/config.py` declare such classes; `toml_file.py` reads files; `errors.py` has
`Problem` and what is raised; `redaction.py` says what of a value may be quoted.
"""

from __future__ import annotations

import difflib
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
    "refusal",
    "settle",
    "structure",
    "whole_number",
]

NOT_A_KEY: Final = "pioneer_tunnel: not a key"
"""In the metadata of a field: a program sets it, a file cannot."""

_NAME_LIMIT: Final = 60
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@final
@attrs.frozen
class Rule:
    """What several keys of a table may hold together.

    Attributes:
        about: the keys; the problem is told at the first.
        why_not: called with their values, each of them good by itself; returns what is wrong, or None.
    """

    about: tuple[str, ...]
    why_not: Callable[..., str | None]


class Table(attrs.AttrsInstance, Protocol):
    """An attrs class that stands for a table: made with `field_transformer=hold_back`, calls `settle` when made."""

    _RULES: ClassVar[tuple[Rule, ...]]


_T = TypeVar("_T", bound=Table)


@final
class RefusedItemsError(ValueError):
    """Raised by the converter of an array: what is wrong with its items, with keys as `[2].url`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__("an item is refused")
        self.problems: Final = tuple(problems)


@final
@attrs.frozen
class _Wrong:
    """Stands in a field, while its instance is made, for a value that was refused. It does not keep the value."""

    problems: tuple[Problem, ...]


@final
@attrs.frozen
class _Reader:
    """The converter of a field of a `Table`: its declared converter and validator, which cannot raise any more."""

    field: attrs.Attribute[Any]
    convert: Callable[[Any], Any] | None

    def __call__(self, value: Any) -> Any:
        name = self.field.name
        try:
            read = value if self.convert is None else self.convert(value)
            if self.field.validator is not None:
                self.field.validator(None, self.field, read)
        except RefusedItemsError as refused:
            return _Wrong(tuple(_located(problem, name) for problem in refused.problems))
        except UnsupportedTransportError as error:
            return _Wrong((_problem(name, value, str(error), kind=error.kind),))
        except (TypeError, ValueError) as error:
            return _Wrong((_problem(name, value, str(error)),))
        return read

    @property
    def __signature__(self) -> inspect.Signature:
        """What attrs reads, so that `help` shows what the declared converter takes."""
        if self.convert is not None:
            return inspect.signature(self.convert)
        value = inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY, annotation=self.field.type)
        return inspect.Signature([value])


def hold_back(_cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """The `field_transformer` of a `Table`: what a field refuses is held back until `settle`."""
    return [field.evolve(converter=_Reader(field, cast("Any", field.converter)), validator=None) for field in fields]


def settle(instance: Table) -> None:
    """Raise everything that is wrong with `instance`. To be called from its `__attrs_post_init__`.

    Raises:
        InvalidSettingsError: with `problems`.
        UnsupportedTransportError: the same, when one of them is a transport that nobody knows.
    """
    _, problems = _judge(type(instance), {f.name: getattr(instance, f.name) for f in attrs.fields(type(instance))})
    if problems:
        raise refusal(problems)


def structure(cls: type[_T], table: object, *, where: str = "", source: str | None = None, **given: object) -> _T:
    """Make a `cls` of a table.

    Args:
        cls: the class that stands for the table.
        table: what the TOML reader made of it.
        where: the table's own key path.
        source: the file it came from.
        given: values of the fields that are no keys of the table.

    Raises:
        InvalidSettingsError: with `problems`.
        UnsupportedTransportError: the same, when one of them is a transport that nobody knows.
    """
    values, problems = _examine(cls, table, given)
    if problems:
        raise refusal(_located(problem, where, source) for problem in problems)
    return cls(**values)


def examine_each(cls: type[Table], items: object) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The good values of each item of an array, instances of `cls` or tables, and what is wrong with the others.

    Raises:
        TypeError: it is not an array.
    """
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise TypeError("allowed is an array of tables")
    all_values: list[dict[str, Any]] = []
    all_problems: list[Problem] = []
    for index, item in enumerate(items):
        if isinstance(item, cls):
            all_values.append({field.name: getattr(item, field.name) for field in attrs.fields(cls)})
        else:
            values, problems = _examine(cls, item, {})
            all_values.append(values)
            all_problems += [_located(problem, f"[{index}]") for problem in problems]
    return all_values, all_problems


def refusal(problems: Iterable[Problem]) -> TunnelError:
    """The one error for all `problems`: each on a line of its own, and all of them in its `problems`.

    A transport that nobody knows has an error kind of its own on the wire, and the gateway contract looks at the
    transport before it looks at addresses: so it names the error, whatever else is wrong.
    """
    problems = tuple(problems)
    lines = [str(problem) for problem in problems]
    text = "\n".join(lines if len(lines) == 1 else [f"{len(lines)} problems:", *lines])
    if any(problem.kind is ErrorKind.UNSUPPORTED_TRANSPORT for problem in problems):
        return UnsupportedTransportError(text, problems=problems)
    return InvalidSettingsError(text, problems=problems)


def _examine(cls: type[Table], table: object, given: Mapping[str, object]) -> tuple[dict[str, Any], list[Problem]]:
    """What `table` holds that is good, by field, and everything that is wrong with it."""
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
            values[field.name] = _Wrong((Problem(key=field.name, message="is missing"),))
            continue
        else:
            value = _default(field, values)
        values[field.name] = cast("_Reader", field.converter)(value)
    good, problems = _judge(cls, values)
    # Never the value of an unknown key: the name is what is wrong, and a misspelt `key` holds a key.
    problems += [
        Problem(key=_unknown(str(name)), message="unknown key", nearest=nearest(str(name), keys))
        for name in table
        if name not in keys
    ]
    return good, problems


def _default(field: attrs.Attribute[Any], values: Mapping[str, Any]) -> Any:
    """The default of `field`, which may be made from the fields before it."""
    default: Any = field.default
    if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default
    return default.factory(SimpleNamespace(**values)) if default.takes_self else default.factory()


def _judge(cls: type[Table], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Part the good values from the wrong ones, and try the rules on the good ones."""
    good = {name: value for name, value in values.items() if not isinstance(value, _Wrong)}
    problems = [problem for value in values.values() if isinstance(value, _Wrong) for problem in value.problems]
    for rule in cls._RULES:
        if good.keys() >= set(rule.about):
            why_not = rule.why_not(*(good[name] for name in rule.about))
            if why_not is not None:
                problems.append(_problem(rule.about[0], good[rule.about[0]], why_not))
    return good, problems


def _problem(key: str, value: object, reason: str, *, kind: ErrorKind = ErrorKind.INVALID_SETTINGS) -> Problem:
    return Problem(key=key, value=shown(key, value), message=redact_reason(reason, value), kind=kind)


def _located(problem: Problem, where: str, source: str | None = None) -> Problem:
    """`problem` as one of the table at `where`."""
    joint = "." if where and problem.key and not problem.key.startswith("[") else ""
    return attrs.evolve(problem, key=where + joint + problem.key, source=source)


def _unknown(name: str) -> str:
    """An unknown key's name as it stands in a key path. It was typed by a person, so it may be anything."""
    name = cut(hide_secrets(name), _NAME_LIMIT)
    return name if _BARE_KEY.fullmatch(name) else repr(name)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is spelt most like `name`."""
    return next(iter(difflib.get_close_matches(name[:_NAME_LIMIT], known, n=1, cutoff=0.0)), None)


# What a key may hold


def whole_number(least: int, most: int | None = None) -> Callable[[Any, Any, Any], None]:
    """A validator: a whole number in a range; a bool is none."""
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


def label(most: int) -> Callable[[Any, Any, Any], None]:
    """A validator: a name that is shown to people and sent over the wire, so without surprises in it."""
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
        TypeError: saying `allowed`, if it is not.
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
    """A converter: a public key. What stands there by mistake may be the secret one, so it is not quoted."""
    if isinstance(value, PublicKey):
        return value
    return PublicKey.parse(a_text(value, "allowed is a public key, 'ed25519:' and 64 hexadecimal digits"))
