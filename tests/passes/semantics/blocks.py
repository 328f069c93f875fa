"""Small programs around one region each, and near misses: the same ops, put together otherwise."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genie_dynamo.passes.semantics.engine import EngineReport, run_patterns
from genie_dynamo.passes.semantics.patterns import BUILT_IN
from genie_dynamo.passes.semantics.reading import read_graph
from tests.models.captures import KINDS, compiled_captures, recorded_capture

B, T, D, H = 2, 6, 16, 4


def hidden() -> dict[str, Tensor]:
    return {"x": torch.randn(B, T, D)}


class Attention(nn.Module):
    """Self-attention in one of three forms."""

    def __init__(self, form: str = "fused", kv_heads: int = H) -> None:
        super().__init__()
        self.form, self.kv_heads = form, kv_heads
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = (nn.Linear(D, D // H * kv_heads) for _ in range(2))

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, D // H).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x if context is None else context
        q = self.heads(self.q(x), H)
        k, v = (self.heads(layer(y), self.kv_heads).repeat_interleave(H // self.kv_heads, dim=1)
                for layer in (self.k, self.v))
        return self.o(self.mix(q, k, v).transpose(1, 2).reshape(*x.shape))  # type: ignore[no-any-return]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.form == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.form == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2.0
            return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        if self.form == "baddbmm":
            flat = [t.reshape(B * H, -1, D // H) for t in (q, k, v)]
            bias = torch.zeros(B * H, flat[0].shape[1], flat[1].shape[1])
            scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), alpha=0.5)
            return torch.bmm(scores.softmax(-1), flat[2]).view(q.shape)
        return (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v


class SlidingWindow(Attention):
    """Keys at most four positions back."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        rows, columns = positions[:, None], positions[None, :]
        mask = (columns > rows - 4) & (columns <= rows)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Router(nn.Module):
    """Softmax over scores of a linear layer: not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.values = nn.Linear(D, 4), nn.Parameter(torch.randn(4, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x).softmax(-1) @ self.values  # type: ignore[no-any-return]


class AppendCache(Attention):
    """Keys and values after those of earlier calls."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Any:  # type: ignore[override]
        keys = torch.cat([keys, self.heads(self.k(x), H)], dim=2)
        values = torch.cat([values, self.heads(self.v(x), H)], dim=2)
        out = self.mix(self.heads(self.q(x), H), keys, values)
        return self.o(out.transpose(1, 2).reshape(*x.shape)), keys, values


class WriteCache(Attention):
    """Keys and values written into buffers of a fixed size, in place."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:  # type: ignore[override]
        keys.index_copy_(2, position, self.heads(self.k(x), H))
        values.index_copy_(2, position, self.heads(self.v(x), H))
        out = self.mix(self.heads(self.q(x), H), keys, values)
        return self.o(out.transpose(1, 2).reshape(*x.shape))  # type: ignore[no-any-return]


class LatentCache(Attention):
    """What is kept is what keys and values are made of by one more linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.k_up, self.v_up = nn.Linear(D, 6), nn.Linear(6, D), nn.Linear(6, D)

    def forward(self, x: Tensor, latent: Tensor) -> Any:  # type: ignore[override]
        latent = torch.cat([latent, self.down(x)], dim=1)
        keys, values = (self.heads(layer(latent), H) for layer in (self.k_up, self.v_up))
        out = self.mix(self.heads(self.q(x), H), keys, values)
        return self.o(out.transpose(1, 2).reshape(*x.shape)), latent


class ScratchKeys(Attention):
    """Keys written into fresh memory that nobody keeps."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.empty_like(k), torch.empty_like(v)
        keys.copy_(k)
        values.copy_(v)
        return F.scaled_dot_product_attention(q, keys, values)


class LearnedPrefix(Attention):
    """Keys after learned ones: a concatenation, and no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(1, H, 3, D // H))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        prefix = self.prefix.expand(x.shape[0], -1, -1, -1)
        keys, values = (torch.cat([prefix, self.heads(layer(x), H)], dim=2) for layer in (self.k, self.v))
        out = self.mix(self.heads(self.q(x), H), keys, values)
        return self.o(out.transpose(1, 2).reshape(*x.shape))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """linear, activation, linear; or gated."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up, self.gate, self.down = nn.Linear(D, 32), nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        inner = F.silu(self.gate(x)) * self.up(x) if self.gated else F.gelu(self.up(x))
        return x + self.down(inner)  # type: ignore[no-any-return]


class NormalisedGate(nn.Module):
    """A gated MLP whose product is normalised before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, 32), nn.Linear(D, 32), nn.Linear(32, D)
        self.norm = RootMeanSquare(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))  # type: ignore[no-any-return]


class PixelwiseMLP(nn.Module):
    """1x1 convolution, activation, 1x1 convolution; as a gate of channels it is none."""

    def __init__(self, *, gate: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = image.mean(dim=(2, 3), keepdim=True) if self.gate else image
        out = self.down(F.relu(self.up(x)))
        return image * out.sigmoid() if self.gate else image + out


class SplitExperts(nn.Module):
    """Each expert's rows times its own slice of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D, D))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(0, 1).split(B * T // 3)
        return torch.cat([F.linear(part, self.weight[i]) for i, part in enumerate(parts)])


class ConstantTable(nn.Module):
    """A buffer of sines, read by position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(T, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.index_select(0, torch.arange(T))  # type: ignore[operator]


class Lstm(nn.Module):
    """A recurrence whose state comes in, goes out, both or neither."""

    def __init__(self, *, kept: bool) -> None:
        super().__init__()
        self.kept, self.lstm = kept, nn.LSTM(D, D, batch_first=True)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        out, state = self.lstm(x, None if h is None or c is None else (h, c))
        return (out, *state) if self.kept else out


class Contrastive(nn.Module):
    """A loss that is written out; or a share of right answers, which is none."""

    def __init__(self, *, report: bool) -> None:
        super().__init__()
        self.report, self.linear = report, nn.Linear(D, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.linear(x)
        if self.report:
            return (scores.argmax(-1) == labels).float().mean()
        return -F.logsigmoid(scores * (labels[..., None] - 2)).sum(-1).mean()


class NormalisedTransform(nn.Module):
    """linear, activation, norm, linear: the transform of a head, no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(F.gelu(self.dense(x))))  # type: ignore[no-any-return]


class RootMeanSquare(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class InverseRoot(nn.Module):
    """A root of values, not of their mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.abs() + 1.0)


class Rotary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(T)[:, None] * torch.arange(1, D // 2 + 1)[None, :] * 0.1
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x[..., : D // 2], x[..., D // 2:]
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Mirrored(nn.Module):
    """Halves swapped and negated, and no rotation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x[..., D // 2:], x[..., : D // 2]], dim=-1) + 1.0


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(50, D), nn.Embedding(T, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.positions(torch.arange(T))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Top two of four, chosen by a router; every expert computes and unchosen ones count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        mask = torch.zeros(flat.shape[0], 4).scatter(1, chosen, weights)
        return flat[:, None, :] * mask[:, :, None]


class BestTokens(nn.Module):
    """The best of a distribution, returned: sampling, no routing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, 30)

    def forward(self, x: Tensor) -> Any:
        return tuple(self.head(x).softmax(-1).topk(3, dim=-1))


class Patches(nn.Module):
    def __init__(self, *, keep_image: bool) -> None:
        super().__init__()
        self.conv, self.keep_image = nn.Conv2d(3, D, 8, 8), keep_image

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        return F.relu(x) if self.keep_image else x.flatten(2).transpose(1, 2) + 1.0  # type: ignore[no-any-return]


class Pooled(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=self.dim)


class Head(nn.Module):
    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.linear, self.residual = nn.Linear(D, D), residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) if self.residual else self.linear(x)  # type: ignore[no-any-return]


class SelectiveScan(nn.Module):
    """h = exp(dt A) h + dt B x, over T steps."""

    def __init__(self, *, rates: bool = True) -> None:
        super().__init__()
        self.rates = rates
        self.into, self.step, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.log_rate = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        u = self.into(x)
        dt = F.softplus(self.step(u))
        decay = torch.exp(-torch.exp(self.log_rate) * dt) if self.rates else dt * 0.5
        h = torch.zeros(x.shape[0], D)
        states = []
        for t in range(T):
            h = decay[:, t] * h + dt[:, t] * u[:, t]
            states.append(h)
        return self.out(torch.stack(states, dim=1))  # type: ignore[no-any-return]


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x).flatten(0, 1), labels.flatten())


def reports(model: nn.Module, inputs: dict[str, Any]) -> dict[str, EngineReport]:
    """What the built-in patterns find in each capture, names stripped."""
    with torch.no_grad():
        captures = [*compiled_captures(model, inputs), recorded_capture(model, inputs, {"": model})]
    found = {}
    for capture in captures:
        view = read_graph(capture.gm, roles=capture.roles, names=False)
        found[capture.kind] = run_patterns(view, BUILT_IN, disable=_never)
    assert tuple(sorted(found)) == tuple(sorted(KINDS))
    return found


def _never(pattern: Any, reason: str) -> None:
    raise AssertionError(f"{pattern.name}: {reason}")


class Cells(nn.Module):
    """Recurrent cells that are written out: a loop over the steps of (batch, steps, features)."""

    def __init__(self, form: str, layers: int = 1) -> None:
        super().__init__()
        self.form, self.layers = form, layers
        wide = {"lstm": 4, "gru": 3}.get(form, 1)
        self.inputs, self.states = (nn.ModuleList(nn.Linear(D, wide * D) for _ in range(layers)) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(2 * D, 2 * D) for _ in range(layers))
        self.joined = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(layers))
        self.ops = nn.ModuleList(nn.LSTMCell(D, D) for _ in range(layers))

    def cell(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "op":
            return self.ops[layer](x, (h, c))  # type: ignore[no-any-return]
        if self.form == "joined":
            reset, update = self.gates[layer](torch.cat([x, h], -1)).sigmoid().chunk(2, -1)
            new = self.joined[layer](torch.cat([x, reset * h], -1)).tanh()
            return (1 - update) * new + update * h, c
        made, state = self.inputs[layer](x), self.states[layer](h)
        if self.form == "elman":
            return (made + state).tanh(), c
        if self.form == "gru":
            (a, b, d), (e, f, g) = made.chunk(3, -1), state.chunk(3, -1)
            reset, update = (a + e).sigmoid(), (b + f).sigmoid()
            return (1 - update) * (d + reset * g).tanh() + update * h, c
        i, f, g, o = (made + state).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        zeros = x.new_zeros(x.shape[0], D)
        states = [(zeros if h is None else h, zeros if c is None else c) for _ in range(self.layers)]
        steps = []
        for t in range(x.shape[1]):
            y = x[:, t]
            for layer in range(self.layers):
                states[layer] = self.cell(layer, y, *states[layer])
                y = states[layer][0]
            steps.append(y)
        out = torch.stack(steps, 1)
        return out if h is None else (out, states)


class SharedLayer(nn.Module):
    """One weight three times in a row, and nothing new between: a deep layer, no recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class Exponents(nn.Module):
    """A state whose exponent decays by a learned rate at each step, as in RWKV."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(3))
        self.rate = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        key, value, decay = self.key(x), self.value(x), -self.rate.exp()
        top, total = key[:, 0], value[:, 0]
        steps = [total]
        for t in range(1, x.shape[1]):
            new = torch.maximum(top + decay, key[:, t])
            total = (top + decay - new).exp() * total + (key[:, t] - new).exp() * value[:, t]
            top = new
            steps.append(total)
        return self.out(torch.stack(steps, 1))  # type: ignore[no-any-return]


class BatchedExperts(nn.Module):
    """Every expert computes on all tokens: batches of products with two stacks of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, D, 2 * D)), nn.Parameter(torch.randn(3, 2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(1, -1, D).repeat(3, 1, 1)
        return torch.bmm(torch.bmm(tokens, self.up).relu(), self.down).sum(0).view_as(x)


class BestExpert(nn.Module):
    """Each token goes to the one expert that scores best, found by a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.score(x.reshape(-1, D)).softmax(-1).max(-1, keepdim=True)
        return torch.zeros(B * T, 3).scatter(1, chosen, best)


class PowerNorm(nn.Module):
    """A root mean square whose root is a power."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)


class TwoMeans(nn.Module):
    """The mean over an image, side by side."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean(2, keepdim=True).mean(3, keepdim=True)


class AttributeTable(nn.Module):
    """Positions in a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(D, D), torch.randn(1, T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table
