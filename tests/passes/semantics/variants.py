"""Regions that are written otherwise than usual, and what looks like them and is none."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.passes.semantics.blocks import Attention, B, D, T


class AngleAttention(Attention):
    """Weights by the angle between queries and keys, without a softmax."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cosines = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-1, -2)
        return (1 - cosines.clamp(-0.9, 0.9).acos() / 3.14) ** 2 @ v


class LinearAttention(Attention):
    """Keys meet values first, so that the cost is linear in the positions."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (nn.functional.elu(q) + 1) @ ((nn.functional.elu(k) + 1).transpose(-1, -2) @ v)


class DecayingProducts(Attention):
    """Weights that decay with the distance as the input says: the dual form of a state space."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rates = k.mean(-1).cumsum(-1)
        decay = (rates[..., :, None] - rates[..., None, :]).tril().exp()
        return (q @ k.transpose(-1, -2) * decay) @ v


class Covariance(nn.Module):
    """Two products of the values themselves: no queries, keys or values are made."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (x.transpose(-1, -2) @ x)


class WrittenActivation(nn.Module):
    """An MLP whose activation is no op of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.register_buffer("edge", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(torch.where(y > 0, y * y + y, torch.expm1(torch.min(y, self.edge))))  # type: ignore[no-any-return]


class AdaptedGate(nn.Module):
    """A gated MLP whose first layer has an adapter of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(2 * D, D)
        self.narrow, self.wide = nn.Linear(D, 2, bias=False), nn.Linear(2, 4 * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = (self.up(x) + self.wide(self.narrow(x))).chunk(2, dim=-1)
        return self.down(nn.functional.gelu(gate) * value)  # type: ignore[no-any-return]


class NormalisedMLP(nn.Module):
    """A block whose activation is normalised before its second layer, without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 2 * D), nn.LayerNorm(2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


class PromptedLookup(nn.Module):
    """Ids behind a counted prompt: the table holds words, not positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(50, D), nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        prompt = torch.arange(3).repeat(ids.shape[0], 1)
        return self.linear(self.table(torch.cat([prompt, ids], 1)))  # type: ignore[no-any-return]


class PooledFrames(nn.Module):
    """The mean over the frames of a film, each a sequence of tokens."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=1)


class MeanOfHeads(Attention):
    """The weights of attention, on average over the heads."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v + weights.mean(dim=1).sum()


class PooledMask(nn.Module):
    """Which groups of positions hold anything."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, ::2] * self.pool(mask.float()).unsqueeze(-1)


class HashedLookup(nn.Module):
    """Ids are hashed into the rows of two tables; attention mixes what is found."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(32, D // 2), nn.Embedding(32, D // 2)
        self.attention = Attention()

    def forward(self, ids: Tensor) -> Tensor:
        found = [table((ids + 1) * prime % 32) for table, prime in ((self.first, 31), (self.second, 43))]
        return self.attention(torch.cat(found, -1))  # type: ignore[no-any-return]


class SinesTwice(nn.Module):
    """Angles that are computed once for the sines and again for the cosines."""

    def forward(self, x: Tensor) -> Tensor:
        positions, rates = torch.arange(T).float()[:, None], torch.arange(D // 2).float()[None] * 0.1
        return x + torch.stack([torch.sin(positions * rates), torch.cos(positions * rates)], -1).view(T, D)


def ids() -> dict[str, Tensor]:
    return {"ids": torch.randint(50, (B, T))}


def masked() -> dict[str, Tensor]:
    return {"x": torch.randn(B, T, D), "mask": torch.ones(B, T, dtype=torch.long)}


