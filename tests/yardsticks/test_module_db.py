"""torch's module_db through the backend: every module, inference and training, with buffers and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.testing._internal.common_modules import ModuleInfo, module_db

from tests.yardsticks.harness import Case, CompileFn, gradients, parametrize, seed_everything, tensors_in, unique


def cases() -> list[Case]:
    """Every case of this file."""
    return unique(_cases())


def _cases() -> Iterator[Case]:
    for info in module_db:
        for training in (False, True):
            yield _module_case(info, training)


def _module_case(info: ModuleInfo, training: bool) -> Case:
    mode = "training" if training else "inference"

    def observe(compile_fn: CompileFn) -> Any:
        seed_everything()
        module_input = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=training, training=training
        )[0]
        constructor, forward = module_input.constructor_input, module_input.forward_input
        module = info.module_cls(*constructor.args, **constructor.kwargs).to(torch.float32).train(training)
        if info.is_lazy:
            module(*forward.args, **forward.kwargs)  # the first call makes the parameters; Dynamo may come after it
        return _observe_module(module, forward.args, forward.kwargs, compile_fn)

    return Case(key=f"module_db/{mode}/{info.name}", observe=observe)


def _observe_module(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compile_fn: CompileFn
) -> dict[str, Any]:
    leaves = [tensor for tensor in (*tensors_in((args, kwargs)), *module.parameters()) if tensor.requires_grad]
    compiled = compile_fn(module)
    seed_everything()
    with torch.set_grad_enabled(module.training):
        outputs = compiled(*args, **kwargs)
    rng_state = torch.get_rng_state()
    return {
        "outputs": outputs,
        "gradients": gradients(outputs, leaves),
        "buffers": dict(module.named_buffers()),
        "rng": rng_state,
    }


@parametrize(cases())
def test_module(case: Case) -> None:
    case.run()
