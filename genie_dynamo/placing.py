"""`genie.place` and `genie.Scheduler`: who runs what, decided by cost."""
from __future__ import annotations

import contextlib
import difflib
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.placement import POLICIES, Placement, Policy
from genie_dynamo.passes.placement.interfaces import CostModel, Limits, Method, PlacementStrategy
from genie_dynamo.passes.placement.kernel import Kernels
from genie_dynamo.passes.placement.planner import Planner
from genie_dynamo.passes.placement.scheduled import ScheduledPlan, scheduled_plan

try:
    from genie_dynamo import _native

    _native_module: Any = _native
    _KERNELS: Kernels | None = Kernels(makespan=_native_module.MakespanSearch, loads=_native_module.LoadSearch)
except (ImportError, AttributeError):      # not built, or from an older tree: searches are slower without
    _KERNELS = None

_SHORT_S = 5.0
_METHODS = ("auto", "heuristic", "exact")


def place(cost_graph: CostGraph, *, devices: Sequence[Device], policy: Policy = "min_latency",
          time_limit_s: float | None = None, latency_bound_s: float | None = None, method: Method = "auto",
          seed: int = 0) -> Placement:
    """A device for every node, by cost alone.

    Args:    time_limit_s: wall seconds; the best placement found by then, or earlier where it is proven to be optimal.
             What is found depends on the speed of the machine. None: the heuristics alone with a fixed amount of
             work, so that the same seed gives the same placement.
             latency_bound_s: for min_cost: the longest makespan that is allowed.
             method: "heuristic" never uses the exact solver; "exact" uses it alone once a first placement is there,
             without a time limit until it has a proof; "auto" uses both as time allows.
    Returns: see `Placement`; docs/placement.md has the definitions of the policies.
    Raises:  ConfigError for an unknown policy, method or limit, or a solver that is asked for and missing;
             CostGraphError for devices that contradict each other; PlacementError where no placement can be given.
    """
    limits = Limits(time_limit_s=time_limit_s, latency_bound_s=latency_bound_s, method=method, seed=seed)
    _check(policy, limits)
    with no_long_pauses(time_limit_s):
        return planner().place(cost_graph, devices, policy, limits)


def planner() -> Planner:
    """The strategy that is used unless another is given, with the native search where that was built."""
    return Planner(time.monotonic, kernels=_KERNELS)


class Scheduler:
    """Places graphs on devices under a policy, with a cost model and a strategy that can be replaced."""

    def __init__(self, devices: Sequence[Device], policy: Policy = "min_latency", *, time_limit_s: float | None = None,
                 latency_bound_s: float | None = None) -> None:
        self._limits = Limits(time_limit_s=time_limit_s, latency_bound_s=latency_bound_s)
        _check(policy, self._limits)
        self._devices, self._policy = tuple(devices), policy
        self._cost_model: CostModel | None = None
        self._strategy: PlacementStrategy = planner()

    def set_cost_model(self, model: CostModel) -> None:
        """What turns graphs into cost graphs from now on."""
        self._cost_model = _checked(model, CostModel)

    def set_placement_strategy(self, strategy: PlacementStrategy) -> None:
        """What finds placements from now on."""
        self._strategy = _checked(strategy, PlacementStrategy)

    def schedule(self, graph: Any) -> ScheduledPlan:
        """The plan of a cost graph, or of a graph that the cost model knows; `.placement` says how good it is.

        Raises: ConfigError where the graph is no CostGraph and no cost model is set; PlanError where the strategy's
                placement does not fit; else what the strategy raises.
        """
        if not isinstance(graph, CostGraph):
            if self._cost_model is None:
                raise ConfigError(f"a {type(graph).__name__} has no costs; pass a CostGraph, or set_cost_model() first")
            graph = self._cost_model.cost_graph(graph, self._devices)
        with no_long_pauses(self._limits.time_limit_s):
            placed = self._strategy.place(graph, self._devices, self._policy, self._limits)
        return scheduled_plan(graph, self._devices, placed)


@contextlib.contextmanager
def no_long_pauses(time_limit_s: float | None) -> Iterator[None]:
    """No cyclic garbage collection within a short search.

    A search makes many small objects and so sets it off; where torch is loaded one full collection takes some 0.2 s,
    which would break a short limit. What a search makes has no cycles: counting references frees it.
    """
    if not gc.isenabled() or (time_limit_s is not None and time_limit_s > _SHORT_S):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{type(value).__name__} is no genie.{kind.__name__}; subclass it")
    return value


def _check(policy: str, limits: Limits) -> None:
    _check_choice("policy", policy, POLICIES)
    _check_choice("method", limits.method, _METHODS)
    for name in ("time_limit_s", "latency_bound_s"):
        value = getattr(limits, name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a positive number of seconds or None, got {value!r}")
    if limits.latency_bound_s is not None and policy != "min_cost":
        raise ConfigError(f"latency_bound_s bounds min_cost; {policy} has no use for it")
    if limits.method == "exact":
        from genie_dynamo.passes.placement import solver

        if not solver.installed():
            raise ConfigError('method="exact" needs OR-tools: pip install "genie-dynamo[solver]", or method="auto"')


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name} {value!r} is unknown; it is one of {', '.join(map(repr, choices))}{hint}")
