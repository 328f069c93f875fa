"""Plans of a few graphs as text: a change of what is planned shows in a diff.

The names of nodes are torch's, so the files hold for the pinned release; under another one only the plans' own rules
are checked.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.plan import Output, Plan, find_problems
from genie_dynamo.passes.facts import read_facts
from genie_dynamo.passes.planning import plan_graph
from tests.plugins.golden import Golden

WRITTEN_WITH_TORCH = "2.13.0"
pytestmark = pytest.mark.golden


def plans_of(fn: Callable[..., Any], *args: torch.Tensor, num_workers: int = 1) -> list[tuple[str, Plan]]:
    """(kind, plan) of each graph; with two workers the first half of the nodes goes to the first."""
    found: list[tuple[str, Plan]] = []

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_aten(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
            calls = [node for node in gm.graph.nodes if node.op == "call_function"]
            first = set(calls[:len(calls) // 2])
            found.append((kind, plan_graph(gm, read_facts(gm, kind), num_workers=num_workers,
                                           assign=lambda node: 0 if num_workers == 1 or node in first else 1)))
            return make_boxed_func(gm.forward)

        return compile_aten

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
                           inference_compiler=compiler("inference"), partition_fn=default_partition,
                           keep_inference_input_mutations=True)
    torch._dynamo.reset()
    out = torch.compile(fn, backend=backend)(*args)
    if out.requires_grad:
        out.sum().backward()
    torch._dynamo.reset()
    return found


def as_text(plans: list[tuple[str, Plan]]) -> str:
    """Without graph_id and guards: a hash of generated code, and words of Dynamo."""
    lines = []
    for kind, plan in plans:
        lines += [f"{kind}: {str(plan).partition(': ')[2]}", ""]
        for fragment in plan.fragments:
            lines += [f"fragment {fragment.fragment_id}", f"    inputs  {' '.join(fragment.inputs)}",
                      f"    nodes   {' '.join(fragment.node_names)}", f"    outputs {' '.join(fragment.outputs)}"]
            lines += [f"    draws random numbers from {fragment.rng_in}"] if fragment.rng_in else []
        lines += [f"inputs    {' '.join(plan.inputs)}", f"static    {' '.join(map(str, plan.static_inputs))}"]
        lines += [f"output    {out.kind} {out.name or _other(out)}"
                  for out in plan.outputs]
        lines += [f"mutation  input {index} becomes {name}" for index, name in plan.mutations]
        lines += [f"aliases   {' '.join(group)}" for group in plan.aliases]
        lines += [f"view      {' of '.join(pair)}" for pair in plan.input_views]
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def _other(out: Output) -> str:
    return str(out.index) if out.kind == "input" else repr(out.literal)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Normed(nn.Module):
    """Mutates buffers, draws random numbers, and ties two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.dropout(self.norm(self.first(x_BD)), 0.5, self.training))


CASES: dict[str, Callable[[], list[tuple[str, Plan]]]] = {
    "mlp_inference": lambda: plans_of(torch.no_grad()(mlp()), torch.ones(3, 4)),
    "mlp_training": lambda: plans_of(mlp(), torch.ones(3, 4)),
    "mlp_on_two_workers": lambda: plans_of(torch.no_grad()(mlp()), torch.ones(3, 4), num_workers=2),
    "batchnorm_dropout_training": lambda: plans_of(Normed().train(), torch.ones(3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_plans(name: str, golden: Golden) -> None:
    plans = CASES[name]()
    assert plans
    for _, plan in plans:
        assert not find_problems(plan)
        assert Plan.from_json(plan.to_json()) == plan
    if torch.__version__.split("+")[0] == WRITTEN_WITH_TORCH:
        golden(name, as_text(plans))
