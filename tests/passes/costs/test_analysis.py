"""Symbolic sizes: no guards, right values, unknown sizes named; memory over time; higher-order ops."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs import analyze_costs, bind_symbols, node_costs
from genie_dynamo.passes.costs.graph_costs import QUANTITIES
from tests.captured import PROGRAMS, program_names
from tests.passes.costs.tracing import trace


def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = (x @ w).relu()
    return torch.cat([y, y[: y.shape[0] // 2]]).view(-1, w.shape[1]).softmax(-1).sum(0)


def test_symbolic_costs_are_the_static_ones() -> None:
    gm = trace(block, torch.randn(6, 5), torch.randn(5, 7), symbolic=True)
    costs = analyze_costs(gm)
    for rows, k, n in ((6, 5, 7), (8, 4, 3), (100, 32, 16)):
        args = (torch.randn(rows, k), torch.randn(k, n))
        static = analyze_costs(trace(block, *args))
        values = bind_symbols(gm, args)
        assert costs.totals(values) == static.totals()
        static_mm, symbolic_mm = (next(c for c in some if c.op == "aten::mm") for some in (static, costs))
        column = costs.values(values)["flops"][list(costs.nodes).index(symbolic_mm.name)]
        assert column == static_mm.flops == 2 * rows * k * n


def test_no_guards_are_added() -> None:
    args = (torch.randn(6, 5), torch.randn(5, 7))
    gm = trace(block, *args, symbolic=True)
    shape_env: Any = gm.shape_env  # type: ignore[attr-defined]
    before = [str(guard.expr) for guard in shape_env.guards], dict(shape_env.replacements), shape_env._version_counter
    costs = analyze_costs(gm)
    costs.totals(bind_symbols(gm, args))
    costs.values(bind_symbols(gm, args))
    str(costs)
    assert before == (
        [str(guard.expr) for guard in shape_env.guards], dict(shape_env.replacements), shape_env._version_counter)


def test_a_symbol_without_value_names_node_and_dimension() -> None:
    gm = trace(block, torch.randn(6, 5), torch.randn(5, 7), symbolic=True)
    with pytest.raises(CostError, match=r"size of dimension 0 of node x_1 is s\d+, which has no value") as raised:
        analyze_costs(gm).totals()
    assert raised.value.dim == 0  # type: ignore[attr-defined]


def test_a_size_that_depends_on_data_is_named() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = trace(lambda x: torch.nonzero(x) * 2, torch.randn(6), symbolic=True)
    costs = analyze_costs(gm)
    values = bind_symbols(gm, [torch.randn(6)])
    with pytest.raises(CostError, match=r"size of dimension 0 of node nonzero is u0"):
        costs.totals(values)
    assert costs.totals({**values, "u0": 4}).flops == 4


def test_a_node_without_fake_tensors_is_named() -> None:
    gm = trace(lambda x: x.sin().cos(), torch.randn(3))
    del next(node for node in gm.graph.nodes if "sin" in node.name).meta["val"]
    with pytest.raises(CostError, match="sin"):
        analyze_costs(gm)


def test_peak_memory_is_that_of_values_alive_at_once() -> None:
    """x is an input; a dies with b, b with c, and the view of c keeps it alive."""
    def chain(x: torch.Tensor) -> torch.Tensor:
        a = x + 1                                   # 400 bytes
        b = torch.cat([a, a])                       # 800: a and b, 1200
        c = b.sum(0, keepdim=True)                  # 4
        d = torch.cat([b[:50], c])                  # 204: b, c, d, 1008
        return c.view(()) * d[0]

    totals = analyze_costs(trace(chain, torch.randn(100))).totals()
    assert (totals.input_bytes, totals.peak_bytes) == (400, 1200)


def test_in_place_ops_allocate_nothing() -> None:
    costs = node_costs(trace(lambda x: x.clone().add_(1).mul_(2), torch.randn(10)))
    assert [c.allocated_bytes for c in costs.values()] == [40, 0, 0]


@pytest.mark.parametrize("name", program_names())
def test_every_program_has_costs(name: str) -> None:
    """All kinds of graphs the project ships, with a formula for every op, and sums equal to those over nodes."""
    for captured in PROGRAMS[name].graphs():
        costs = analyze_costs(captured.gm)
        values = bind_symbols(captured.gm, captured.inputs)
        totals, columns = costs.totals(values), costs.values(values)
        assert not costs.without_formula
        assert set(columns) == set(QUANTITIES) and all((column >= 0).all() for column in columns.values())
        assert totals.flops == pytest.approx(columns["flops"].sum())
        assert totals.bytes_read == columns["bytes_read"].sum()
        assert set(costs.nodes) == {n.name for n in captured.gm.graph.nodes if n.op == "call_function"}


def test_a_scan_costs_its_body_for_each_row() -> None:
    gm = PROGRAMS["scan"].graphs()[0].gm
    scan = next(cost for cost in analyze_costs(gm) if cost.op == "higher_order::scan")
    assert scan.family == "control_flow" and scan.flops == 5 * 2 * 3          # 5 rows of 3: one sum, one product


def test_loops_and_branches_say_what_they_suppose() -> None:
    (loop,) = analyze_costs(PROGRAMS["while_loop"].graphs()[0].gm).assumptions.values()
    (branch,) = analyze_costs(PROGRAMS["cond"].graphs()[0].gm).assumptions.values()
    assert "one trip is counted" in loop and "dearer branch" in branch


def test_costs_need_nothing_but_the_graph() -> None:
    """A graph made by hand, with fake tensors set by propagation."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.mm.default, (x, x)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    FakeTensorProp(gm).propagate(torch.randn(4, 4))
    assert analyze_costs(gm).totals().matrix_flops == 128


def test_a_check_that_gives_nothing_has_no_sizes_and_costs_nothing() -> None:
    """AOTAutograd leaves meta["val"] out where an op returns nothing."""
    gm = trace(lambda x: x.sum(), torch.randn(4, 4))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        check = gm.graph.call_function(torch.ops.aten._assert_scalar.default, (True, "a message"))
    costs = analyze_costs(gm).nodes[check.name]
    assert (costs.flops, costs.output_bytes) == (0, 0)
