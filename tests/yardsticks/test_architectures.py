"""Tiny models of many architectures: outputs, loss and every parameter's gradient against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.architectures import ARCHITECTURES, build, loss_of, output_tensors
from tests.yardsticks.harness import Case, CompileFn, parametrize, seed_everything, unique

KINDS = {"decoder", "encoder", "seq2seq", "vision", "multimodal", "audio", "moe", "state_space"}


def cases() -> list[Case]:
    """Every case of this file."""
    inference = (_inference_case(name) for name in ARCHITECTURES)
    training = (_training_case(name) for name in ARCHITECTURES)
    return unique((*inference, *training))


def _inference_case(name: str) -> Case:
    def observe(compile_fn: CompileFn) -> Any:
        model, inputs = build(name)
        with torch.no_grad():
            return output_tensors(compile_fn(model)(**inputs))

    return Case(key=f"architectures/inference/{name}", observe=observe)


def _training_case(name: str) -> Case:
    def observe(compile_fn: CompileFn) -> Any:
        model, inputs = build(name, training=True)
        seed_everything()  # dropout draws the same on both sides
        outputs = compile_fn(model)(**inputs)
        loss = loss_of(outputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": loss,
            "outputs": output_tensors(outputs),
            "gradients": {key: parameter.grad for key, parameter in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
        }

    fullgraph = not ARCHITECTURES[name].breaks_in_training
    return Case(key=f"architectures/training/{name}", observe=observe, fullgraph=fullgraph)


@pytest.mark.usefixtures("runs_on_workers")
@parametrize(cases())
def test_architecture(case: Case) -> None:
    case.run()


def test_every_kind_is_there() -> None:
    assert {architecture.kind for architecture in ARCHITECTURES.values()} == KINDS
    assert len(ARCHITECTURES) >= 30
