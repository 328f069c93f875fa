"""`genie demo`: the main job on real input, twice, and whether both agree.

Local eager gets what the workers get: as many client threads, and as many compute threads for each.
"""
from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from genie_dynamo.demo.corpus import Docstring, collect_docstrings
from genie_dynamo.demo.report import EMBEDDING_TOLERANCE, Answer, Moved, Part, summary

if TYPE_CHECKING:
    import torch

    from genie_dynamo.demo.encoder import Batch, Encode, SentenceEncoder

Result = TypeVar("Result")
NUM_WORKERS = 2
QUERIES = (
    "copy a whole directory with everything in it",
    "the middle value of a list of numbers",
    "make a temporary folder that is deleted afterwards",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """How much the demo does, and how it says so."""

    num_docstrings: int = 3000
    num_new_tokens: int = 64
    num_workers: int = NUM_WORKERS
    json: bool = False          # facts on stdout, nothing else there
    progress: bool = True
    backend: str = "genie"      # tests of the demo itself run it with a local backend

    def quick(self) -> DemoOptions:
        """The same in seconds instead of a minute: fewer docstrings and tokens."""
        return dataclasses.replace(self, num_docstrings=200, num_new_tokens=12)


@dataclass(frozen=True, slots=True)
class EmbeddingRun:
    """What the first half found; the notebook shows it too."""

    part: Part
    docstrings: tuple[Docstring, ...]
    embeddings_ND: torch.Tensor    # the remote ones
    encode: Encode                 # the compiled encoder
    tokenizer: Any


def run_demo(options: DemoOptions) -> int:
    """Both halves, the answers and the table. Returns the exit status: 0 when everything is equal.

    Raises: DemoError, GenieError.
    """
    started_s = time.perf_counter()

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    try:
        say("[1/2] Sentence embeddings: MiniLM (real weights) over docstrings of the standard library")
        embedding = run_embeddings(options)
        answers = answer(embedding, QUERIES)
        say("\nQuestions in plain English, answered with the remote embeddings:")
        for one in answers:
            say(str(one))
        say("\n[2/2] Generation with a cache: a small Llama architecture with RANDOM weights")
        parts = [embedding.part, run_generation(options)]
    finally:
        close_session(options)
    equal = all(part.equal for part in parts)
    say(f"\n{summary(parts)}\n")
    say(f"{'Equal to local eager.' if equal else 'NOT equal to local eager: this is a defect.'} "
        f"{time.perf_counter() - started_s:.0f} s in all.")
    if options.json:
        print(json.dumps({
            "equal": equal,
            "parts": [part.to_json() for part in parts],
            "answers": [dataclasses.asdict(one) for one in answers],
        }, indent=2))
    return 0 if equal else 1


def run_embeddings(options: DemoOptions) -> EmbeddingRun:
    """Encode the docstrings locally, then on the workers, and compare. Leaves the session open."""
    from genie_dynamo.demo.encoder import embed, load_encoder, make_batches

    encoder, tokenizer = load_encoder()
    docstrings = collect_docstrings(options.num_docstrings)
    batches = make_batches(tokenizer, [docstring.text for docstring in docstrings])
    with torch_threads(threads_per_worker(options.num_workers)):
        embed(encoder, batches[:1], progress=False)   # warm, as the workers will be
        local_ND, local_s = _timed(lambda: embed(
            encoder, batches, num_client_threads=options.num_workers, title="local eager", progress=options.progress))

    open_session(options)
    encode = compile_encoder(encoder, options.backend)
    _, first_call_s = _timed(lambda: _warm_up(encode, batches, options))
    remote_ND, remote_s = _timed(lambda: embed(
        encode, batches, num_client_threads=options.num_workers, title=f"{options.num_workers} workers",
        progress=options.progress))

    largest = float((remote_ND - local_ND).abs().max())
    part = Part(
        name="embeddings", what=f"{len(docstrings)} docstrings, {len(batches)} batches",
        equal=largest <= EMBEDDING_TOLERANCE,   # nan is not equal
        difference=f"largest {largest:.1e}", local_s=local_s, remote_s=remote_s, first_call_s=first_call_s,
        **session_facts(options))
    return EmbeddingRun(part, docstrings, remote_ND, encode, tokenizer)


def compile_encoder(encoder: SentenceEncoder, backend: str = "genie") -> Encode:
    """The one line that a user writes."""
    import torch

    compiled: Encode = torch.compile(encoder, backend=backend, dynamic=True)
    return compiled


def answer(run: EmbeddingRun, queries: Sequence[str], num_hits: int = 3) -> list[Answer]:
    """The functions whose docstrings are nearest to each query, which the workers encode too."""
    from genie_dynamo.demo.encoder import embed, make_batches, nearest

    queries_QD = embed(run.encode, make_batches(run.tokenizer, queries), progress=False)
    answers = []
    for query, query_D in zip(queries, queries_QD, strict=True):
        hits = nearest(query_D, run.embeddings_ND, num_hits)
        answers.append(Answer(query, tuple(
            (run.docstrings[position].name, score, run.docstrings[position].text) for position, score in hits)))
    return answers


def run_generation(options: DemoOptions) -> Part:
    """The same tokens by local eager and through the backend, each step feeding its cache to the next.

    Uses the open session; where there is none, the backend opens one at its first call.
    """
    from genie_dynamo.demo.generation import build_llama, compiled_copy, generate

    model = build_llama()
    count, progress = options.num_new_tokens, options.progress
    with torch_threads(threads_per_worker(options.num_workers)):
        generate(model, 4, progress=False)   # warm, as the workers will be
        local, local_s = _timed(lambda: generate(model, count, title="local eager", progress=progress))
    reset_counters(options)
    compiled = compiled_copy(model, options.backend)
    _, first_call_s = _timed(lambda: generate(compiled, 4, title="first call", progress=progress))
    remote, remote_s = _timed(lambda: generate(compiled, count, title="remote", progress=progress))
    different = [n for n, (one, other) in enumerate(zip(local, remote, strict=True)) if one != other]
    return Part(
        name="generation", what=f"{count} tokens", equal=not different,
        difference="same tokens" if not different else f"token {different[0]} differs",
        local_s=local_s, remote_s=remote_s, first_call_s=first_call_s, **session_facts(options))


def open_session(options: DemoOptions) -> None:
    """A new session with embedded workers; nothing when the backend is a local one."""
    if options.backend == "genie":
        import genie_dynamo as genie

        genie.init(workers=options.num_workers, strict=True)   # a demo that ran locally would show nothing


def reset_counters(options: DemoOptions) -> None:
    """Count from zero."""
    if options.backend == "genie":
        import genie_dynamo as genie

        genie.reset_stats()


def close_session(options: DemoOptions) -> None:
    """End the workers. Safe to call twice."""
    if options.backend == "genie":
        import genie_dynamo as genie

        genie.shutdown()


def session_facts(options: DemoOptions) -> dict[str, Any]:
    """What the session counted since it was opened or its counters were reset: the last fields of a Part."""
    if options.backend != "genie":
        return {}
    import genie_dynamo as genie

    stats = genie.get_stats()
    return {
        "moved": {reason: Moved(size["sent"], size["received"]) for reason, size in stats["by_reason"].items()},
        "runs_by_worker": {name: facts["fragment_runs"] for name, facts in stats["workers"].items()},
        "fallbacks": dict(stats["fallbacks"]),
    }


def threads_per_worker(num_workers: int) -> int:
    """The compute threads of each embedded worker when they share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with as many threads as a worker has, so that local and remote times can be compared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(encode: Encode, batches: Sequence[Batch], options: DemoOptions) -> None:
    """One call compiles; then one from each thread, so that every worker has the graph and the weights."""
    from genie_dynamo.demo.encoder import embed

    embed(encode, batches[:1], title="first call", progress=options.progress)
    embed(encode, batches[:options.num_workers], num_client_threads=options.num_workers, progress=False)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result and the seconds it took."""
    started_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started_s
