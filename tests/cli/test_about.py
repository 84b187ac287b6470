"""`demo`, `version`, and help."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner
from programs import run

from pioneer_tunnel._compiled import COMPILED
from pioneer_tunnel._version import __version__
from pioneer_tunnel.cli.commands import pioneer_tunnel

pytestmark = pytest.mark.usefixtures("user_config")


def test_the_demo_does_the_main_job() -> None:
    program = run("demo")
    said = program.out.decode()
    assert program.process.returncode == 0, program.errors
    for text in ("gets 200", "without gets 401", "32 MiB", "hears its echo", "gets 200 again", "exit status 0"):
        assert text in said


def test_version_has_what_a_bug_report_needs() -> None:
    found = json.loads(CliRunner().invoke(pioneer_tunnel, ["version", "--json"]).output)
    assert found["pioneer-tunnel"] == __version__
    assert found["build"] == ("compiled" if COMPILED else "pure Python")
    assert {"Python", "platform", "trio", "websockets", "OpenSSL"} <= found.keys()
    said = CliRunner().invoke(pioneer_tunnel, ["version"]).output
    assert [line.split()[0] for line in said.splitlines()] == [*found]


def commands(group: click.Group, *path: str) -> Iterator[tuple[list[str], click.Command]]:
    for name, command in group.commands.items():
        if name == "relay":
            continue
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield [*path, name], command


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("words", [words for words, _ in commands(pioneer_tunnel)], ids=" ".join)
def test_help_has_an_example(words: list[str], option: str) -> None:
    result = CliRunner().invoke(pioneer_tunnel, [*words, option])
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n(.*\n)*?.*pioneer-tunnel {' '.join(words)}", result.output)
    assert not re.search(r"\[click|\x1b", result.output)


def test_help_fits_a_narrow_terminal() -> None:
    for words, command in commands(pioneer_tunnel):
        text = command.get_help(click.Context(command, info_name=" ".join(words), terminal_width=40))
        wide = [line for line in text.splitlines() if len(line) > 40 and " " in line.strip()]
        assert all(re.match(r"\s+(pioneer-tunnel|pass|-|<)|Usage", line) for line in wide), wide


@pytest.mark.parametrize("words", [[], ["relay"], ["key"], ["config"]], ids=str)
def test_no_summary_of_a_command_is_cut_off(words: list[str]) -> None:
    result = CliRunner().invoke(pioneer_tunnel, [*words, "--help"], terminal_width=80)
    assert not [line for line in result.output.partition("Commands:")[2].splitlines() if line.endswith("...")]
