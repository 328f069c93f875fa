"""Models of equal stages, for pipelines of micro-batches in tests and benches."""
from __future__ import annotations

from torch import Tensor, nn


class Decoder(nn.Module):
    """Layers of causal attention and a feed-forward net: ids (rows, length) -> logits (rows, length, vocabulary)."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, vocabulary: int = 97) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
            "mlp": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))}) for _ in range(layers))
        self.head: nn.Module = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for layer in self.layers:
            rows, length, width = h.shape
            heads = layer["qkv"](layer["norm"](h)).view(rows, length, 3, self.heads, width // self.heads)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + layer["out"](mixed.transpose(1, 2).reshape(rows, length, width))
            h = h + layer["mlp"](h)
        out: Tensor = self.head(h)
        return out


class LastState(Decoder):
    """The same without logits: (rows, width), the normalised state of the last position."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__(layers, width, heads, vocabulary)
        self.head = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, -1]


def convolutions(layers: int = 4, width: int = 24, classes: int = 10, *, halve: bool = False) -> nn.Sequential:
    """Convolutions with batch norm, pooled and classified; `halve`: the first one halves the resolution."""
    stages = [layer for k in range(layers) for layer in (
        nn.Conv2d(3 if k == 0 else width, width, 3, stride=2 if halve and k == 0 else 1, padding=1),
        nn.BatchNorm2d(width), nn.ReLU())]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
