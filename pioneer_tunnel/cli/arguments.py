"""Arguments of the command line, and errors about them that show no key.

A key pasted in the place of another argument must not reach a log or a screen. So an argument that holds a relay key is
refused before anything else. Other secrets, such as the token of a rathole, can have any form. So an error quotes no
value that may be one, and no name of a file that does not exist where a key is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import click

from .._model.addresses import Address, HttpsAddress, LocalAddress, PublicUrl, local_address
from .._model.keys import KEY_PREFIX
from .._model.proxies import Direct, Proxy, configured_proxy
from .._model.services import FIRST_SERVICE, SERVICE_NAMES, is_service_name
from .._model.text import redact_reason, shown
from ..monitoring.address import SiteAddress, site_address

__all__ = [
    "STDIN",
    "Choice",
    "Command",
    "Commands",
    "ExistingFile",
    "RelayText",
    "local_servers",
    "log_format_option",
    "read_proxy",
    "read_site_address",
    "with_options_named",
]

if TYPE_CHECKING:
    _AnyChoice = click.Choice[str]
else:
    _AnyChoice = click.Choice  # generic from click 8.2 on

STDIN: Final = Path("-")
"""In place of the path of a file: standard input."""

_LIKE_A_NAME: Final = re.compile(r"[\w.-]+")
_WORDS: Final = "pioneer_tunnel: words of the command line"

# What the library calls its parameters, as a word of a message; a part of a path is none.
_PARAMETERS: Final = {
    "ca_file": "--ca-file",
    "key_mode": "--key-mode",
    "proxy_credentials_file": "--proxy-credentials-file",
    "relay_identity": "--relay-identity",
    "service_name": "--service",
    "system_trust": "--system-trust",
}
_PARAMETER: Final = re.compile(rf"(?<![\w/.'-])({'|'.join(_PARAMETERS)})(?![\w/.'-])")


def with_options_named(message: str) -> str:
    """A message of the library, with our names of its parameters."""
    return _PARAMETER.sub(lambda match: _PARAMETERS[match[0]], message)


class Commands(click.Group):
    """The group of all commands. What the user typed is quoted in an error only if it cannot be a secret."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        words = [*args]
        if any(KEY_PREFIX in word and not os.path.exists(word) for word in words):  # noqa: PTH110  # it is no Path
            raise click.UsageError(
                "an argument holds a relay key, and all users of this machine can see arguments. Write the key to a"
                " file that only you can read, and name that file with --key-file"
            )
        with _no_secret_quoted(words):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[_WORDS] = words
        return context

    def invoke(self, ctx: click.Context) -> Any:
        with _no_secret_quoted(ctx.meta[_WORDS]):
            return super().invoke(ctx)


@contextmanager
def _no_secret_quoted(words: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        for word in words:
            value = (word.partition("=")[2] if word.startswith("-") else "") or word.lstrip("-")
            if shown("", value) != repr(value) and not os.path.exists(value):  # noqa: PTH110  # it is no Path
                error.message = error.message.replace(value, "…")  # type: ignore[misc]  # there is no other way
        raise


class Command(click.Command):
    """A command that does not quote surplus arguments: one of them may be the key. Its help fits narrow terminals."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        super().parse_args(ctx, args)
        if ctx.args:
            usage = " ".join(self.collect_usage_pieces(ctx))
            raise click.UsageError(f"there are too many arguments; write {usage}", ctx)
        return ctx.args

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does it, with a narrower column for the options where there is little room."""
        records = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(records, col_max=min(30, max(formatter.width - 50, 8)))


class Choice(_AnyChoice):
    """A choice whose error names what is allowed, and not what was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"allowed is {', '.join(self.choices)}", param, ctx)


@final
class _NoFileError(click.ClickException):
    """A file that does not exist: no mistake in the usage, so the exit status is 1."""

    def __init__(self, message: str, param: click.Parameter | None) -> None:
        super().__init__(message)
        self.param: Final = param


class ExistingFile(click.Path):
    """The path of a file that exists.

    Args:
        or_stdin: allow `-`, for standard input.
    """

    def __init__(self, *, or_stdin: bool = False) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self._or_stdin: Final = or_stdin

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if self._or_stdin and path == STDIN:
            return path
        if not os.path.exists(path):  # noqa: PTH110  # `Path.exists` raises for a name that is too long
            name = shown("" if param is None or param.name is None else param.name, value)
            why = (
                "there is no such file; name the file that holds the key, never the key itself"
                if name is None
                else f"there is no file {name}"
            )
            raise _NoFileError(why if param is None else f"{param.opts[0]}: {why}", param)
        return path


@final
class RelayText(click.types.StringParamType):
    """The address of a relay. An environment variable may hold several, separated by white space or commas."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return rv.replace(",", " ").split()


def local_servers(words: Sequence[str], *, ca_file: Path | None = None) -> dict[str, LocalAddress]:
    """What `expose` makes reachable, by the name of the service: `LOCAL` for the first one, or `NAME=LOCAL`.

    Args:
        ca_file: further certificate authorities for those with TLS.

    Raises:
        click.BadParameter: an address or a name is not valid, or a name occurs twice.
        click.UsageError: there is a CA file, and none has TLS.
    """
    servers: dict[str, LocalAddress] = {}
    for word in words:
        name, equals, address = word.partition("=")
        if not equals or not is_service_name(name):
            name, address = FIRST_SERVICE, word
        try:
            if equals and not name and _LIKE_A_NAME.fullmatch(word.partition("=")[0]):
                raise ValueError(f"the service {word.partition('=')[0]!r}: allowed are {SERVICE_NAMES}")
            if name in servers:
                raise ValueError(f"the service {name!r} is there twice" if name else "name each service: NAME=LOCAL")
            servers[name] = _local(address)
        except ValueError as error:
            raise click.BadParameter(redact_reason(str(error), address), param_hint="LOCAL") from None
    if ca_file is None:
        return servers
    secure = {name: address for name, address in servers.items() if isinstance(address, HttpsAddress)}
    if not secure:
        raise click.UsageError("--local-ca-file is for a LOCAL with https://")
    return servers | {name: attrs.evolve(address, ca_file=ca_file) for name, address in secure.items()}


def _local(text: str) -> LocalAddress:
    """An address as people type it: a port alone, with or without a colon, or what they have in their browser."""
    if text.isdecimal() or (text[:1] == ":" and text[1:].isdecimal()):
        return local_address(f"127.0.0.1:{text.removeprefix(':')}")
    if text.lower().startswith("http://"):
        url = PublicUrl.parse(text)
        return Address(url.host, url.port)
    return local_address(text)


def read_proxy(_context: click.Context, _option: click.Parameter, value: str | None) -> Proxy | Direct | None:
    """The callback of the option for the proxy.

    Raises:
        click.BadParameter: it is not the URL of a proxy, or holds credentials.
    """
    if value is None:
        return None
    try:
        return configured_proxy(value)
    except ValueError as error:
        raise click.BadParameter(with_options_named(redact_reason(str(error), value))) from None


log_format_option: Final = click.option(
    "--log-format",
    type=Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How log lines are written.",
)


def read_site_address(_context: click.Context, _option: click.Parameter, value: str | None) -> SiteAddress | None:
    """The callback of the option for metrics.

    Raises:
        click.BadParameter: it is no address.
    """
    try:
        return None if value is None else site_address(value)
    except ValueError as error:
        raise click.BadParameter(redact_reason(str(error), value or "")) from None
