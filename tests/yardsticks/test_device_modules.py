"""torch's module_db and optim_db on `remote_accelerator`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db
from torch.utils import _pytree as pytree

from tests.yardsticks.device_cases import DEVICE, back, there
from tests.yardsticks.harness import _quiet, assert_same, gradients, seed_everything, tensors_in
from tests.yardsticks.test_optim_db import IMPLEMENTATIONS, _chosen_options, _text, trained


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_module(info: ModuleInfo, training: bool) -> None:
    with _quiet():
        expected, actual = _module(info, training, "cpu"), _module(info, training, DEVICE)
    assert_same(actual, expected, where=info.name)


def _module(info: ModuleInfo, training: bool, device: str) -> Any:
    seed_everything()
    given = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=training,
                                    training=training)[0]
    constructor, forward = given.constructor_input, given.forward_input
    module = info.module_cls(*constructor.args, **constructor.kwargs).to(torch.float32).train(training)
    if info.is_lazy:
        module(*forward.args, **forward.kwargs)
    args, kwargs = forward.args, forward.kwargs
    if device == DEVICE:
        module = module.to(DEVICE)
        args, kwargs = pytree.tree_map(there, (args, kwargs))
    leaves = [t for t in (*tensors_in((args, kwargs)), *module.parameters()) if t.requires_grad]
    seed_everything()
    with torch.set_grad_enabled(training):
        outputs = module(*args, **kwargs)
    return pytree.tree_map(back, {"outputs": outputs, "gradients": gradients(outputs, leaves),
                                  "buffers": dict(module.named_buffers())})


def _optimizers() -> list[Any]:
    cases = []
    for info in optim_db:
        options = _chosen_options(info)
        chosen = [("forloop", o) for o in options]
        chosen += [(name, options[-1]) for name in IMPLEMENTATIONS[1:] if name in info.supported_impls]
        for implementation, given in chosen:
            name = f"{implementation}/{info.optim_cls.__name__}/{','.join(f'{k}={_text(v)}' for k, v in given.items())}"
            marks = [pytest.mark.xfail(strict=True, reason="sparse gradients do not travel")] \
                if info.only_supports_sparse_grads else []
            cases.append(pytest.param(info, implementation, given, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("info", "implementation", "options"), _optimizers())
def test_optimizer(info: OptimizerInfo, implementation: str, options: dict[str, Any]) -> None:
    expected, actual = (
        pytree.tree_map(back, trained(info, implementation, options, lambda step: step, device))
        for device in ("cpu", DEVICE))
    assert_same(actual, expected, where=info.optim_cls.__name__)
