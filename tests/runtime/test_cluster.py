"""cluster.yaml: what it may say, and what is said about one that is wrong."""
from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.config import ENV_TABLE, Config
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.runtime.cluster import (
    ClusterSpec,
    WorkerAddress,
    build_config,
    connect_spec,
    load_cluster,
    parse_workers,
)
from genie_dynamo.runtime.security import Security, generate_keys, load_public_key


@pytest.fixture(autouse=True)
def no_genie_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV_TABLE:
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_full_file(tmp_path: Path) -> None:
    generate_keys(tmp_path / "keys")
    key = load_public_key(tmp_path / "keys/server.key")
    spec = load_cluster(write(tmp_path, f"""
        workers:
          - address: tcp://10.0.0.1:5555
            server_key: keys/server.key
            name: left
          - {{address: "tcp://[fe80::1]:5555", server_key: "{key.decode()}"}}
          - {{address: "ipc:///run/worker", price_per_hour: 2}}
        client_key: keys/client.key_secret
        options:
          timeout_s: 60
          strict: true
    """))
    assert spec.workers == (
        WorkerAddress(address="tcp://10.0.0.1:5555", name="left", server_key=key),
        WorkerAddress(address="tcp://[fe80::1]:5555", name="w1", server_key=key),
        WorkerAddress(address="ipc:///run/worker", name="w2", price_per_hour=2.0),
    )
    assert spec.security == Security.for_client(tmp_path / "keys")
    assert spec.options == {"timeout_s": 60, "strict": True}


def test_a_list_of_addresses_goes_through_the_same_parser() -> None:
    spec = parse_workers(["tcp://a:1", "tcp://b:2"])
    assert [(w.address, w.name, w.server_key) for w in spec.workers] == [
        ("tcp://a:1", "w0", None), ("tcp://b:2", "w1", None)]
    assert spec.security == Security()
    with pytest.raises(ConfigError, match=r"workers=\[\.\.\.\], field workers\[1\]\.address: 'b' is neither"):
        parse_workers(["tcp://a:1", "b"])


@pytest.mark.parametrize(("text", "says"), [
    ("", "cluster.yaml: must be a mapping with workers, client_key, options, not None"),
    ("- tcp://a:1", "must be a mapping"),
    ("workers: []", "line 1, field workers: must be a list of at least one worker"),
    ("workers: tcp://a:1", "must be a list"),
    ("client_key: x", "field workers: must be a list"),
    ("workers:\n  - tcp://a:1\nworker: 3", "line 3, field worker: unknown field 'worker'; did you mean 'workers'?"),
    ("workers:\n  - adress: tcp://a:1",
     "line 2, field workers[0].adress: unknown field 'adress'; did you mean 'address'?"),
    ("workers:\n  - {address: tcp://a:1, price_per_hour: -1}",
     "line 2, field workers[0].price_per_hour: must be a number of at least 0, not -1"),
    ("workers:\n  - name: w", "line 2, field workers[0]: a worker without an address"),
    ("workers:\n  - address: 5555", "line 2, field workers[0].address: must be text, not 5555"),
    ("workers:\n  - tcp://a:1\n  - a:1", "line 3, field workers[1].address: 'a:1' is neither tcp://HOST:PORT"),
    ("workers:\n  - tcp://a:1\n  - tcp://a:1",
     "line 3, field workers[1]: the address 'tcp://a:1' is that of workers[0]"),
    ("workers:\n  - {address: tcp://a:1, name: x}\n  - {address: tcp://a:2, name: x}",
     "the name 'x' is that of workers[0]"),
    ("workers:\n  - {address: tcp://a:1, name: w1}\n  - tcp://a:2", "the name 'w1' is that of workers[0]"),
    ("workers:\n  - address: tcp://a:1\n    server_key: nowhere.key", "line 3, field workers[0].server_key"),
    ("workers: [tcp://a:1]\nclient_key: nowhere", "line 2, field client_key"),
    ("workers: [tcp://a:1]\noptions: 3", "line 2, field options: must be a mapping"),
    ("workers: [tcp://a:1]\noptions:\n  polcy: x",
     "line 3, field options.polcy: unknown field 'polcy'; did you mean 'policy'?"),
    ("workers: [tcp://a:1]\noptions:\n  policy: fast", "line 3, field options.policy: policy='fast': must be one of"),
    ("workers: [tcp://a:1]\noptions:\n  workers: 3", "unknown field 'workers'"),
    ("workers: [", "not YAML"),
    ("workers: !!python/object/apply:os.system ['true']", "not YAML"),
    ("? [1, 2]\n: 3", "cluster.yaml"),
])
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the cluster file .*missing\.yaml"):
        load_cluster(tmp_path / "missing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the cluster file"):
        load_cluster(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="at most 1048576"):
        load_cluster(tmp_path / "huge")


def test_aliases_that_multiply_are_not_expanded_in_the_message(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, "\n".join([*lines, "workers: *a11"])))
    assert len(str(caught.value)) < 2000


def test_a_worker_with_a_key_needs_ours(tmp_path: Path) -> None:
    generate_keys(tmp_path)
    text = "workers:\n  - {address: tcp://a:1, server_key: server.key}\n"
    with pytest.raises(ConfigError, match=r"worker w0 \(tcp://a:1\) has a server_key.*name client_key"):
        load_cluster(write(tmp_path, text))
    assert load_cluster(write(tmp_path, text + "client_key: .\n")).workers[0].server_key is not None


def test_a_key_is_forty_characters_or_a_file(tmp_path: Path) -> None:
    text = "workers:\n  - address: tcp://a:1\n    server_key: '" + "é" * 40 + "'\n"
    with pytest.raises(ConfigError, match="neither a CURVE key"):
        load_cluster(write(tmp_path, text))


def test_what_a_configuration_names(tmp_path: Path) -> None:
    assert connect_spec(Config.build()) == ((), Security())
    assert connect_spec(Config.build(workers=4)) == ((), Security())
    workers, _ = connect_spec(Config.build(workers=["tcp://a:1"]))
    assert workers == (WorkerAddress(address="tcp://a:1", name="w0"),)
    path = write(tmp_path, "workers: [tcp://b:1]")
    assert connect_spec(Config.build(cluster=str(path)))[0][0].address == "tcp://b:1"


def test_options_of_the_file_come_below_arguments_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(write(tmp_path, "workers: [tcp://a:1]\noptions: {timeout_s: 60, verify: 0.5, strict: true}"))
    monkeypatch.setenv("GENIE_VERIFY", "0.25")
    config = build_config(cluster=path, timeout_s=300)
    assert (config.timeout_s, config.verify, config.strict) == (300.0, 0.25, True)
    monkeypatch.setenv("GENIE_CLUSTER", path)
    assert build_config().timeout_s == 60.0
    assert build_config(workers=2).timeout_s == 300.0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
    | st.sampled_from(["tcp://a:1", "ipc:///x", "keys"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["workers", "address", "name", "server_key", "client_key", "options", "x"]), inner, max_size=4),
    max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(data=values)
def test_any_yaml_is_a_cluster_or_a_config_error(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "any_cluster.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    try:
        assert isinstance(load_cluster(path), ClusterSpec)
    except ConfigError as error:
        assert str(path) in str(error)
