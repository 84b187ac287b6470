"""`[gateway.remote_access.process]`: the operator's tunnel program, as one frozen `ProcessConfig`.

    [gateway.remote_access]
    transport = "process"

    [gateway.remote_access.process]
    command = ["frpc", "-c", "{config}"]
    config_template = 'serverAddr = "{relay_host}" …'
    connected_pattern = "start proxy success"

Everyone who can list processes can read their arguments. So a command that asks for the relay key is refused here, and
the error names the other ways. All other problems are reported here too (see `_storage.validation`), before anything
runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, final

import attrs

from ..._model.addresses import Address, PublicUrl, quotable
from ..._model.errors import Problem, TunnelError
from ..._model.text import hide_secrets, redact_reason, shown
from ..._storage.validation import RefusedItemsError, Rule, a_flag, a_text, hold_back, settle, structure, whole_number
from .placeholders import Template

__all__ = ["PLACEHOLDERS", "ProbeUrl", "ProcessConfig", "TunnelProgram", "a_process"]

PLACEHOLDERS: Final = (
    "relay",
    "relay_host",
    "relay_port",
    "local",
    "local_host",
    "local_port",
    "service",
    "runtime_dir",
    "config",
    "key_file",
    "proxy",
)
"""Placeholders of a command.

`config_template` has no `config`, which is the path of itself, and has `key` and `proxy_with_credentials`.
"""

_CONFIG_PLACEHOLDERS: Final = (*(name for name in PLACEHOLDERS if name != "config"), "key", "proxy_with_credentials")
_REFUSED_PROXY: Final = (
    "holds '{proxy_with_credentials}', which is a secret; write it to config_template, and let the program read"
    " '{config}'"
)
_REFUSED_IN_COMMAND: Final = {
    "proxy_with_credentials": _REFUSED_PROXY,
    "key": "holds '{key}', and everybody on this machine can read the arguments of a process; let the program read"
    " '{key_file}', or a '{config}' made of config_template, or set key_on_stdin or key_variable",
}
_REFUSED_IN_ENVIRONMENT: Final = {
    "proxy_with_credentials": _REFUSED_PROXY,
    "key": "holds '{key}'; name the variable in key_variable, if the program's environment is to have the key",
}
_Variables: TypeAlias = tuple[tuple[str, Template], ...]
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROBE_URL: Final = re.compile(r"([^/]*//[^/?#]*)(/(?:[!$&'()*+,;=:@/A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})*)?")
_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS


def _template(text: object, known: Iterable[str], refused: Mapping[str, str] | None = None) -> Template:
    if isinstance(text, Template):
        return text
    written = a_text(text, "allowed is a string")
    if "\0" in written:
        raise ValueError("holds a NUL character, which no program can be given")
    return Template.parse(written, known, refused)


def _command(value: Sequence[str | Template]) -> tuple[Template, ...]:
    allowed = "allowed is an array of strings: the program, then its arguments"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise TypeError(allowed)
    words, problems = [], []
    for index, word in enumerate(given):
        try:
            words.append(_template(word, PLACEHOLDERS, _REFUSED_IN_COMMAND))
            if index == 0 and not words[0].text.strip():
                raise ValueError("is empty; it is the name or the path of the program")
        except (TypeError, ValueError) as error:
            key, value = f"[{index}]", word.text if isinstance(word, Template) else word
            problems.append(Problem(key=key, value=shown(key, value), message=redact_reason(str(error), value)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(words)


def _environment(value: _Variables | Mapping[str, str | Template]) -> _Variables:
    given: object = dict(value) if isinstance(value, tuple) else value
    if not isinstance(given, Mapping):
        raise TypeError("allowed is a table of strings")
    variables, problems = [], []
    for name, text in given.items():
        try:
            variables.append((_variable(name), _template(text, PLACEHOLDERS, _REFUSED_IN_ENVIRONMENT)))
        except (TypeError, ValueError) as error:
            known = isinstance(name, str) and _VARIABLE.fullmatch(name) is not None
            # The value of a variable may be a secret of the program, so it is not quoted.
            problems.append(Problem(key=hide_secrets(name if known else repr(name)), message=str(error)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(variables)


def _variable(value: object) -> str:
    name = a_text(value, "allowed is the name of an environment variable, as a string")
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            "is not the name of an environment variable: allowed are letters, digits and '_', no digit first"
        )
    return name


def _variables(value: Sequence[str]) -> tuple[str, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of names of environment variables")
    return tuple(_variable(name) for name in given)


def _config_template(value: str | Template) -> Template:
    try:
        return _template(value, _CONFIG_PLACEHOLDERS)
    except (TypeError, ValueError) as error:
        # A program's configuration may hold any secret, so nothing of it is quoted.
        raise RefusedItemsError([Problem(message=str(error))]) from None


def _pattern(value: str | re.Pattern[str]) -> re.Pattern[str]:
    if isinstance(value, re.Pattern):
        return value
    try:
        pattern = re.compile(a_text(value, "allowed is a regular expression, as a string"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    if pattern.search(""):
        raise ValueError("matches an empty line, so it says nothing about the tunnel")
    return pattern


def _public_url(value: str | PublicUrl) -> PublicUrl:
    if isinstance(value, PublicUrl):
        return value
    return PublicUrl.parse(a_text(value, "allowed is an http:// or https:// URL, as a string"))


@final
@attrs.frozen
class ProbeUrl:
    """The URL that is asked to see whether the tunnel is up: a site and a path."""

    site: PublicUrl
    path: str = "/"

    @classmethod
    def parse(cls, text: str) -> ProbeUrl:
        """Read `http://host[:port][/path]` or `https://…`.

        Raises:
            ValueError: names the value and what is wrong with it. A query is not allowed, since it may be a secret.
        """
        match = _PROBE_URL.fullmatch(text)
        if match is None:
            raise ValueError(f"{quotable(text)!r} is not allowed; write http://host/path or https://host/path")
        return cls(PublicUrl.parse(match[1]), match[2] or "/")

    @property
    def authority(self) -> str:
        """The value of the header `Host`: the host, and the port unless it is the default of the scheme."""
        return str(self.site).partition("//")[2]

    def __str__(self) -> str:
        return f"{self.site}{self.path}"


def _probe_url(value: str | ProbeUrl) -> ProbeUrl:
    if isinstance(value, ProbeUrl):
        return value
    return ProbeUrl.parse(a_text(value, "allowed is an http:// or https:// URL, as a string"))


def _probe_statuses(value: Sequence[int]) -> tuple[int, ...]:
    allowed = "allowed is an array of HTTP statuses, from 100 to 599; leave it out for any"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(allowed)
    if any(not isinstance(status, int) or isinstance(status, bool) or not 100 <= status <= 599 for status in given):
        raise ValueError(allowed)
    return tuple(given)


def _config_without_template(
    command: Sequence[Template], template: Template | None, environment: _Variables
) -> str | None:
    texts = (*command, *(text for _, text in environment))
    if template is None and any("config" in text.placeholders for text in texts):
        return "it, or environment, holds '{config}', and there is no config_template to make that file of"
    return None


def _template_without_config(
    template: Template | None, command: Sequence[Template], environment: _Variables
) -> str | None:
    texts = (*command, *(text for _, text in environment))
    if template is None or any("config" in text.placeholders for text in texts):
        return None
    return "is not used: neither command nor environment holds '{config}', the path of the file that is made of it"


def _settles_too_late(
    settle_ms: int, startup_timeout_ms: int, pattern: re.Pattern[str] | None, probe_url: ProbeUrl | None
) -> str | None:
    if pattern is not None or probe_url is not None or settle_ms < startup_timeout_ms:
        return None
    return f"allowed is less than startup_timeout_ms, which is {startup_timeout_ms}"


def _said_twice(variable: str | None, environment: _Variables) -> str | None:
    if variable is None or variable not in dict(environment):
        return None
    return "stands in environment too; one variable has one value"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class ProcessConfig:
    """The operator's configuration of the tunnel program.

    Made as a part of `RemoteAccessConfig`, or with keywords, which take the text of the file or the value itself.

    Attributes:
        command: the program and its arguments; each may hold `PLACEHOLDERS`. A program without a slash is looked for
            in PATH, one with a slash relative to the folder of the gateway's configuration file.
        config_template: the text of a file that is written for each run, readable by this user alone; `{config}` is its
            path. It may hold `{key}`.
        key_on_stdin: whether the key is written to the program's standard input, as one line, followed by EOF.
        key_variable: the environment variable for the key. Other processes of this user, and root, can read it there.
        environment: variables that the program gets in addition to the few that it inherits.
        inherit: names of further variables that it inherits.
        connected_pattern: a regular expression; the tunnel is up when a line of the program's output matches.
        probe_url: the tunnel is up when this URL answers.
        probe_interval_ms: milliseconds between probes.
        probe_statuses: the HTTP statuses that count as an answer; empty for any.
        settle_ms: without pattern and probe, the tunnel is up when the program has run for so many milliseconds.
        startup_timeout_ms: milliseconds until the tunnel has to be up.
        stop_grace_ms: milliseconds between SIGTERM and SIGKILL.
        public_url: where visitors reach the gateway, for the status.

    Raises:
        InvalidSettingsError: with all problems in `problems`.
    """

    command: tuple[Template, ...] = attrs.field(converter=_command)
    config_template: Template | None = attrs.field(
        default=None, repr=False, converter=attrs.converters.optional(_config_template)
    )
    key_on_stdin: bool = attrs.field(default=False, validator=a_flag)
    key_variable: str | None = attrs.field(default=None, converter=attrs.converters.optional(_variable))
    environment: _Variables = attrs.field(default=(), repr=False, converter=_environment)
    inherit: tuple[str, ...] = attrs.field(default=(), converter=_variables)
    connected_pattern: re.Pattern[str] | None = attrs.field(default=None, converter=attrs.converters.optional(_pattern))
    probe_url: ProbeUrl | None = attrs.field(default=None, converter=attrs.converters.optional(_probe_url))
    probe_interval_ms: int = attrs.field(default=1000, validator=whole_number(1, _HOUR_MS))
    probe_statuses: tuple[int, ...] = attrs.field(default=(), converter=_probe_statuses)
    settle_ms: int = attrs.field(default=2000, validator=whole_number(0, _HOUR_MS))
    startup_timeout_ms: int = attrs.field(default=30_000, validator=whole_number(1, _HOUR_MS))
    stop_grace_ms: int = attrs.field(default=3000, validator=whole_number(0, _MINUTE_MS))
    public_url: PublicUrl | None = attrs.field(default=None, converter=attrs.converters.optional(_public_url))

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("command", "config_template", "environment"), _config_without_template),
        Rule(("config_template", "command", "environment"), _template_without_config),
        Rule(("settle_ms", "startup_timeout_ms", "connected_pattern", "probe_url"), _settles_too_late),
        Rule(("key_variable", "environment"), _said_twice),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    @property
    def uses_key_file(self) -> bool:
        """Whether a text holds `{key_file}`, so that a file with the key is needed."""
        return "key_file" in self._placeholders

    @property
    def uses_proxy(self) -> bool:
        """Whether a text holds the proxy."""
        return not self._placeholders.isdisjoint({"proxy", "proxy_with_credentials"})

    @property
    def _placeholders(self) -> frozenset[str]:
        texts = [*self.command, *(text for _, text in self.environment)]
        if self.config_template is not None:
            texts.append(self.config_template)
        return frozenset[str]().union(*(text.placeholders for text in texts))


def a_process(value: ProcessConfig | Mapping[str, Any]) -> ProcessConfig:
    """A converter for the table. Its problems are reported under their own keys."""
    if isinstance(value, ProcessConfig):
        return value
    try:
        return structure(ProcessConfig, value)
    except TunnelError as error:
        raise RefusedItemsError(error.problems) from None


def _absolute(path: Path) -> Path:
    return path.absolute()


@final
@attrs.frozen
class TunnelProgram:
    """What the transport needs to run the operator's program.

    Attributes:
        config: the program, and what shows that its tunnel is up.
        local: the local gateway, to which the program connects.
        runtime_folder: where files for the program go while it runs.
        folder: the working folder of the program. A path in `command` is relative to it.
    """

    config: ProcessConfig
    local: Address = attrs.field(kw_only=True)
    runtime_folder: Path = attrs.field(kw_only=True, converter=_absolute)
    folder: Path = attrs.field(kw_only=True, converter=_absolute)
