"""Inductor's code for a fragment, by torch._inductor.standalone_compile.

Code is compiled for the inputs it was shown: numbers among them, and the sizes that equal one of them, are symbols;
every other size, stride and dtype is fixed. Inputs that no code fits run on the flat plan at once, while code for
them is compiled in the background; then sizes that were seen to differ are symbols too.
"""
from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.fragment import GraphSpec
from genie_dynamo.runtime.flat import FlatPlan
from genie_dynamo.runtime.rebuild import to_graph_module
from genie_dynamo.runtime.shape_guards import ExpectedShapes, Form, form_of, symbolic_inputs, varying_slots

log = logging.getLogger(__name__)

_MAX_VARIANTS = 4
"""Codes for one fragment. Beyond that, inputs that fit none of them stay on the flat plan."""

_MAX_REMEMBERED = 4096
"""Shapes whose code is remembered; beyond that they are looked at again."""

_FLAT = -1
_compiling = threading.RLock()
_thread = threading.local()


def compile_with_inductor(spec: GraphSpec, example_inputs: Sequence[Any], *, device: torch.device,
                          extra_namespaces: frozenset[str] = frozenset()) -> Callable[[list[Any]], list[Any]]:
    """Code for inputs like the examples. What it returns takes a list of inputs, empties it, and returns the outputs.

    May be called from any thread; the code it returns runs from one thread at a time.

    Raises: UnsupportedGraphError where Inductor refuses the graph.
    """
    code = InductorCode(spec, device, extra_namespaces)
    code.compile_for(list(example_inputs))
    return code


class InductorCode:
    """A fragment's compiled variants, and the flat plan for inputs that none of them fits."""

    def __init__(self, spec: GraphSpec, device: torch.device, extra_namespaces: frozenset[str] = frozenset()) -> None:
        self._spec, self._device, self._namespaces = spec, device, extra_namespaces
        self._flat = FlatPlan(spec, device=device, extra_namespaces=extra_namespaces)
        self._variants: tuple[tuple[ExpectedShapes, Callable[..., Any]], ...] = ()
        self._seen: list[tuple[Form, ...]] = []
        self._thread: threading.Thread | None = None
        self._attempts = 0
        self._form_ids: dict[Form, int] = {}
        self._last: list[tuple[Callable[[], Any], int]] = [(lambda: None, 0)] * spec.num_inputs
        self._variant_of: dict[tuple[int, ...], int] = {}

    def __call__(self, inputs: list[Any]) -> list[Any]:
        key = self._key(inputs)
        variant = self._variant_of.get(key)
        if variant is None:
            variant = self._choose(key, inputs)
        if variant == _FLAT:
            return self._flat.run(inputs)
        code = self._variants[variant][1]
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return list(code(*inputs))
        finally:
            torch._C._set_grad_enabled(grad)
            inputs.clear()

    def compile_for(self, inputs: list[Any]) -> None:
        """Compile a variant for inputs like these.

        Raises: UnsupportedGraphError where Inductor refuses the graph.
        """
        self._attempts += 1
        forms = tuple(map(form_of, inputs))
        self._seen.append(forms)
        symbols = symbolic_inputs(inputs, varying_slots(self._seen))
        try:
            gm = to_graph_module(self._spec, device=self._device, extra_namespaces=self._namespaces)
            code = _standalone_compile(gm, symbols.examples, symbols.fake_mode)
        except UnsupportedGraphError:
            raise
        except Exception as exc:
            first_line = str(exc).strip().splitlines()[0] if str(exc).strip() else ""
            raise UnsupportedGraphError(f"Inductor refuses the fragment: {type(exc).__name__}: {first_line}") from exc
        self._variants += ((symbols.expected(), code),)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the variant that is being compiled in the background; False where it takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _key(self, inputs: list[Any]) -> tuple[int, ...]:
        """One small number per input for its form; tensors that were there last time are not looked at."""
        if len(inputs) != len(self._last):
            raise ValueError(f"the fragment takes {len(self._last)} inputs, got {len(inputs)}")
        key = []
        for index, value in enumerate(inputs):
            reference, form_id = self._last[index]
            if reference() is not value or value is None:
                form_id = self._form_ids.setdefault(form_of(value), len(self._form_ids))
                if isinstance(value, torch.Tensor):
                    self._last[index] = (weakref.ref(value), form_id)
            key.append(form_id)
        return tuple(key)

    def _choose(self, key: tuple[int, ...], inputs: list[Any]) -> int:
        forms = tuple(map(form_of, inputs))
        if len(self._variant_of) > _MAX_REMEMBERED:
            self._variant_of.clear()
            self._form_ids.clear()
            self._last = [(lambda: None, 0)] * len(inputs)
            return self._choose(self._key(inputs), inputs)
        for number, (expected, _) in enumerate(self._variants):
            if expected.fit(forms):
                self._variant_of[key] = number
                return number
        if self._attempts >= _MAX_VARIANTS:
            self._variant_of[key] = _FLAT
        elif self._thread is None or not self._thread.is_alive():
            examples = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
            self._thread = threading.Thread(target=self._compile_more, args=(examples,), name="genie-inductor",
                                            daemon=True)
            self._thread.start()
        return _FLAT

    def _compile_more(self, examples: list[Any]) -> None:
        try:
            self.compile_for(examples)
        except UnsupportedGraphError as error:
            self._attempts = _MAX_VARIANTS
            log.warning("no further code for a fragment, other shapes run flat: %s", error)


def _standalone_compile(gm: torch.fx.GraphModule, examples: list[Any], fake_mode: Any) -> Callable[..., Any]:
    from torch._inductor import standalone_compile

    options = {"config_patches": {"fallback_random": True, "compile_threads": 1}}
    # Random ops stay aten's, so that a seed gives what eager gives; no pool of compiler processes outlives a worker.
    extra: dict[str, Any] = {}
    # The module is ours to give away, and a copy of it would turn constants of subgraphs into buffers.
    if "donate_graph_module" in inspect.signature(standalone_compile).parameters:
        extra["donate_graph_module"] = True
    else:
        # torch < 2.13 always copies. Every GraphModule has a class of its own, so this is about no other module.
        setattr(type(gm), "__deepcopy__", lambda self, _memo: self)  # noqa: B010 - mypy takes it for the base class
    with _compiling, ExitStack() as stack:
        stack.enter_context(_generators_left_alone())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(fake_mode)))
        artifact_log = logging.getLogger("torch._inductor.standalone_compile")
        level = artifact_log.level
        artifact_log.setLevel(logging.ERROR)  # it warns where code cannot be saved to disk, which nobody asked for
        stack.callback(artifact_log.setLevel, level)
        compiled: Callable[..., Any] = standalone_compile(
            gm, examples, dynamic_shapes="from_tracing_context", options=options, **extra
        )
    return compiled


@contextmanager
def _generators_left_alone() -> Iterator[None]:
    """Keep this thread from putting back the generator states it found.

    The compiler saves the global generators when it starts and restores them when it ends; meanwhile the worker's
    loop draws from them for its runs.
    """
    _thread.compiles = True
    with ExitStack() as stack:
        for module in (torch.random, torch.cuda):
            stack.enter_context(_unless_compiling(module, "set_rng_state"))
        try:
            yield
        finally:
            _thread.compiles = False


@contextmanager
def _unless_compiling(module: Any, name: str) -> Iterator[None]:
    original = getattr(module, name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not getattr(_thread, "compiles", False):
            return original(*args, **kwargs)
        return None

    setattr(module, name, guarded)
    try:
        yield
    finally:
        setattr(module, name, original)
