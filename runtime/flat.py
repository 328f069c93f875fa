"""Runs a fragment as a flat list of steps: everything is looked up once, a run only calls.

A plan has numbered registers: first the inputs, then what nodes make (a register is taken again once its value has
had its last use, so memory frees early), then literals. A step is a closure over register numbers.
"""
from __future__ import annotations

import enum
import time
from collections.abc import Callable
from operator import length_hint
from typing import Any

import torch

from genie_dynamo.core.fragment import GraphSpec, Value
from genie_dynamo.runtime.births import Lend, birth_step, find_births
from genie_dynamo.runtime.step_times import StepTimes
from genie_dynamo.runtime.steps import Literals, Step, clear_step, make_step, references

Registers = list[Any]
OnOutput = Callable[[int, Any], None]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()
"""Stands for an input that has not come yet."""

_CHUNK = 4
"""Steps between two looks at the clock."""
_LONG_S = 0.0005
"""Where they took longer, one step at a time is made: somebody may be waiting for the run to give way."""

_NEVER = 1 << 62


class RunStatus(enum.Enum):
    """Where a run stands when `resume` returns."""

    DONE = "done"
    WAITING = "waiting"
    YIELDED = "yielded"


class FlatPlan:
    """A graph ready to run on one device, any number of times, from any thread.

    Args:   travels: indices of outputs that a run may make in memory that it is lent (runtime/births.py).
    Raises: UnsupportedGraphError where an op may not or cannot run here.
    """

    def __init__(self, spec: GraphSpec, *, device: torch.device,
                 extra_namespaces: frozenset[str] = frozenset(), travels: frozenset[int] = frozenset()) -> None:
        self.spec = spec
        self.device = device
        self.num_inputs = spec.num_inputs
        self._build(spec, device, extra_namespaces, travels if device.type == "cpu" else frozenset())

    def _build(self, spec: GraphSpec, device: torch.device, extra_namespaces: frozenset[str],
               travels: frozenset[int]) -> None:
        last_use = _last_uses(spec)
        registers, deaths, num_registers = _allocate(spec, last_use)
        literals = Literals(spec, device, extra_namespaces, first=num_registers + 1, subgraph=self._subgraph)
        self._steps: list[Step] = []
        self._times: StepTimes | None
        self._node_of_step: list[int] = []
        self._first_use = [_NEVER] * spec.num_inputs
        ends: list[int] = []
        last_write = -1
        self.may_write = False            # to memory that an input lies in
        births = find_births(spec, travels, literals.function) if travels else {}
        for j, node in enumerate(spec.nodes):
            for used in references((node.args, node.kwargs)):
                if used < spec.num_inputs:
                    self._first_use[used] = min(self._first_use[used], len(self._steps))
            function = literals.function(node)
            out = registers[spec.num_inputs + j]
            step = make_step(function, node, registers, out, literals)
            if j in births:
                step = birth_step(births[j], step, node, registers, out, num_registers, literals)
            self._append(step, j)
            if deaths[j]:
                self._append(clear_step(deaths[j]), j)
            ends.append(len(self._steps))
            if literals.writes(node):
                last_write = j
            self.may_write |= literals.may_write(node)
        self._plain_steps, self._times = self._steps, None
        self._output_builders = [literals.output_builder(output, registers) for output in spec.outputs]
        self.births = tuple(births.values())
        self._lender = num_registers
        self._template = [None] * (num_registers + 1 - spec.num_inputs) + literals.values
        self._literals = literals
        self._registers = registers
        self._unused = tuple(k for k in range(spec.num_inputs) if last_use[k] < 0)
        self._find_events(spec, ends, last_write)

    def _append(self, step: Step, node: int) -> None:
        self._steps.append(step)
        self._node_of_step.append(node)

    def _find_events(self, spec: GraphSpec, ends: list[int], last_write: int) -> None:
        """When each output is final: (step count, output index), in order; an input counts as soon as it is there."""
        events = []
        self._input_outputs: list[tuple[int, int]] = []
        self._literal_outputs: list[int] = []
        for index, output in enumerate(spec.outputs):
            used = references(output)
            if not used:
                self._literal_outputs.append(index)
            elif isinstance(output, Value) and output.index < spec.num_inputs:
                self._input_outputs.append((index, output.index))
            else:
                # An op that writes in place could still change a value made before it.
                node = max(max(used) - spec.num_inputs, last_write)
                events.append((ends[node] if node >= 0 else 0, index))
        self._events = sorted(events)
        self._needed_at_end = frozenset(k for output in spec.outputs for k in references(output)
                                        if k < spec.num_inputs)

    def _subgraph(self, spec: GraphSpec, device: torch.device, extra_namespaces: frozenset[str]) -> SubgraphCallable:
        return SubgraphCallable(FlatPlan(spec, device=device, extra_namespaces=extra_namespaces))

    @property
    def wants_lender(self) -> bool:
        """Whether a run would use one: the last one's outputs were large enough."""
        for birth in self.births:  # noqa: SIM110 - a hot path
            if birth.wanted:
                return True
        return False

    def run(self, inputs: list[Any], lend: Lend | None = None) -> list[Any]:
        """Run to the end. Takes the inputs out of the list.

        Raises: whatever an op raises, with a note that names the node and its arguments.
        """
        registers = self._enter(inputs, lend)
        steps = iter(self._steps)
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                for step in steps:
                    step(registers)
                return [build(registers) for build in self._output_builders]
        except Exception as exc:
            self._annotate(exc, len(self._steps) - length_hint(steps) - 1, registers)
            raise
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    def run_timed(self, inputs: list[Any], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
        """Run to the end for its times: seconds by node name, with what freeing its arguments takes.

        Nothing is waited for between nodes: on a device that runs behind, these are times to launch.
        """
        registers = self._enter(inputs)
        seconds = [0.0] * len(self.spec.nodes)
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                before_s = clock()
                for step, node in zip(self._steps, self._node_of_step, strict=True):
                    step(registers)
                    after_s = clock()
                    seconds[node] += after_s - before_s
                    before_s = after_s
        finally:
            torch._C._set_grad_enabled(grad)
        return {node.name: taken_s for node, taken_s in zip(self.spec.nodes, seconds, strict=True)}

    def profile(self) -> tuple[float, ...] | None:
        """Seconds per node of `spec` in the runs since the last call, None before there were some; timed anew from now.

        Only the next few runs are timed: after them the plan runs as if nobody had ever asked.
        """
        seconds = self._times.seconds() if self._times is not None else None
        if self._times is None or seconds is not None:
            self._times = StepTimes(self._plain_steps, self._node_of_step, len(self.spec.nodes), self.device,
                                    self._use_steps)
        return seconds

    def _use_steps(self, steps: list[Step]) -> None:
        self._steps = steps

    def start(self, inputs: list[Any], lend: Lend | None = None) -> FlatRun:
        """A run that can wait for inputs (MISSING) and be interrupted. Takes the inputs out of the list."""
        return FlatRun(self, self._enter(inputs, lend))

    def _enter(self, inputs: list[Any], lend: Lend | None = None) -> Registers:
        if len(inputs) != self.num_inputs:
            raise ValueError(f"the fragment takes {self.num_inputs} inputs, got {len(inputs)}")
        registers = inputs + self._template
        inputs.clear()
        if lend is not None:
            registers[self._lender] = lend
        for k in self._unused:
            registers[k] = None
        return registers

    def _annotate(self, exc: Exception, step: int, registers: Registers) -> None:
        """Name the node, its op and its arguments in the exception; then let go of all values."""
        if 0 <= step < len(self._steps):
            node = self.spec.nodes[self._node_of_step[step]]
            shown = ", ".join(
                [self._literals.describe(a, registers, self._registers) for a in node.args]
                + [f"{k}={self._literals.describe(a, registers, self._registers)}" for k, a in node.kwargs.items()]
            )
            exc.add_note(f"in node {node.name} = {node.target}({shown})")
        registers.clear()


class SubgraphCallable:
    """A subgraph as what higher-order ops call."""

    def __init__(self, plan: FlatPlan) -> None:
        self._plan = plan
        self._returns = plan.spec.returns
        self.__name__ = "subgraph"

    def __call__(self, *args: Any) -> Any:
        outputs = self._plan.run(list(args))
        if self._returns == "tuple":
            return tuple(outputs)
        return outputs if self._returns == "list" else outputs[0]


class FlatRun:
    """One run of a plan that may stop and go on.

    waiting_for  the input it stopped at, where the status is WAITING
    outputs      None until DONE
    busy_s       seconds spent in `resume`
    """

    def __init__(self, plan: FlatPlan, registers: Registers) -> None:
        self.waiting_for: int | None = None
        self.outputs: list[Any] | None = None
        self.busy_s = 0.0
        self._plan = plan
        self._registers = registers
        self._at = 0
        self._next_event = 0
        self._missing = {k for k in range(plan.num_inputs) if registers[k] is MISSING}
        self._early = list(plan._input_outputs)
        self._literals_reported = False

    def is_missing(self, index: int) -> bool:
        """Whether input `index` is still to come."""
        return index in self._missing

    def supply(self, index: int, value: Any) -> None:
        """Hand over an input that was MISSING.

        Raises: ValueError where it was not.
        """
        if index not in self._missing:
            raise ValueError(f"input {index} is not missing")
        self._missing.remove(index)
        self._registers[index] = value

    def resume(self, until_s: float | None = None, on_output: OnOutput | None = None) -> RunStatus:
        """Go on until the end, a missing input, or (after a step) the monotonic time `until_s`.

        Args:   on_output: told `(output index, value)` as soon as an output is final.
        Raises: whatever an op raises, annotated as by FlatPlan.run; the run is over then.
        """
        if self.outputs is not None:
            return RunStatus.DONE
        started = time.perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return self._resume(until_s, on_output)
        finally:
            torch._C._set_grad_enabled(grad)
            self.busy_s += time.perf_counter() - started

    def _resume(self, until_s: float | None, on_output: OnOutput | None) -> RunStatus:
        plan = self._plan
        total = len(plan._steps)
        stop, self.waiting_for = self._next_wait(total)
        if on_output is not None:
            self._report_early(on_output)
        chunk, before_s = _CHUNK, 0.0
        while self._at < stop:
            end = stop if until_s is None else min(self._at + chunk, stop)
            if on_output is not None and self._next_event < len(plan._events):
                end = min(end, max(plan._events[self._next_event][0], self._at + 1))
            self._run_steps(end)
            if on_output is not None:
                self._report_events(on_output)
            if until_s is not None and self._at < total:
                now_s = time.monotonic()
                if now_s >= until_s:
                    return RunStatus.YIELDED
                chunk, before_s = 1 if before_s and now_s - before_s > _LONG_S else _CHUNK, now_s
        if self.waiting_for is not None:
            return RunStatus.WAITING
        if on_output is not None:
            self._report_events(on_output)
        self.outputs = [build(self._registers) for build in plan._output_builders]
        self._registers.clear()
        return RunStatus.DONE

    def _next_wait(self, total: int) -> tuple[int, int | None]:
        """`(steps that can run, the input that must come then)`."""
        stop, waiting_for = total, None
        for k in self._missing:
            use = self._plan._first_use[k]
            if use == _NEVER and k in self._plan._needed_at_end:
                use = total
            if use < stop or (use == total and waiting_for is None):
                stop, waiting_for = use, k
        return stop, waiting_for

    def _run_steps(self, end: int) -> None:
        at, steps, registers = self._at, self._plan._steps, self._registers
        try:
            for at in range(at, end):  # noqa: B020 - `at` is where it broke, if it does
                steps[at](registers)
        except Exception as exc:
            self._plan._annotate(exc, at, registers)
            raise
        self._at = end

    def _report_early(self, on_output: OnOutput) -> None:
        """Outputs that are inputs or literals."""
        if not self._literals_reported:
            self._literals_reported = True
            for index in self._plan._literal_outputs:
                on_output(index, self._plan._output_builders[index](self._registers))
        waiting = []
        for index, source in self._early:
            if source in self._missing:
                waiting.append((index, source))
            else:
                on_output(index, self._registers[source])
        self._early = waiting

    def _report_events(self, on_output: OnOutput) -> None:
        events = self._plan._events
        while self._next_event < len(events) and events[self._next_event][0] <= self._at:
            index = events[self._next_event][1]
            self._next_event += 1
            on_output(index, self._plan._output_builders[index](self._registers))


def _last_uses(spec: GraphSpec) -> list[int]:
    """For each value the last node that reads it: -1 for none, _NEVER where it is an output."""
    last = [-1] * (spec.num_inputs + len(spec.nodes))
    for j, node in enumerate(spec.nodes):
        for used in references((node.args, node.kwargs)):
            last[used] = j
    for output in spec.outputs:
        for used in references(output):
            last[used] = _NEVER
    return last


def _allocate(spec: GraphSpec, last_use: list[int]) -> tuple[list[int], list[tuple[int, ...]], int]:
    """`(register of each value, registers each node leaves dead, number of registers)`.

    A node's result goes into a register that one of its own arguments dies in, where there is one: that frees the
    argument without a step of its own.
    """
    registers = list(range(spec.num_inputs)) + [-1] * len(spec.nodes)
    free: list[int] = []
    num_registers = spec.num_inputs
    deaths: list[tuple[int, ...]] = []
    for j, node in enumerate(spec.nodes):
        dying = [registers[v] for v in dict.fromkeys(references((node.args, node.kwargs))) if last_use[v] == j]
        if dying:
            out = dying.pop()
        elif free:
            out = free.pop()
        else:
            out, num_registers = num_registers, num_registers + 1
        value = spec.num_inputs + j
        registers[value] = out
        if last_use[value] < 0:
            dying.append(out)
        deaths.append(tuple(dying))
        free += dying
    return registers, deaths, num_registers


