"""A small GPT over bytes: pre-norm blocks, causal attention, tied embeddings.

Shapes: B batch, T time, D width, H heads, V the 256 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BYTES = 256


class Block(nn.Module):
    """Attention and an MLP, each added to what came in."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (part.view(B, T, self.num_heads, -1).transpose(1, 2) for part in self._qkv(x_BTD).chunk(3, dim=-1))
        attention_dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q, k, v, dropout_p=attention_dropout, is_causal=True)
        x_BTD = x_BTD + self._drop(self.project(y_BHTK.transpose(1, 2).flatten(-2)))
        return x_BTD + self._drop(self.mlp(self.norm_2(x_BTD)))

    def _qkv(self, x_BTD: Tensor) -> Tensor:
        return self.qkv(self.norm_1(x_BTD))  # type: ignore[no-any-return]

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)


class TinyGPT(nn.Module):
    """Predicts the next byte; `forward` gives the mean loss of a batch."""

    def __init__(
        self, *, width: int = 64, num_layers: int = 2, num_heads: int = 4, context: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(NUM_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.logits(tokens_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Scores (B, T, V) of the byte that follows each position."""
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)
