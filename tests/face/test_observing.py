"""What nodes take is timed beside the calls, kept as Parquet, and makes the next estimates better."""
from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import backend, observed, observing, sessions, worker_facts
from genie_dynamo.passes.costs import CostFit
from genie_dynamo.placed import PlacedGraph
from tests.passes.test_partition import Towers

WRONG = 6.0
"""How far the fit that a test begins with is off."""


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(observing, "WAITS_S", (0.02,) * 200)
    genie.init(workers=2, num_threads=1, strict=True, observe=True)
    yield
    genie.shutdown()
    sessions._config = None


def wrong_fit(_: str) -> CostFit:
    row = (WRONG, WRONG, WRONG)
    return CostFit(ops={}, families={}, kinds={"matrix": row, "dispatch": row, "other": row}, num_rows=0)


def compiled_graph(model: torch.nn.Module, *args: Any, dynamic: bool = False) -> tuple[Any, PlacedGraph]:
    seen: list[PlacedGraph] = []
    backend.observers.append(seen.append)
    try:
        compiled = torch.compile(model, backend="genie", dynamic=dynamic)
        compiled(*args)
    finally:
        backend.observers.remove(seen.append)
    return compiled, seen[0]


def run_until_timed(compiled: Any, *args: Any) -> None:
    deadline = time.monotonic() + 60
    while not genie.get_stats()["events"].get("nodes timed"):
        assert time.monotonic() < deadline, "the nodes were not timed"
        compiled(*args)


def test_estimates_from_a_wrong_fit_get_close_to_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_facts, "shipped_fit", wrong_fit)
    monkeypatch.setattr("genie_dynamo.passes.partition.shipped_fit", wrong_fit)
    session = genie.session()
    before = worker_facts.facts_of(session, wait=True)
    assert before is not None and all(w.fit is None for w in before.workers)
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)], torch.nn.GELU()).eval()
    x = torch.randn(128, 512)
    with torch.no_grad():
        compiled, graph = compiled_graph(model, x)
        run_until_timed(compiled, x)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
        times = []
        for _ in range(15):
            compiled(x)
            times.append(sum(graph.current.measured_s(session).values()))
    after = worker_facts.facts_of(session)
    assert after is not None and any(w.fit is not None for w in after.workers)
    measured_s = statistics.median(times)
    # Only the worker that ran the graph learnt something.
    ran = next(w.name for w in after.workers if w.fit is not None)
    old_s, new_s = (next(a.est_s or 0.0 for a in graph.price(facts).alternatives if a.name == ran)
                    for facts in (before, after))
    assert abs(new_s - measured_s) < 0.5 * abs(old_s - measured_s), (old_s, new_s, measured_s)

    # And the next session begins with it.
    hardware = after.workers[0].hardware
    rows = observed.kept(hardware)
    assert {"aten::addmm", "aten::gelu"} <= {row.op for row in rows}
    genie.shutdown()
    genie.init(workers=2, num_threads=1, strict=True, observe=True)
    again = worker_facts.facts_of(genie.session(), wait=True)
    assert again is not None and all(w.fit is not None for w in again.workers)


def test_inductors_code_is_timed_as_a_whole_and_corrects_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genie_dynamo.passes.partition.shipped_fit", wrong_fit)
    session = genie.session()
    facts = worker_facts.facts_of(session, wait=True)
    assert facts is not None
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)], torch.nn.GELU()).eval()
    x = torch.randn(128, 512)
    deadline = time.monotonic() + 100
    seen: list[PlacedGraph] = []
    monkeypatch.setattr(backend, "observers", [seen.append])
    compiled = torch.compile(model, backend="genie", options={"worker_compiler": "inductor"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        (graph,) = seen
        before = {a.name: a.est_s or 0.0 for a in graph.price(facts).alternatives}
        while not genie.get_stats()["events"].get("fragments timed"):
            assert time.monotonic() < deadline, "the fragments were not timed"
            compiled(x)
        times: dict[str, list[float]] = {}
        for _ in range(15):
            compiled(x)
            for name, seconds in graph.current.measured_s(session).items():
                times.setdefault(name, []).append(seconds)
        found = graph.found
    assert found is not None
    after = {a.name: a.est_s or 0.0 for a in found.alternatives}
    for name, seconds in times.items():
        measured_s = statistics.median(seconds)
        assert abs(after[name] - measured_s) < 0.5 * abs(before[name] - measured_s), (name, before, after, measured_s)
    assert max(after.values()) < 0.5 * max(before.values()), "a worker that has not run it learns from the other"
    assert not observed.kept(facts.workers[0].hardware), "no op was timed"


def test_one_worker_is_measured_and_its_ops_are_timed_too() -> None:
    genie.shutdown()
    genie.init(workers=1, num_threads=1, strict=True, observe=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).eval()
    x = torch.randn(16, 64)
    with torch.no_grad():
        compiled, _ = compiled_graph(model, x)
        assert worker_facts.known(genie.session()) is None, "the first call waits for no calibration"
        run_until_timed(compiled, x)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    facts = worker_facts.known(genie.session())
    assert facts is not None and facts.workers[0].fit is not None
    assert {"aten::addmm", "aten::gelu"} <= {row.op for row in observed.kept(facts.workers[0].hardware)}


def test_a_cut_graph_is_timed_on_each_of_its_workers() -> None:
    session = genie.session()
    assert worker_facts.facts_of(session, wait=True) is not None
    model, args = Towers().eval(), (torch.randn(256, 512), torch.randn(256, 512))
    deadline = time.monotonic() + 60
    with torch.no_grad():
        compiled, graph = compiled_graph(model, *args)
        while True:
            compiled(*args)
            facts = worker_facts.facts_of(session)
            assert facts is not None
            timed = {w.name for w in facts.workers if w.fit is not None}
            # Whether it is cut is for what was measured to say; whole, it runs on any worker, and one is timed.
            if len(timed) >= graph.current.plan.num_workers:
                break
            assert time.monotonic() < deadline, timed
    assert timed <= set(graph.current.measured_s(session))


def test_times_of_calls_of_different_sizes_are_not_mixed() -> None:
    session = genie.session()
    assert worker_facts.facts_of(session, wait=True) is not None
    with torch.no_grad():
        compiled, graph = compiled_graph(torch.nn.Linear(8, 8), torch.randn(3, 8), dynamic=True)
        assert graph.sizes() is None
        for rows in (3, 5):
            compiled(torch.randn(rows, 8))
        assert graph.sizes() is None
        compiled(torch.randn(7, 8))
        compiled(torch.randn(7, 8))
        sizes = graph.sizes()
    assert sizes is not None and list(sizes.values()) == [7]


def test_observe_off_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    genie.shutdown()
    genie.init(workers=2, num_threads=1, strict=True, observe=False)
    session = genie.session()
    assert worker_facts.facts_of(session, wait=True) is not None
    asked: list[Any] = []
    monkeypatch.setattr(type(session), "profile", lambda *a: asked.append(a))
    with torch.no_grad():
        compiled, _ = compiled_graph(torch.nn.Linear(8, 8), torch.randn(3, 8))
        for _ in range(20):
            compiled(torch.randn(3, 8))
            time.sleep(0.005)
    assert not asked and not list(Path(observed.user_cache.cache_dir()).glob("observed-*"))


def test_what_is_kept_is_bounded_and_a_damaged_file_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.core.test_hardware import FACTS as hardware
    from tests.core.test_observations import row

    monkeypatch.setattr(observed, "MAX_ROWS", 10)
    for start in (0, 8):
        observed.keep(hardware, [row(flops=float(start + i)) for i in range(8)])
    assert [r.flops for r in observed.kept(hardware)] == [float(i) for i in range(6, 16)]
    (path,) = Path(observed.user_cache.cache_dir()).glob("observed-*")
    path.write_bytes(b"PAR1 and then something else")
    assert observed.kept(hardware) == ()
    observed.keep(hardware, [row()])
    assert observed.kept(hardware) == (row(),)
