"""A network of one hidden layer in numpy: a kind for each node, and how sure. Data, no code: npz without pickle."""
from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.passes.semantics.learned.features import NUM_FEATURES, Array

MAX_FILE_BYTES = 1 << 20
_FIELDS = ("w1", "b1", "w2", "b2")
_SAME = 0.98             # cosine from which on two nodes look the same
MOST_CONFIRMED = 512
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """softmax(relu(x W1 + b1) W2 + b2).

    Shapes: w1 (NUM_FEATURES, H), b1 (H), w2 (H, K), b2 (K) for K kinds; the kind "" is "none of them". confirmed
    (M, NUM_FEATURES) are examples that somebody confirmed, confirmed_kinds (M) what they are: an index into kinds.
    """

    kinds: tuple[str, ...]
    w1: Array
    b1: Array
    w2: Array
    b2: Array
    confirmed: Array = field(default_factory=lambda: np.zeros((0, NUM_FEATURES), np.float32))
    confirmed_kinds: Labels = field(default_factory=lambda: np.zeros(0, np.int64))

    def probabilities(self, features: Array) -> Array:
        """(N, K) from features (N, NUM_FEATURES)."""
        hidden = np.maximum(features @ self.w1 + self.b1, 0.0)
        found = _softmax(hidden @ self.w2 + self.b2)
        if len(self.confirmed):
            which, cosine = _nearest(features, self.confirmed)
            same = cosine >= _SAME
            found[same] = np.eye(len(self.kinds), dtype=np.float32)[self.confirmed_kinds[which[same]]]
        return found

    def to_bytes(self) -> bytes:
        """One npz file, half precision."""
        arrays: dict[str, Any] = {name: getattr(self, name).astype(np.float16) for name in _FIELDS}
        file = io.BytesIO()
        np.savez(file, kinds=np.array(self.kinds), confirmed=self.confirmed.astype(np.float16),
                 confirmed_kinds=self.confirmed_kinds, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Network:
        """The inverse of `to_bytes`.

        Raises: ConfigError for what is too large, something else, or of another set of features.
        """
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{len(content)} bytes are no classifier: it has at most {MAX_FILE_BYTES}")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as data:
                arrays = {name: data[name].astype(np.float32) for name in _FIELDS}
                arrays["confirmed"] = data["confirmed"].astype(np.float32)
                chosen = data["confirmed_kinds"].astype(np.int64)
                kinds = tuple(str(kind) for kind in data["kinds"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as exc:
            raise ConfigError(f"this is no classifier: {exc}") from exc
        network = cls(kinds=kinds, confirmed_kinds=chosen, **arrays)
        hidden = network.b1.shape[0] if network.b1.ndim == 1 else -1
        shapes = {"w1": (NUM_FEATURES, hidden), "b1": (hidden,), "w2": (hidden, len(kinds)), "b2": (len(kinds),),
                  "confirmed": (len(chosen), NUM_FEATURES)}
        wrong = [name for name in shapes if getattr(network, name).shape != shapes[name]]
        if wrong:
            raise ConfigError(f"this classifier was trained with other features or kinds: {wrong[0]} has shape "
                              f"{getattr(network, wrong[0]).shape}, expected {shapes[wrong[0]]}; train it anew")
        if not all(0 <= kind < len(kinds) for kind in chosen.tolist()):
            raise ConfigError("this classifier has confirmed examples of kinds that it does not know")
        return network


def train(features: Array, labels: Labels, kinds: Sequence[str], *, weights: Array | None = None, hidden: int = 48,
          epochs: int = 6, seed: int = 0) -> Network:
    """Fit a network from nothing.

    Args:  features: (N, NUM_FEATURES).  labels: (N) indices into `kinds`.  weights: (N) of the examples.
    """
    random = np.random.default_rng(seed)
    start = Network(
        kinds=tuple(kinds), b1=np.zeros(hidden, np.float32), b2=np.zeros(len(kinds), np.float32),
        w1=random.normal(0, (2 / 16) ** 0.5, (NUM_FEATURES, hidden)).astype(np.float32),
        w2=random.normal(0, (1 / hidden) ** 0.5, (hidden, len(kinds))).astype(np.float32))
    return _descend(start, features, labels, weights, epochs=epochs, rate=3e-3, decay=1e-4, batch=256, random=random)


def remember(network: Network, features: Array, labels: Labels) -> Network:
    """A network that answers as confirmed for these examples and for what looks like them, and else as before.

    (To train the weights further on a few examples would change a third of all other answers.) The oldest beyond
    MOST_CONFIRMED are forgotten.

    Args:  features: (N, NUM_FEATURES) of confirmed nodes.  labels: (N) indices into `network.kinds`.
    """
    kept = _nearest(network.confirmed, features)[1] < _SAME if len(features) else np.ones(0, np.bool_)
    rows = np.concatenate([network.confirmed[kept], features])[-MOST_CONFIRMED:]
    kinds = np.concatenate([network.confirmed_kinds[kept], labels])[-MOST_CONFIRMED:]
    return replace(network, confirmed=rows, confirmed_kinds=kinds)


def _nearest(features: Array, others: Array) -> tuple[Labels, Array]:
    """For each row the other row in the most similar direction, and the cosine between them."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    cosines = unit @ (others / np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-9)).T
    return cosines.argmax(axis=1), cosines.max(axis=1)


def _descend(network: Network, features: Array, labels: Labels, weights: Array | None, *, epochs: int, rate: float,
             decay: float, batch: int, random: np.random.Generator) -> Network:
    """Adam with weight decay over shuffled batches."""
    values = {name: getattr(network, name).copy() for name in _FIELDS}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    scale = np.ones(len(labels), np.float32) if weights is None else weights / weights.mean()
    step = 0
    for epoch in range(epochs):
        pace = rate * (1 - epoch / epochs)
        order = random.permutation(len(labels))
        for start in range(0, len(order), batch):
            rows = order[start:start + batch]
            step += 1
            gradients = _gradients(values, features[rows], labels[rows], scale[rows])
            for name, gradient in gradients.items():
                first[name] += 0.1 * (gradient - first[name])
                second[name] += 0.001 * (gradient**2 - second[name])
                moved = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
                values[name] -= pace * (moved + decay * values[name])
    return Network(kinds=network.kinds, **values)


def _gradients(values: dict[str, Array], x: Array, labels: Labels, scale: Array) -> dict[str, Array]:
    hidden = np.maximum(x @ values["w1"] + values["b1"], 0.0)
    error = _softmax(hidden @ values["w2"] + values["b2"])
    error[np.arange(len(labels)), labels] -= 1.0
    error *= (scale / len(labels))[:, None]
    below = (error @ values["w2"].T) * (hidden > 0)
    return {"w1": x.T @ below, "b1": below.sum(axis=0), "w2": hidden.T @ error, "b2": error.sum(axis=0)}


def _softmax(scores: Array) -> Array:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float32)
