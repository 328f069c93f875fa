"""The configuration: where values come from, and what a wrong one says."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genie_dynamo.core.config import COMPILE_OPTIONS, ENV_TABLE, OPTIONS, Config, env_name, is_worker_address
from genie_dynamo.core.errors import ConfigError, GenieError


@pytest.fixture(autouse=True)
def no_genie_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV_TABLE:
        monkeypatch.delenv(name, raising=False)


def test_order_is_argument_environment_file_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.build().timeout_s == 300.0
    assert Config.build({"timeout_s": 5}).timeout_s == 5.0
    monkeypatch.setenv("GENIE_TIMEOUT_S", "7.5")
    assert Config.build({"timeout_s": 5}).timeout_s == 7.5
    assert Config.build({"timeout_s": 5}, timeout_s=9).timeout_s == 9.0


def test_every_option_has_an_environment_variable_and_a_doc() -> None:
    assert {row.field for row in ENV_TABLE.values()} == {f.name for f in dataclasses.fields(Config)}
    for name, row in ENV_TABLE.items():
        assert name == env_name(row.field)
        assert row.doc and "\n" not in row.doc
        assert row.default == getattr(Config(), row.field)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("GENIE_STRICT", "1", True),
    ("GENIE_STRICT", "off", False),
    ("GENIE_AWARENESS", "blind", "blind"),
    ("GENIE_NUM_THREADS", "3", 3),
    ("GENIE_NUM_THREADS", "none", None),
    ("GENIE_WORKERS", "2", 2),
    ("GENIE_WORKERS", "tcp://a:1, tcp://[::1]:2", ("tcp://a:1", "tcp://[::1]:2")),
    ("GENIE_OP_LIBRARIES", "my_ops,pkg.ops", ("my_ops", "pkg.ops")),
    ("GENIE_LOG_LEVEL", "debug", "DEBUG"),
    ("GENIE_LOG_LEVEL", "20", "INFO"),
    ("GENIE_VERIFY", "0.25", 0.25),
    ("GENIE_CLUSTER", "here.yaml", "here.yaml"),
    ("GENIE_TIMEOUT_S", "", 300.0),
])
def test_environment_is_parsed(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any) -> None:
    monkeypatch.setenv(name, text)
    assert getattr(Config.build(), ENV_TABLE[name].field) == value


@pytest.mark.parametrize(("option", "value", "says"), [
    ("policy", "min_latncy", "did you mean 'min_latency'?"),
    ("awareness", "none", "'full', 'weights', 'blind'"),
    ("worker_compiler", None, "'flat', 'inductor', 'auto'"),
    ("strict", "maybe", "True or False"),
    ("strict", 1, "True or False"),
    ("timeout_s", 0, "above 0"),
    ("timeout_s", math.nan, "above 0"),
    ("timeout_s", math.inf, "at most"),
    ("timeout_s", "soon", "a number"),
    ("timeout_s", True, "a number"),
    ("timeout_s", 10**400, "a number"),
    ("verify", 1.5, "from 0 to 1"),
    ("num_threads", 0, "None or a whole number from 1"),
    ("num_threads", 2.0, "a whole number"),
    ("workers", 0, "from 1 to 256"),
    ("workers", True, "embedded workers"),
    ("workers", [], "addresses such as"),
    ("workers", ["10.0.0.1:5555"], "'10.0.0.1:5555' is neither tcp://HOST:PORT nor ipc://PATH"),
    ("workers", ["tcp://a:1", "tcp://a:1"], "each of them once"),
    ("workers", ["tcp://a:1", 3], "addresses such as"),
    ("cluster", "ray", "'ray' is not available yet"),
    ("op_libraries", ["os; import sys"], "names of importable modules"),
    ("log_level", "LOUD", "DEBUG, INFO"),
    ("log_level", True, "DEBUG, INFO"),
    ("progress", "sometimes", "'auto', 'on', 'off'"),
    ("microbatches", 0, "from 1 to 4096"),
    ("require_lane", "smh", "shm"),
    ("qos", "batch", "not available yet"),
    ("deadline_s", 0.1, "not available yet"),
    ("qos", "urgent", "not available yet"),
])
def test_bad_values_say_what_is_right(option: str, value: Any, says: str) -> None:
    for make in (Config, Config.build, Config().override):
        with pytest.raises(ConfigError) as caught:
            make(**{option: value})
        assert option in str(caught.value) and says in str(caught.value)
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, GenieError)


def test_a_bad_environment_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_STRICT", "perhaps")
    with pytest.raises(ConfigError, match="environment variable GENIE_STRICT='perhaps'"):
        Config.build()


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'polcy'; did you mean 'policy'") as caught:
        Config.build(polcy="min_cost")
    assert caught.value.nearest == ("policy",)  # type: ignore[attr-defined]


def test_a_misspelt_variable_is_an_error_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_PROJECT_TOKEN", "of another program")
    monkeypatch.setenv("GENIE_SYSTEM", "0")
    Config.build()
    monkeypatch.setenv("GENIE_WORKER", "2")
    with pytest.raises(ConfigError, match="did you mean GENIE_WORKERS"):
        Config.build()


def test_workers_and_cluster_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="keep one of them"):
        Config.build(workers=2, cluster="c.yaml")
    monkeypatch.setenv("GENIE_CLUSTER", "c.yaml")
    assert Config.build(workers=2).cluster is None
    assert Config.build().cluster == "c.yaml"
    monkeypatch.setenv("GENIE_WORKERS", "2")
    with pytest.raises(ConfigError, match="keep one of them"):
        Config.build()


def test_heartbeats_leave_room_for_one_that_is_lost() -> None:
    with pytest.raises(ConfigError, match="at least twice the interval"):
        Config.build(heartbeat_interval_s=4, heartbeat_timeout_s=5)
    with pytest.raises(ConfigError, match=r"session_lease_s=0\.5 ends between two signs of life.*at least 3"):
        Config.build(session_lease_s=0.5)


def test_compile_options_are_a_subset() -> None:
    base = Config.build(workers=3)
    compiled = base.for_compile({"strict": True, "awareness": "blind"})
    assert (compiled.strict, compiled.awareness, compiled.workers) == (True, "blind", 3)
    assert base.for_compile(None) == base
    with pytest.raises(ConfigError, match=r"belongs to a session.*genie\.init\(workers=\.\.\.\).*GENIE_WORKERS"):
        base.for_compile({"workers": 2})
    with pytest.raises(ConfigError, match="did you mean 'awareness'"):
        base.for_compile({"awarness": "full"})
    assert set(OPTIONS) > COMPILE_OPTIONS >= {"policy", "awareness", "verify", "timeout_s", "on_worker_loss"}


def test_a_configuration_is_a_value() -> None:
    config = Config.build()
    assert config == Config.build() and hash(config) == hash(Config.build())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = True  # type: ignore[misc]
    assert config.override(log_level="info").log_level_number == 20


@pytest.mark.parametrize(("text", "good"), [
    ("tcp://localhost:5555", True), ("tcp://10.0.0.1:1", True), ("tcp://[fe80::1%eth0]:65535", True),
    ("ipc:///run/x", True), ("tcp://a:0", False), ("tcp://a:65536", False), ("tcp://a", False), ("tcp://:5", False),
    ("tcp://::1:5", False), ("ipc://", False), ("inproc://x", False), ("tcp://a:5/x", False), ("tcp://a b:5", False),
])
def test_addresses(text: str, good: bool) -> None:
    assert is_worker_address(text) is good


@given(option=st.sampled_from(sorted(OPTIONS)), value=st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.text(max_size=5)),
    st.dictionaries(st.text(max_size=3), st.integers()), st.binary(max_size=8)))
def test_anything_is_either_accepted_or_a_config_error(option: str, value: Any) -> None:
    try:
        config = Config(**{option: value})
    except ConfigError:
        return
    assert Config(**{option: getattr(config, option)}) == config      # what was accepted stays accepted


def test_parameters_cannot_stay_where_nothing_does() -> None:
    with pytest.raises(ConfigError, match=r"parameters=.remote. leaves .* awareness=.blind. keeps nothing"):
        Config.build(parameters="remote", awareness="blind")


def test_a_latency_bound_belongs_to_min_cost() -> None:
    assert Config.build(policy="min_cost", latency_bound_s=0.5).latency_bound_s == 0.5
    with pytest.raises(ConfigError, match="bounds min_cost"):
        Config.build(latency_bound_s=0.5)
