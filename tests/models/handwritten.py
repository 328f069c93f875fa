"""Small models written for tests and benches: convolutional networks, recommenders, recurrences.

    model, inputs = build("dlrm")        # eval mode, keyword arguments of forward

Class names say what a part is, so that ground truth can be read off them. Weights and inputs depend on the name alone.
"""
from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 4


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ConvStage(nn.Module):
    """Two blocks at half the resolution, the second residual."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down, self.body = ConvBlock(inputs, outputs, stride=2), ConvBlock(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.body(x)


class Backbone(nn.Module):
    """Four stages; returns the last three."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ConvStage(a, b) for a, b in ((3, 8), (8, 16), (16, 24), (24, 32)))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[1:]


class ResidualNet(nn.Module):
    """An image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.classifier = Backbone(), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.backbone(image)[-1].mean(dim=(2, 3))
        return self.classifier(pooled)  # type: ignore[no-any-return]


class Neck(nn.Module):
    """A feature pyramid: laterals, upsampling, sums, smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.laterals, levels, strict=True)]
        for index in (1, 0):
            merged[index] = merged[index] + F.interpolate(merged[index + 1], scale_factor=2.0, mode="nearest")
        return [smooth(x) for smooth, x in zip(self.smooth, merged, strict=True)]


class DetectionHead(nn.Module):
    """Classes and boxes for one level; shared over levels."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Conv2d(16, 16, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(16, 5, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.tower(x))
        return self.classes(x), self.boxes(x)


class Detector(nn.Module):
    """Backbone, neck and head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = Backbone(), Neck(), DetectionHead()

    def forward(self, image: Tensor) -> list[Tensor]:
        return [out for level in self.neck(self.backbone(image)) for out in self.head(level)]


class TowerMLP(nn.Module):
    """Linear layers with ReLU between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == 0 else layer(F.relu(x))
        return x


class DLRM(nn.Module):
    """Bags of sparse ids, a bottom tower over dense features, dot products of all pairs, a top tower."""

    def __init__(self, tables: int = 4, width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(100, width, mode="sum") for _ in range(tables))
        self.bottom = TowerMLP(13, 16, width)
        pairs = (tables + 1) * tables // 2
        self.top, self.classifier = TowerMLP(width + pairs, 16, 16), nn.Linear(16, 1)
        rows, columns = torch.tril_indices(tables + 1, tables + 1, offset=-1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, dense: Tensor, sparse: Tensor, offsets: Tensor) -> Tensor:
        x = F.relu(self.bottom(dense))
        features = torch.stack([x, *(bag(sparse[i], offsets[i]) for i, bag in enumerate(self.bags))], dim=1)
        products = features @ features.transpose(1, 2)
        flat = products[:, self.rows, self.columns]
        return torch.sigmoid(self.classifier(F.relu(self.top(torch.cat([x, flat], dim=1)))))


class WideAndDeep(nn.Module):
    """A linear model over ids beside a tower over their embeddings."""

    def __init__(self, fields: int = 6, width: int = 8) -> None:
        super().__init__()
        self.wide = nn.Embedding(600, 1)
        self.deep = nn.Embedding(600, width)
        self.tower = TowerMLP(fields * width + 4, 32, 16, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        wide = self.wide(ids).sum(dim=1)
        deep = self.tower(torch.cat([self.deep(ids).flatten(1), dense], dim=1))
        return torch.sigmoid(wide + deep)


class DeepFM(nn.Module):
    """A factorisation machine and a tower over the same embeddings."""

    def __init__(self, fields: int = 6, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Embedding(600, 1)
        self.factors = nn.Embedding(600, width)
        self.tower = TowerMLP(fields * width, 32, 16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.factors(ids)
        pairs = 0.5 * (e.sum(dim=1).pow(2) - e.pow(2).sum(dim=1)).sum(dim=1, keepdim=True)
        return torch.sigmoid(self.linear(ids).sum(dim=1) + pairs + self.tower(e.flatten(1)))


class LstmLanguageModel(nn.Module):
    """Embedding, two LSTM layers, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.lm_head = nn.Embedding(96, 16), nn.LSTM(16, 24, 2, batch_first=True), \
            nn.Linear(24, 96)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.lstm(self.embed(input_ids))[0])  # type: ignore[no-any-return]


class RNNCell(nn.Module):
    """h' = tanh(W x + U h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.of_input(x) + self.of_state(h))


class ElmanLanguageModel(nn.Module):
    """A recurrence that is written out step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.lm_head = nn.Embedding(96, 16), RNNCell(16), nn.Linear(16, 96)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = torch.zeros(x.shape[0], x.shape[2])
        states = []
        for step in range(input_ids.shape[1]):
            h = self.cell(x[:, step], h)
            states.append(h)
        return self.lm_head(torch.stack(states, dim=1))  # type: ignore[no-any-return]


class Regression(nn.Module):
    """Dense layers alone: no workload that has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.score = TowerMLP(8, 16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(F.relu(self.tower(x)))  # type: ignore[no-any-return]


def _image() -> dict[str, Any]:
    return {"image": torch.randn(2, 3, 64, 64)}


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(96, (2, 6))}


def _dlrm() -> dict[str, Any]:
    return {"dense": torch.randn(BATCH, 13), "sparse": torch.randint(100, (4, 12)),
            "offsets": torch.arange(0, 12, 3).repeat(4, 1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str]] = {
    "residual_net": (ResidualNet, _image, "vision"),
    "detector": (Detector, _image, "vision"),
    "dlrm": (DLRM, _dlrm, "recsys"),
    "wide_and_deep": (WideAndDeep, lambda: {"ids": torch.randint(600, (BATCH, 6)), "dense": torch.randn(BATCH, 4)},
                      "recsys"),
    "deep_fm": (DeepFM, lambda: {"ids": torch.randint(600, (BATCH, 6))}, "recsys"),
    "lstm_lm": (LstmLanguageModel, _tokens, "llm"),
    "elman_lm": (ElmanLanguageModel, _tokens, "llm"),
    "regression": (Regression, lambda: {"x": torch.randn(BATCH, 8)}, "unknown"),
}
"""Name -> (class, inputs, workload)."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode with reproducible weights, and the arguments of one call."""
    make, inputs, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return make().eval(), inputs()
