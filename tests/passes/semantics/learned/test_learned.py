"""The classifier: what it sees, that it learns, its file, its hints, and labels that a user confirms."""
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.semantics_time import synthetic
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.learned import opinion
from genie_dynamo.passes.semantics.learned.features import NUM_FEATURES, describe
from genie_dynamo.passes.semantics.learned.network import MAX_FILE_BYTES, Network, remember, train
from genie_dynamo.passes.semantics.reading import read_graph
from genie_dynamo.passes.semantics.view import GraphView
from tests.models.captures import compiled_captures
from tests.passes.semantics import blocks as b


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "genie-dynamo"


def small_network(seed: int = 0) -> Network:
    features = points(seed, 2000)
    return train(features, (features[:, 0] > 0).astype(np.int64), ("", "mlp"), hidden=8, epochs=20)


def points(seed: int, count: int) -> NDArray[np.float32]:
    """Noise, and one feature that matters."""
    found = np.random.default_rng(seed).normal(scale=0.02, size=(count, NUM_FEATURES)).astype(np.float32)
    found[:, 0] *= 50
    return found


def view_of(model: torch.nn.Module) -> GraphView:
    (capture, _) = compiled_captures(model.eval(), b.hidden())
    return read_graph(capture.gm, roles=capture.roles, names=False)


def test_training_separates_what_can_be_separated() -> None:
    network = small_network()
    fresh = points(0, 2400)[2000:]
    right = network.probabilities(fresh).argmax(axis=1) == (fresh[:, 0] > 0)
    assert right.mean() > 0.9
    assert np.allclose(network.probabilities(fresh).sum(axis=1), 1.0, atol=1e-5)


def test_it_remembers_what_was_confirmed_and_keeps_the_rest() -> None:
    network = opinion.shipped()
    other = synthetic(500)
    features = describe(other, [n for n in other.nodes if n.kind == "call"])
    before = network.probabilities(features).argmax(axis=1)
    view = view_of(Mixed())
    example = describe(view, view.by_op["matmul"][:1])
    wanted = network.kinds.index("recurrent")
    assert network.probabilities(example).argmax() != wanted
    after = Network.from_bytes(remember(network, example, np.array([wanted], dtype=np.int64)).to_bytes())
    assert after.probabilities(example).argmax() == wanted
    assert (after.probabilities(features).argmax(axis=1) == before).mean() > 0.99
    otherwise = remember(after, example, np.array([0], dtype=np.int64))
    assert len(otherwise.confirmed) == 1 and otherwise.probabilities(example).argmax() == 0


def test_the_file_is_data_of_the_right_shape_and_small() -> None:
    network = small_network()
    again = Network.from_bytes(network.to_bytes())
    assert again.kinds == network.kinds
    assert np.allclose(again.w1, network.w1, atol=1e-2)
    narrow = Network(kinds=network.kinds, w1=network.w1[:-1], b1=network.b1, w2=network.w2, b2=network.b2)
    for content, words in ((b"", "no classifier"), (b"PK\x03\x04 broken", "no classifier"),
                           (narrow.to_bytes(), "w1 has shape"), (bytes(MAX_FILE_BYTES + 1), "at most")):
        with pytest.raises(ConfigError, match=words):
            Network.from_bytes(content)


def test_the_shipped_one_is_under_a_megabyte_and_knows_the_kinds() -> None:
    assert (Path(opinion.__file__).with_name("weights.npz")).stat().st_size < MAX_FILE_BYTES
    network = opinion.shipped()
    view = view_of(b.Attention())
    nodes = [n for n in view.nodes if n.op in ("attention", "matmul")]
    kinds = [network.kinds[k] for k in network.probabilities(describe(view, nodes)).argmax(axis=1)]
    assert kinds.count("attention") >= len(nodes) - 1


def test_names_are_not_seen() -> None:
    (capture, _) = compiled_captures(b.Attention().eval(), b.hidden())
    named, bare = (read_graph(capture.gm, roles=capture.roles, names=names) for names in (True, False))
    assert np.array_equal(describe(named, named.nodes), describe(bare, bare.nodes))


class Mixed(torch.nn.Module):
    """Positions mixed by a Fourier transform between layers: no rule knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = (torch.nn.Linear(b.D, b.D) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(torch.fft.fft(self.v(x), dim=1).real)  # type: ignore[no-any-return]


def test_hints_are_never_trusted_and_always_said() -> None:
    """A network that takes everything for attention: what no rule claims becomes regions below the bar."""
    shipped = opinion.shipped()
    sure = Network(kinds=shipped.kinds, w1=shipped.w1 * 0, b1=shipped.b1, w2=shipped.w2,
                   b2=np.where(np.array(shipped.kinds) == "attention", 50.0, 0.0).astype(np.float32))
    view = view_of(Mixed())
    graph, _ = Annotator(names=False, classifier=lambda v, claimed: opinion.hints(v, claimed, sure)).annotate_view(view)
    hinted = [r for r in graph.regions if r.pattern == "classifier"]
    assert hinted
    assert all(r.kind == "attention" and not r.trusted for r in hinted)
    assert all(any(r.region_id in warning for warning in graph.warnings) for r in hinted)
    without, _ = Annotator(names=False, classifier=None).annotate_view(view_of(Mixed()))
    assert not [r for r in without.regions if r.pattern == "classifier"]


def test_it_is_asked_about_nothing_that_a_rule_claims() -> None:
    view = view_of(b.Attention())
    asked: list[set[str]] = []

    def classifier(view: GraphView, claimed: set[object]) -> tuple[()]:
        asked.append({n.name for n in view.nodes if n.op in opinion.ASKED and n not in claimed and not n.static})
        return ()

    Annotator(names=False, classifier=classifier).annotate_view(view)  # type: ignore[arg-type]
    assert asked == [set()]


def test_confirmed_labels_change_the_next_answer(own_cache: Path) -> None:
    view = view_of(Mixed())
    node = view.by_op["matmul"][0]
    wanted = "moe_router"
    written = opinion.confirm(view, {node.name: wanted})
    assert (own_cache / opinion.USER_FILE).exists()
    answer = opinion.current().probabilities(describe(view, [node])).argmax()
    assert written.kinds[answer] == wanted
    for labels, words in (({"nothing": "mlp"}, "no node 'nothing'"), ({node.name: "pudding"}, "knows no 'pudding'")):
        with pytest.raises(ConfigError, match=words):
            opinion.confirm(view, labels)


def test_a_broken_user_file_is_said_and_not_used(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    from genie_dynamo.core import user_cache

    assert user_cache.write(opinion.USER_FILE, b"nonsense")
    assert opinion.current() is opinion.shipped()
    assert "is not used" in caplog.text


def test_it_answers_within_fifty_milliseconds() -> None:
    """Of CPU time, for a graph in which it is asked about as many nodes as it ever is."""
    view = synthetic(20_000)
    opinion.hints(view, set())
    started = time.thread_time()
    opinion.hints(view, set())
    assert time.thread_time() - started < 0.05 * 3       # 30 ms measured; what the machine adds on a bad day
