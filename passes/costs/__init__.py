"""What a graph costs: work of every node as expressions over the graph's symbols, and seconds on a machine.

    analysis.py   graph -> GraphCosts                 formulas/   work by family of ops
    estimate.py   GraphCosts, hardware -> seconds     fit.py      corrections from observed times
"""
from genie_dynamo.passes.costs.analysis import analyze_costs, node_costs
from genie_dynamo.passes.costs.cost_graph import cost_graph
from genie_dynamo.passes.costs.estimate import node_seconds
from genie_dynamo.passes.costs.fit import CostFit, fit_costs, refine
from genie_dynamo.passes.costs.graph_costs import GraphCosts, NodeCost, Totals
from genie_dynamo.passes.costs.observe import observations
from genie_dynamo.passes.costs.symbols import SymbolBinding, bind_symbols

__all__ = [
    "CostFit", "GraphCosts", "NodeCost", "SymbolBinding", "Totals", "analyze_costs", "bind_symbols", "cost_graph",
    "fit_costs", "node_costs", "node_seconds", "observations", "refine",
]
