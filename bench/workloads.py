"""The models that benches share, and how a side compiles one: remotely, locally with an empty backend, not at all."""
from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GPT2_LAYERS, GPT2_WIDTH, GPT2_HEADS, GPT2_VOCAB = 12, 768, 12, 50257


# ---------------------------------------------------------------- models, the same weights in every process
def tiny_input() -> torch.Tensor:
    """1 KB: 256 float32."""
    return torch.arange(256, dtype=torch.float32)


def tiny(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def mlp() -> torch.nn.Module:
    """3 x (1024 -> 1024) with ReLU between; 12.6 MB of weights."""
    torch.manual_seed(0)
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        linear(1024, 1024), relu(), linear(1024, 1024), relu(), linear(1024, 1024)).eval().requires_grad_(False)


def mlp_input() -> torch.Tensor:
    """32 x 1024 float32, 128 KiB."""
    return torch.randn(32, 1024, generator=torch.Generator().manual_seed(1))


def gpt2_config() -> Any:
    """GPT-2 small. Without dropout, so that sides can be compared number by number."""
    from transformers import GPT2Config

    return GPT2Config(n_layer=GPT2_LAYERS, n_embd=GPT2_WIDTH, n_head=GPT2_HEADS, vocab_size=GPT2_VOCAB,
                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def gpt2() -> Any:
    """GPT2Model with random weights; 498 MB."""
    from transformers import GPT2Model

    torch.manual_seed(0)
    model: Any = GPT2Model(gpt2_config())
    return model.eval().requires_grad_(False)


def gpt2_forward(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """To the last hidden state, no cache."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    return forward


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(GPT2_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def fingerprint(tensor: torch.Tensor) -> list[float]:
    """A few numbers that change when the values or their order do."""
    flat = tensor.detach().double().flatten()
    weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)
    return [float(flat.abs().sum()), float((flat.abs() * weights).sum()), float(flat[0]), float(flat[-1])]


# ---------------------------------------------------------------- ways to run
def empty_backend(gm: Any, example_inputs: Any) -> Any:
    """Everything torch.compile does around a backend, and a backend that runs the graph as it is."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))(gm, example_inputs)


def local(target: Callable[..., Any], how: str) -> Callable[..., Any]:
    """`how`: "eager", "empty" or a backend's name."""
    if how == "eager":
        return target
    backend = empty_backend if how == "empty" else how
    compiled: Callable[..., Any] = torch.compile(target, backend=backend, fullgraph=True)
    return compiled


class Remote:
    """The backend under test, its worker and its counters.

    Another backend's name in its place (to try a bench without workers) makes this process the "worker".
    """

    def __init__(self, backend: str, threads: int, transport: str, busy_poll_s: float) -> None:
        self._backend = backend
        self._own_worker: subprocess.Popen[bytes] | None = None
        self.worker_pid = os.getpid()
        if backend != "genie":
            return
        import genie_dynamo as genie

        self._genie = genie
        if transport == "tcp":
            address = f"tcp://127.0.0.1:{_free_port()}"
            self._own_worker = subprocess.Popen(
                [str(Path(sys.executable).parent / "genie"), "worker", "--bind", address, "--threads", str(threads)])
            genie.init(workers=[address], busy_poll_s=busy_poll_s)
        else:
            genie.init(workers=1, num_threads=threads, busy_poll_s=busy_poll_s)
        (worker,) = genie.get_stats()["workers"].values()
        self.worker_pid = int(worker["pid"])

    def compile(self, target: Callable[..., Any], *, fullgraph: bool = True, **options: Any) -> Callable[..., Any]:
        """Strict: a graph that would run locally is an error here, not a good number."""
        given = {"strict": True, **options} if self._backend == "genie" else None
        compiled: Callable[..., Any] = torch.compile(
            target, backend=self._backend, options=given, fullgraph=fullgraph)
        return compiled

    def counters(self) -> dict[str, float]:
        """The numbers of genie.get_stats() that benches quote; nothing for other backends."""
        if self._backend != "genie":
            return {}
        stats = self._genie.get_stats()
        flat = {key: float(stats[key]) for key in ("calls", "fragment_runs", "bytes_sent", "bytes_received")}
        flat |= {f"{key}_s": float(value) for key, value in stats["seconds"].items()}
        flat["fallbacks"] = float(sum(stats["fallbacks"].values()))
        return flat

    def stats(self) -> dict[str, Any]:
        """All of genie.get_stats(); of other backends nothing is known."""
        if self._backend != "genie":
            return {"by_reason": {}, "seconds": {}, "fragment_runs": 0}
        stats: dict[str, Any] = self._genie.get_stats()
        return stats

    def refusals(self) -> dict[str, str]:
        """Fragments that Inductor refused on the worker, with the reason."""
        if self._backend != "genie":
            return {}
        (worker,) = self._genie.get_stats()["workers"].values()
        return dict(worker.get("compiler_refusals", {}))

    def close(self) -> None:
        if self._backend == "genie":
            self._genie.shutdown()
        if self._own_worker is not None:
            self._own_worker.terminate()
            self._own_worker.wait(20)
            self._own_worker = None


@functools.cache
def _shared_remote(key: str) -> Remote:
    return Remote(**json.loads(key))


def remote(params: Mapping[str, Any]) -> Remote:
    """The remote that a side's params describe; sides of one process share it, and any of them may close it."""
    names = {"backend": "genie", "threads": 1, "transport": "ipc", "busy_poll_s": 0.0}
    return _shared_remote(json.dumps({name: params.get(name, default) for name, default in names.items()}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
