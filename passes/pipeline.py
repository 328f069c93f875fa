"""The pipeline: which passes run over a graph as Dynamo gives it, in which order, and what each of them did.

    report = run_pipeline(gm, example_inputs)
    print(report)

The runner times each pass, keeps its matches and refusals, checks the graph after it, and on request writes the
graph before and after, and the difference, into a folder.
"""
from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.errors import PlanError
from genie_dynamo.passes.base import CaptureFacts, Match, NoMatch, Pass
from genie_dynamo.passes.portable_sdpa import PortableSdpa
from genie_dynamo.passes.semantics.carry import AnnotateSemantics

PIPELINE: tuple[Pass, ...] = (
    PortableSdpa(),
    AnnotateSemantics(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did."""

    name: str
    seconds: float
    nodes_before: int          # of the graph and the graphs nested in it
    nodes_after: int
    matches: tuple[Match, ...]
    no_matches: tuple[NoMatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReport:
    """What the pipeline did, pass by pass."""

    passes: tuple[PassReport, ...]

    @property
    def seconds(self) -> float:
        return sum(report.seconds for report in self.passes)

    def __str__(self) -> str:
        lines = [f"{'pass':<24}{'ms':>8}{'nodes':>14}{'matches':>9}{'left':>6}"]
        for report in self.passes:
            nodes = f"{report.nodes_before} -> {report.nodes_after}"
            lines.append(f"{report.name:<24}{report.seconds * 1e3:>8.2f}{nodes:>14}"
                         f"{len(report.matches):>9}{len(report.no_matches):>6}")
            lines += [f"    {no_match.node}: {no_match.reason}" for no_match in report.no_matches]
        return "\n".join(lines)


def read_capture_facts() -> CaptureFacts:
    """What holds in this process now. Call it inside the backend, while Dynamo compiles."""
    cuda: Any = torch.backends.cuda      # named so, but the switches hold for every device
    all_on = cuda.flash_sdp_enabled() and cuda.math_sdp_enabled() and cuda.mem_efficient_sdp_enabled()
    forward_ad = torch.autograd.forward_ad._current_level >= 0
    return CaptureFacts(sdp_backends_limited=not all_on, forward_ad=forward_ad)


def run_pipeline(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, passes: Iterable[Pass] = PIPELINE,
    facts: CaptureFacts | None = None, dump_dir: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PipelineReport:
    """Run the passes over `gm`, in place.

    Args:    example_inputs: as Dynamo gives them; their number must be that of the graph's inputs, also after.
             facts: what holds around the graph; None asks the process.  dump_dir: where to write each step.
    Returns: the report.
    Raises:  PlanError if a pass leaves a graph that is not well formed; that is our bug.
    """
    facts = read_capture_facts() if facts is None else facts
    reports = []
    text = _text(gm) if dump_dir is not None else ""
    for index, step in enumerate(passes):
        nodes_before = _num_nodes(gm)
        started_s = clock()
        outcomes = step.run(gm, facts)
        seconds = clock() - started_s
        _check(gm, example_inputs, step.name)
        reports.append(PassReport(
            name=step.name, seconds=seconds, nodes_before=nodes_before, nodes_after=_num_nodes(gm),
            matches=tuple(o for o in outcomes if isinstance(o, Match)),
            no_matches=tuple(o for o in outcomes if isinstance(o, NoMatch))))
        if dump_dir is not None:
            text = _dump(dump_dir, index, step.name, text, _text(gm))
    report = PipelineReport(passes=tuple(reports))
    if dump_dir is not None:
        (dump_dir / "report.txt").write_text(f"{report}\n")
    return report


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _num_nodes(gm: fx.GraphModule) -> int:
    return sum(len(module.graph.nodes) for module in _graphs(gm))


def _check(gm: fx.GraphModule, example_inputs: Sequence[Any], name: str) -> None:
    try:
        for module in _graphs(gm):
            module.graph.lint()
    except RuntimeError as exc:
        raise PlanError(f"pass {name} left a graph that is not well formed: {exc}", pass_name=name) from exc
    num_inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if num_inputs != len(example_inputs):
        raise PlanError(f"pass {name} left {num_inputs} inputs; Dynamo gives {len(example_inputs)}", pass_name=name)


def _text(gm: fx.GraphModule) -> str:
    return "\n".join(f"# {name or 'graph'}\n{module.graph}\n" for name, module in gm.named_modules()
                     if isinstance(module, fx.GraphModule))


def _dump(directory: Path, index: int, name: str, before: str, after: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{index:02d}_{name}"
    (directory / f"{stem}.before.txt").write_text(before)
    (directory / f"{stem}.after.txt").write_text(after)
    difference = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="")
    (directory / f"{stem}.diff").write_text("\n".join(difference) + "\n")
    return after
