"""`[gateway.remote_access.process]`: placeholders, what is refused and why, and no secret in what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel._model.addresses import PublicUrl
from pioneer_tunnel._model.errors import InvalidSettingsError, Problem, TunnelError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.dialing import dial_tcp
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.planning import Plan, make_plan
from pioneer_tunnel.gateway.transport import Transport
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.transports.process.config import PLACEHOLDERS, ProbeUrl, ProcessConfig
from pioneer_tunnel.transports.process.placeholders import Template
from pioneer_tunnel.transports.process.program import ProcessTransport
from pioneer_tunnel.yamux import Limits

KEY = RelayKey("x" * 20)
FRPC = """
[gateway.remote_access]
transport = "process"

[gateway.remote_access.process]
command = ["frpc", "-c", "{config}"]
config_template = '''
serverAddr = "{relay_host}"
serverPort = {relay_port}
auth.token = "{key}"
[[proxies]]
name = "{service}"
localPort = {local_port}
meta = {{ home = "yes" }}
'''
connected_pattern = "start proxy success"
probe_url = "https://office.example.com/health"
probe_statuses = [200, 401]
environment = { GODEBUG = "", WHERE = "{runtime_dir}" }
inherit = ["KUBECONFIG"]
public_url = "https://office.example.com"
stop_grace_ms = 500
"""


def plan_of(config: RemoteAccessConfig, key: RelayKey | None = KEY) -> Plan:
    return make_plan(config, TRANSPORTS["process"], key, instance="0", dial=dial_tcp, limits=Limits(), services=None)


def problem(**given: Any) -> Problem:
    """The one problem of a process table made with keywords."""
    with pytest.raises(InvalidSettingsError) as error:
        ProcessConfig(**({"command": ["frpc"]} | given))
    (only,) = error.value.problems
    return only


def test_a_table_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(FRPC)
    config = RemoteAccessConfig.load(path)
    assert config.effective_transport is Transport.PROCESS
    process = config.process
    assert process is not None
    assert [word.text for word in process.command] == ["frpc", "-c", "{config}"]
    assert process.config_template is not None
    assert 'meta = { home = "yes" }' in process.config_template.fill(dict.fromkeys([*PLACEHOLDERS, "key"], "x"))
    assert process.connected_pattern is not None
    assert process.connected_pattern.search("[I] start proxy success")
    assert process.probe_url == ProbeUrl(PublicUrl("https", "office.example.com", 443), "/health")
    assert str(process.probe_url) == "https://office.example.com/health"
    assert dict(process.environment)["WHERE"].fill({"runtime_dir": "/run"}) == "/run"
    assert process.public_url == PublicUrl("https", "office.example.com", 443)
    assert not process.uses_key_file
    serve = plan_of(config).serve
    assert isinstance(serve, ProcessTransport)
    program = serve.program
    assert program is not None
    assert program.config == process
    assert program.folder == tmp_path
    assert program.runtime_folder == tmp_path / "remote-access"
    assert str(program.local) == "127.0.0.1:17878"
    assert attrs.evolve(config, service_name="other").process == process
    hash(config)


def test_the_defaults() -> None:
    config = ProcessConfig(command=["frpc"])
    assert (config.settle_ms, config.startup_timeout_ms, config.stop_grace_ms) == (2000, 30_000, 3000)
    assert (config.key_on_stdin, config.key_variable, config.inherit, config.environment) == (False, None, (), ())
    for absent in (config.config_template, config.connected_pattern, config.probe_url, config.public_url):
        assert absent is None


def test_transport_process_without_a_program_is_invalid() -> None:
    with pytest.raises(InvalidSettingsError, match=r"\[gateway\.remote_access\.process\]"):
        plan_of(RemoteAccessConfig(transport="process"), key=None)  # told before the missing key
    assert Transport.PROCESS in TRANSPORTS


def test_everything_wrong_is_told_at_once_with_its_key() -> None:
    with pytest.raises(TunnelError) as error:
        RemoteAccessConfig.from_table(
            {
                "local_addr": "nowhere",
                "process": {
                    "command": ["frpc", "{kee}", "{relay_hots}", "{key}", 7],
                    "connected_pattern": "(",
                    "probe_url": "ftp://x",
                    "settle_ms": -1,
                    "stop_grace": 1,
                    "environment": {"9": "x", "A": "{"},
                    "key_variable": "a b",
                },
            },
            source="gateway.toml",
        )
    found = {told.key.removeprefix("gateway.remote_access."): told for told in error.value.problems}
    assert set(found) == {
        *("local_addr", "process.command[1]", "process.command[2]", "process.command[3]", "process.command[4]"),
        *("process.connected_pattern", "process.probe_url", "process.settle_ms", "process.stop_grace"),
        *("process.environment.'9'", "process.environment.A", "process.key_variable"),
    }
    assert all(told.source == "gateway.toml" for told in found.values())
    assert "'{kee}'" in found["process.command[1]"].message
    assert "'{key_file}'" in found["process.command[1]"].message  # and not the one that is refused
    assert "'{relay_host}'" in found["process.command[2]"].message
    assert found["process.stop_grace"].nearest == "stop_grace_ms"


def test_the_key_among_the_arguments_is_refused_with_what_to_do_instead() -> None:
    told = problem(command=["frpc", "--token={key}"])
    assert told.key == "command[1]"
    for word in ("arguments of a process", "{key_file}", "config_template", "key_on_stdin", "key_variable"):
        assert word in told.message
    assert "key_variable" in problem(environment={"TOKEN": "{key}"}).message


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({"command": []}, "command", "the program"),
        ({"command": "frpc -c x"}, "command", "array"),
        ({"command": [" "]}, "command[0]", "is empty"),
        ({"command": ["a\0b"]}, "command[0]", "NUL"),
        ({"command": ["frpc", "{config}"]}, "command", "no config_template"),
        ({"config_template": "x"}, "config_template", "is not used"),
        ({"command": ["x", "{config}"], "config_template": "{config}"}, "config_template", "unknown placeholder"),
        ({"command": ["x", "{"]}, "command[1]", "lone '{'"),
        ({"command": ["x", "}"]}, "command[1]", "lone '}'"),
        ({"command": ["x", "{relay.host}"]}, "command[1]", "'{relay_host}'"),
        ({"connected_pattern": "["}, "connected_pattern", "regular expression"),
        ({"connected_pattern": "x*"}, "connected_pattern", "empty line"),
        ({"connected_pattern": 3}, "connected_pattern", "regular expression"),
        ({"settle_ms": 10, "startup_timeout_ms": 10}, "settle_ms", "startup_timeout_ms"),
        ({"key_variable": "A", "environment": {"A": "x"}}, "key_variable", "one value"),
        ({"environment": ["A=1"]}, "environment", "table"),
        ({"inherit": "HOME"}, "inherit", "array"),
        ({"inherit": ["A=1"]}, "inherit", "name of an environment variable"),
        ({"probe_url": "https://a/?token=abc"}, "probe_url", "not allowed"),
        ({"probe_url": "https://user:pw@a/"}, "probe_url", "user information"),
        ({"probe_statuses": [99]}, "probe_statuses", "599"),
        ({"key_on_stdin": 1}, "key_on_stdin", "true and false"),
        ({"public_url": "x"}, "public_url", "URL"),
    ],
)
def test_what_is_refused(given: dict[str, Any], key: str, says: str) -> None:
    told = problem(**given)
    assert told.key == key
    assert says in told.message


def test_a_secret_in_a_wrong_place_is_not_quoted() -> None:
    secret = "ptk1_" + "Ab3" * 14
    for table in (
        {"command": ["frpc", "{" + secret + "}"]},
        {"probe_url": f"https://x:{secret}@host/?{secret}"},
        {"key_variable": secret + "="},
        {"environment": {secret + "=": "x"}},
        {"connected_pattern": "(" + secret},
    ):
        with pytest.raises(InvalidSettingsError) as error:
            ProcessConfig(**({"command": ["frpc"]} | table))
        assert secret not in str(error.value)


@pytest.mark.parametrize("value", [3, "frpc", ["frpc"], {}])
def test_a_table_that_is_none(value: object) -> None:
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.from_table({"process": value})
    assert error.value.problems[0].key.startswith("gateway.remote_access.process")


# Placeholders


def test_braces_and_placeholders() -> None:
    template = Template.parse("{{{a}}} {{a}} {b}{b}", known=("a", "b"))
    assert template.fill({"a": "{b}", "b": "2"}) == "{{b}} {a} 22"
    assert template.placeholders == {"a", "b"}


@given(st.text())
def test_any_text_can_be_written_with_doubled_braces(text: str) -> None:
    written = text.replace("{", "{{").replace("}", "}}")
    assert Template.parse(written, known=()).fill({}) == text


@given(st.text(alphabet="{}ab"))
def test_reading_raises_nothing_else(text: str) -> None:
    try:
        template = Template.parse(text, known=("a", "b"))
    except ValueError:
        return
    template.fill({"a": "1", "b": "2"})
