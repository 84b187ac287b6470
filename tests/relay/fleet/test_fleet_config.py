"""`[relay.fleet]`: what it may hold, what `relay check` says of it, and the files of keys."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any, Final

import pytest
from rig import free_port, free_ports

from pioneer_tunnel import InvalidSettingsError, StorageError
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel.relay import FleetConfig, RelayConfig
from pioneer_tunnel.relay.administration.check import check, check_file
from pioneer_tunnel.relay.administration.fleet_file import FleetFile, tables_in, write_node_key, write_operator_key
from pioneer_tunnel.relay.fleet.keys import node_identity, node_public_key, operator_identity
from pioneer_tunnel.relay.fleet.node_tls import NodeTls
from pioneer_tunnel.relay.fleet.redis_address import RedisAccess, RedisAddress, a_redis_address

OPERATOR: Final = str(SigningIdentity.from_seed(b"o" * 32).public_key)
FLEET: Final[dict[str, Any]] = {
    "node": "fra1",
    "redis": "rediss://fleet@redis.example.com:6380/3",
    "redis_password_file": "redis.password",
    "listen": "10.0.0.1:7300",
    "key_file": "fra1.key",
}
RELAY: Final[dict[str, Any]] = {
    "control_addr": "127.0.0.1:7001",
    "ingress_addr": "127.0.0.1:7002",
    "id": "fleet",
    "public_names": ["relay.example.com"],
}


def refused(**changes: object) -> str:
    """What is wrong with the table, with these changes."""
    with pytest.raises(InvalidSettingsError) as error:
        RelayConfig.from_table(RELAY | {"fleet": FLEET | changes}, source="relay.toml")
    return str(error.value)


def test_the_whole_table(tmp_path: Path) -> None:
    nodes = [{"name": "fra2", "address": "10.0.0.2:7300", "certificate": "fra2.pem"}]
    table = FLEET | {"redis_ca_file": "ca.pem", "operator_key": OPERATOR, "nodes": nodes}
    config = RelayConfig.from_table(RELAY | {"fleet": table}, base_dir=tmp_path).fleet_config
    assert config is not None
    assert config.redis == RedisAddress(place=Address("redis.example.com", 6380), tls=True, user="fleet", database=3)
    assert config.key_file == tmp_path / "fra1.key"
    assert config.state_file == tmp_path / "fleet-state.db"
    assert config.nodes[0].certificate == tmp_path / "fra2.pem"
    assert config.redis_access.redis_ca_file == tmp_path / "ca.pem"
    assert str(config.operator_key) == OPERATOR


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://redis.example.com", "rediss://redis.example.com:6379/0"),
        ("redis://[::1]:7000/2", "redis://[::1]:7000/2"),
        ("redis://user%40home@127.0.0.1", "redis://user@home@127.0.0.1:6379/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://user@/run/redis.sock", "unix://user@/run/redis.sock"),
    ],
)
def test_addresses_of_redis(url: str, shown: str) -> None:
    assert str(a_redis_address(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis.example.com",
        "http://redis.example.com",
        "redis://",
        "redis://host/zero",
        "redis://host?db=1",
        "redis://h:0",
    ],
)
def test_what_is_no_address_of_redis_is_refused(url: str) -> None:
    assert "relay.fleet.redis" in refused(redis=url, redis_password_file=None)


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    message = refused(redis="rediss://fleet:swordfish@redis.example.com")
    assert "relay.fleet.redis" in message
    assert "redis_password_file" in message
    assert "swordfish" not in message
    assert "swordfish" not in refused(redis="rediss://swordfish:x:y@redis.example.com/zero")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node": "Fra 1"}, "relay.fleet.node = 'Fra 1'"),
        ({"node": "fra1/0"}, "relay.fleet.node"),
        ({"redis_password_file": None}, "relay.fleet.redis_password_file: is missing; redis names a user"),
        ({"redis": "redis://localhost", "redis_ca_file": "ca.pem"}, "relay.fleet.redis_ca_file"),
        ({"listen": "10.0.0.1"}, "relay.fleet.listen"),
        ({"listen": "10.0.0.1:0"}, "relay.fleet.listen"),
        ({"operator_key": "ed25519:00"}, "relay.fleet.operator_key"),
        ({"unconfirmed_ms": 5}, "relay.fleet.unconfirmed_ms"),
        ({"redis_pasword_file": "x"}, "relay.fleet.redis_pasword_file: unknown key; the nearest known one is"),
        ({"nodes": [{"name": "fra2"}]}, "relay.fleet.nodes[0].address: is missing"),
        ({"listen": "127.0.0.1:7001"}, "listen is control_addr too"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], words: str) -> None:
    assert words in refused(
        **{name: value for name, value in changes.items() if value is not None}
        | {name: value for name, value in changes.items() if value is None}
    )


def test_two_nodes_with_one_name_or_address_are_refused() -> None:
    one = {"name": "fra2", "address": "10.0.0.2:7300", "certificate": "fra2.pem"}
    message = refused(nodes=[one, one])
    assert "relay.fleet.nodes[1].name = 'fra2': stands in nodes[0] too" in message
    assert "relay.fleet.nodes[1].address = '10.0.0.2:7300': stands in nodes[0] too" in message
    assert "is the address at which this node listens" in refused(nodes=[one | {"address": "10.0.0.1:7300"}])


def test_each_worker_of_a_node_has_a_port_of_its_own() -> None:
    def node(name: str, address: str, workers: int) -> dict[str, Any]:
        return {"name": name, "address": address, "certificate": f"{name}.pem", "workers": workers}

    nodes = [node("fra2", "10.0.0.2:7300", 3), node("ams1", "10.0.0.2:7303", 1)]
    config = RelayConfig.from_table(RELAY | {"fleet": FLEET | {"nodes": nodes}}).fleet
    assert config is not None
    assert {name: address.port for name, address in config.nodes[0].addresses.items()} == {
        "fra2": 7300, "fra2/0": 7300, "fra2/1": 7301, "fra2/2": 7302
    }  # fmt: skip
    assert config.of_worker(2).listen == Address("10.0.0.1", 7302)
    for wrong, words in [
        (
            [*nodes, node("ams2", "10.0.0.2:7298", 3)],
            "nodes[2].address = '10.0.0.2:7298': a worker of it would have an address of nodes[0]",
        ),
        ([node("fra2", "10.0.0.1:7299", 2)], "[0].address is the address at which this node listens"),
        ([node("fra2", "10.0.0.2:65534", 3)], "so many ports from 65534 on end above 65535"),
        ([node("fra2", "10.0.0.2:7300", 257)], "relay.fleet.nodes[0].workers"),
    ]:
        assert words in refused(nodes=wrong)


def test_what_does_not_go_with_a_fleet_is_refused() -> None:
    for more, words in (
        ({"names_file": "names.json"}, "relay.names_file"),
        ({"acme": True, "control_tls": True}, "relay.acme"),
    ):
        with pytest.raises(InvalidSettingsError, match=words):
            RelayConfig.from_table(RELAY | {"fleet": FLEET} | more)
    wildcard = {"id": "box", "url": "https://*.box.example.com", "key": OPERATOR}
    assert RelayConfig.from_table(RELAY | {"fleet": FLEET, "tunnels": [wildcard]}).tunnels[0].wildcard is not None


# Files


def test_the_key_of_a_node_is_for_it_alone(tmp_path: Path) -> None:
    key_file, certificate = write_node_key("fra1", tmp_path)
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert node_identity(key_file).public_key == node_public_key(certificate)
    NodeTls(key_file, key_file, {"fra2": write_node_key("fra2", tmp_path)[1]})
    with pytest.raises(StorageError, match=r"fra1\.pem exists already"):
        write_node_key("fra1", tmp_path)
    key_file.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        node_identity(key_file)


def test_the_key_of_the_operator_is_for_him_alone(tmp_path: Path) -> None:
    path, public = write_operator_key(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert operator_identity(path).public_key == public
    path.chmod(0o604)
    with pytest.raises(StorageError, match="chmod 600"):
        operator_identity(path)
    with pytest.raises(StorageError, match="exists already"):
        write_operator_key(tmp_path)


def test_files_that_hold_something_else_are_named_and_not_quoted(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("swordfish\n")
    wrong.chmod(0o600)
    for read in (node_identity, node_public_key, operator_identity):
        with pytest.raises(InvalidSettingsError, match="wrong") as error:
            read(wrong)
        assert "swordfish" not in str(error.value)
        with pytest.raises(StorageError, match="there is none"):
            read(tmp_path / "missing")
    two = tmp_path / "two"
    two.write_bytes(write_node_key("a", tmp_path)[0].read_bytes().split(b"-----BEGIN CERT")[0])
    with two.open("ab") as file:
        file.write(write_node_key("b", tmp_path)[1].read_bytes())
    two.chmod(0o600)
    with pytest.raises(InvalidSettingsError, match="the certificate of another key"):
        node_identity(two)


def test_the_password_of_redis_is_read_from_a_private_file(tmp_path: Path) -> None:
    access = RedisAccess(redis="redis://localhost", redis_password_file=tmp_path / "password")
    with pytest.raises(StorageError, match="there is none"):
        access.server()
    (tmp_path / "password").write_text("swordfish\n")
    (tmp_path / "password").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        access.server()
    (tmp_path / "password").chmod(0o600)
    server = access.server()
    assert server.password is not None
    assert server.password() == "swordfish"
    assert "swordfish" not in repr(server)
    (tmp_path / "password").write_text("\n")
    with pytest.raises(InvalidSettingsError, match="no text on its first line"):
        server.password()


def test_an_operator_needs_the_redis_alone(tmp_path: Path) -> None:
    path = tmp_path / "operator.toml"
    path.write_text(f'[relay.fleet]\nredis = "redis://localhost"\noperator_key = "{OPERATOR}"\n')
    assert str(FleetFile.load(path).operator_key) == OPERATOR
    path.write_text(f'[relay.fleet]\nredis = "redis://localhost"\nnode = "fra1"\noperator_kay = "{OPERATOR}"\n')
    with pytest.raises(InvalidSettingsError, match=r"relay\.fleet\.operator_kay: unknown key"):
        FleetFile.load(path)
    path.write_text("[relay]\n")
    with pytest.raises(InvalidSettingsError, match=r"relay\.fleet: the table is missing"):
        FleetFile.load(path)
    with pytest.raises(InvalidSettingsError, match=r"relay\.tunnels"):
        tables_in(path)


# relay check


def write_relay(folder: Path, *, workers: int = 1, **fleet: object) -> Path:
    values = {
        "node": "fra1",
        "redis": f"unix://{folder}/redis",
        "listen": f"127.0.0.1:{free_port()}",
        "key_file": "fra1.key",
    } | fleet
    lines = "\n".join(f'{name} = "{value}"' for name, value in values.items())
    path = folder / "relay.toml"
    path.write_text(
        f"""
        [relay]
        control_addr = "127.0.0.1:{free_port()}"
        ingress_addr = "127.0.0.1:{free_port()}"
        id = "fleet"
        public_names = ["relay.example.com"]
        [relay.fleet]
        {lines}
        [[relay.fleet.nodes]]
        name = "fra1"
        address = "127.0.0.1:7300"
        certificate = "fra1.pem"
        workers = {workers}
        [[relay.fleet.nodes]]
        name = "fra2"
        address = "127.0.0.2:7300"
        certificate = "fra2.pem"
        """
    )
    path.chmod(0o600)
    return path


async def test_check_reads_what_the_table_names(tmp_path: Path) -> None:
    path = write_relay(tmp_path)
    assert {finding.key for finding in check_file(path)} == {
        "relay.fleet.key_file",
        "relay.fleet.nodes[0].certificate",
        "relay.fleet.nodes[1].certificate",
    }
    for name in ("fra1", "fra2"):
        write_node_key(name, tmp_path)
    assert check_file(path) == []
    (finding,) = await check(path, running=False)
    assert (finding.severity, finding.key) == ("warning", "relay.fleet.redis")
    assert "it cannot be used" in finding.message
    (tmp_path / "fra2.pem").write_bytes((tmp_path / "fra1.pem").read_bytes())
    assert [(finding.key, finding.line) for finding in check_file(path)] == [("relay.fleet.nodes[1].certificate", 20)]
    assert {finding.key for finding in check_file(write_relay(tmp_path, state_file="no/where.db"))} == {
        "relay.fleet.state_file",
        "relay.fleet.nodes[1].certificate",
    }
    clear = check_file(write_relay(tmp_path, redis="redis://redis.example.com"))
    assert ("warning", "relay.fleet.redis") in [(finding.severity, finding.key) for finding in clear]


async def test_check_tries_the_ports_of_all_workers(tmp_path: Path) -> None:
    for name in ("fra1", "fra2"):
        write_node_key(name, tmp_path)
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + 2)):
        found = await check(write_relay(tmp_path, listen=f"127.0.0.1:{first}", workers=3), running=False)
    assert [(one.severity, one.key) for one in found if one.severity == "error"] == [("error", "relay.fleet.listen")]
    with pytest.raises(InvalidSettingsError, match=r"relay\.fleet\.listen = .*: so many ports from 65535 on"):
        RelayConfig.load(write_relay(tmp_path, listen="127.0.0.1:65535", workers=2))


def test_an_own_certificate_that_is_not_that_of_the_key_is_an_error(tmp_path: Path) -> None:
    for name in ("fra1", "fra2", "old"):
        write_node_key(name, tmp_path)
    (tmp_path / "fra1.pem").write_bytes((tmp_path / "old.pem").read_bytes())
    (finding,) = check_file(write_relay(tmp_path))
    assert finding.key == "relay.fleet.nodes[0].certificate"
    assert "not the certificate in key_file" in finding.message


def test_a_fleet_is_made_with_keywords_too() -> None:
    config = FleetConfig(**FLEET | {"nodes": [{"name": "fra1", "address": "10.0.0.1:7300", "certificate": "x"}]})
    assert config.others == ()
