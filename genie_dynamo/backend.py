"""The Dynamo backend: `torch.compile(model, backend="genie")`.

    Dynamo graph -> passes -> AOTAutograd, no decompositions -> ATen graphs -> plan -> RemoteGraph

Each ATen graph (inference, forward, backward) is planned and lowered here and sent at its first run. A graph that
cannot be shipped runs locally: said once with the reason, counted in get_stats()["fallbacks"], an error in strict mode.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import fx
from torch._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.repro.after_dynamo import WrapBackendDebug
from torch._dynamo.symbolic_convert import InstructionTranslator

from genie_dynamo import sessions
from genie_dynamo.by_size import BySize, SizedHomes
from genie_dynamo.core import portable_ops as _portable_ops  # noqa: F401 - registers genie::sdpa
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import ConfigError, UnsupportedGraphError
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.plan import GuardFacts
from genie_dynamo.device.compiled import is_on_device, recorded
from genie_dynamo.fused import remote_call
from genie_dynamo.partitioning import partition_fn
from genie_dynamo.parts import Parts
from genie_dynamo.passes.default_dtype import make_default_dtype_explicit
from genie_dynamo.passes.facts import GraphFacts, read_facts, read_guards
from genie_dynamo.passes.following import Homes
from genie_dynamo.passes.lower import lower_fragment, unsupported_reasons
from genie_dynamo.passes.pipeline import run_pipeline
from genie_dynamo.passes.planning import Assign, plan_graph
from genie_dynamo.passes.rows.split import SplitGraph
from genie_dynamo.passes.semantics.carry import carry_over
from genie_dynamo.passes.specialize import symbolic_batch
from genie_dynamo.placed import PlacedGraph
from genie_dynamo.runtime.client import stale
from genie_dynamo.runtime.client.attempt import GraphInfo
from genie_dynamo.runtime.client.remote_graph import RemoteGraph, materialize

log = logging.getLogger(__name__)

observers: list[Callable[[PlacedGraph], None]] = []
"""Told of every graph that is compiled (`explain`)."""

_numbers = itertools.count()
_said: set[str] = set()
_BUILT_IN = frozenset({"aten", "prims", "genie", "higher_order", "rngprims"})


def genie(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The entry point that torch.compile finds under the name "genie".

    Args:   kwargs: torch passes `options=` here (see core/config.py), and `mode=`, which has no meaning for us.
    Raises: ConfigError for a wrong option; UnsupportedGraphError in strict mode.
    """
    options = kwargs.pop("options", None) or {}
    config = sessions.default_config().for_compile(options)
    run_pipeline(gm, example_inputs)
    guards = read_guards(gm)
    homes = SizedHomes()

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            carry_over(gm, graph, kind)
            return compile_aten(graph, kind, guards, config, homes=homes)

        return compile_graph

    if config.parameters == "remote" and not _CALLS_ARE_WRAPPED:
        raise ConfigError(f"parameters='remote' cannot be kept with torch {torch.__version__}, which does not let a "
                          "backend act around compiled calls", option="parameters")
    # Donated buffers would forbid retain_graph=True, which eager allows.
    with torch._functorch.config.patch(donated_buffer=False):
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"), partition_fn=partition_fn(config),
            keep_inference_input_mutations=True,
        )(gm, example_inputs)
    return compiled


def compile_aten(gm: fx.GraphModule, kind: str, guards: GuardFacts, config: Config, *,
                 assign: Assign | None = None, num_workers: int = 1,
                 homes: SizedHomes | None = None) -> Callable[[list[Any]], Any]:
    """One ATen graph as a boxed callable: remote where it can be shipped, else local.

    Args:   assign, num_workers: a placement made by hand, as for plan_graph; by default it is made by cost.
            homes: what a forward graph tells its backward graph.
    Raises: UnsupportedGraphError in strict mode.
    """
    if is_on_device(gm):
        return recorded(gm)
    label = f"{kind} graph {next(_numbers)}"
    try:
        make_default_dtype_explicit(gm)
    except UnsupportedGraphError as error:
        return _fall_back(label, (str(error),), _boxed(gm, kind), config)
    facts = read_facts(gm, kind)
    homes = homes or SizedHomes()
    compile_one = functools.partial(_compile_graph, facts=facts, guards=guards, partial=_ends_in_break())
    if config.microbatches == 1 or assign is not None or not symbolic_batch(gm, facts.static_inputs):
        return compile_one(gm, config=config, label=label, assign=assign, num_workers=num_workers, homes=homes.at({}))
    whole = compile_one(gm, config=dataclasses.replace(config, microbatches=1), label=label, homes=homes.at({}))
    if not isinstance(whole, PlacedGraph):
        return whole                # it runs locally, or there is nothing to run
    return BySize(gm, label, homes, whole, strict=config.strict, refused=whole.refused,
                  make=lambda sized, name, at: compile_one(sized, config=config, label=name, homes=at))


def _compile_graph(gm: fx.GraphModule, *, facts: GraphFacts, guards: GuardFacts, config: Config, label: str,
                   partial: bool, homes: Homes, assign: Assign | None = None,
                   num_workers: int = 1) -> Callable[[list[Any]], Any]:
    """One graph of known facts; see compile_aten. partial: eager code of the function follows it."""
    kind = facts.kind
    local = _boxed(gm, kind)
    namespaces = _namespaces(gm)
    # Whether a worker really has the op libraries shows when the fragment is loaded there.
    reasons = unsupported_reasons(gm, namespaces) + _foreign_devices(gm)
    remote = config.parameters == "remote" and kind != "backward"
    keep_state = not remote and config.awareness == "full" and kind != "backward"
    session = lambda: sessions.session(namespaces)  # noqa: E731 - it is handed on

    def build(assign: Assign | None, workers: Sequence[str], count: int, over: fx.GraphModule = gm,
              split: SplitGraph | None = None) -> RemoteGraph:
        plan = plan_graph(over, facts, guards, assign=assign, num_workers=count,
                          keep_state=keep_state and split is None, in_order=split is not None and split.in_order)
        if remote:
            changed = {index for index, _ in plan.mutations}
            plan = dataclasses.replace(plan, stays=tuple(i for i in facts.static_inputs if i in changed))
        specs = {
            f.fragment_id: encode(lower_fragment(over, node_names=f.node_names, inputs=f.inputs, outputs=f.outputs))
            for f in plan.fragments
        }
        info = GraphInfo(kind == "backward", facts.bumped, label, partial)
        return RemoteGraph(plan, specs, info, config, session, local, workers)

    try:
        if reasons:
            return _fall_back(label, reasons, local, config)
        first = build(assign, (), num_workers)
        parts = Parts.of(gm, facts, config, label) if assign is None else Parts()
    except UnsupportedGraphError as error:
        return _fall_back(label, (str(error),), local, config)
    if not first.plan.fragments:
        # Nothing to compute: outputs are inputs and literals.
        return local
    if assign is not None:
        return first
    placed = PlacedGraph(gm, facts, config, label, homes, session, first, parts,
                         lambda over, assign, workers, split: build(assign, workers, len(workers), over, split))
    for watch in observers:
        watch(placed)
    return placed


def _ends_in_break() -> bool:
    """Whether eager code of the function that is being compiled follows this graph."""
    try:
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    except AttributeError:
        return False            # compiled without Dynamo
    return bool(reason is not None and reason.graph_break)


def _boxed(gm: fx.GraphModule, kind: str) -> Callable[[list[Any]], Any]:
    """The graph as it runs here; activations that a remote forward left on its worker are fetched."""

    def run(args: list[Any]) -> Any:
        stale.bring_home()
        values = materialize(args[:num_inputs], sessions.session) if kind == "backward" else list(args)
        args.clear()
        return gm.forward(*values)

    # What runs on workers in place of a backward may take copies of activations besides.
    num_inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _fall_back(label: str, reasons: Sequence[str], local: Callable[[list[Any]], Any],
               config: Config) -> Callable[[list[Any]], Any]:
    text = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    if config.strict:
        raise UnsupportedGraphError(f"{label} cannot be shipped to a worker: {text}", reasons=tuple(reasons))
    if reasons[0] not in _said:
        _said.add(reasons[0])
        log.warning("%s runs locally, it cannot be shipped: %s", label, text)

    def run(args: list[Any]) -> Any:
        sessions.session().telemetry.fallback(reasons[0])
        return local(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _foreign_devices(gm: fx.GraphModule) -> tuple[str, ...]:
    """What comes back from a worker is a CPU tensor: a graph whose caller expects another device stays here."""
    found = {str(value.device) for node in gm.graph.nodes
             if isinstance(value := node.meta.get("val"), torch.Tensor) and value.device.type not in ("cpu", "meta")}
    return tuple(f"the caller's tensors are on {device}; only cpu tensors travel yet, the worker has the accelerator"
                 for device in sorted(found))


def _namespaces(gm: fx.GraphModule) -> frozenset[str]:
    """Op namespaces beside torch's own, also of ops that a higher-order op takes as arguments."""
    found = {item.namespace for node in gm.graph.nodes for item in (node.target, *node.args)
             if isinstance(item, torch._ops.OpOverload)}
    return frozenset(found - _BUILT_IN)


def _wrap_calls() -> bool:
    """Let `stale.lifted` be entered around every call of a function compiled for genie.

    A backend may name a context manager for that (`backend_ctx_ctor`), but torch.compile hides backends behind objects
    that do not hand the name on. Returns: whether this torch does so now.
    """
    def context_of(self: Any) -> Any:
        backend = self.__dict__.get("_torchdynamo_orig_backend")
        context = getattr(getattr(backend, "compiler_fn", backend), "backend_ctx_ctor", contextlib.nullcontext)
        options = getattr(backend, "kwargs", {}).get("options") or {}
        return remote_call if context is stale.lifted and options.get("parameters") == "remote" else context

    WrapBackendDebug.backend_ctx_ctor = property(context_of)  # type: ignore[attr-defined]
    hidden = torch._TorchCompileWrapper(genie, None, None, None)  # type: ignore[no-untyped-call]
    wrapped = eval_frame.get_compiler_fn(hidden)
    return getattr(wrapped, "backend_ctx_ctor", None) is stale.lifted


genie.backend_ctx_ctor = stale.lifted  # type: ignore[attr-defined]
_CALLS_ARE_WRAPPED = _wrap_calls()
