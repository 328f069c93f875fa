"""What a graph means, as plain frozen data: regions, phase, modalities, workload. No torch.

JSON schema, version 2 (`to_json`, `from_json`): an object with the fields of `SemanticGraph` and "schema": 2. Guards
stand by kind, {"TENSOR_MATCH": ["L['x']", ...]}, since there are thousands (version 1 had a list of triples). A field
that a later version adds has a default here, one that it drops or renames gets a step in `_MIGRATIONS`; a document of a
newer version than this release knows is refused.
"""
from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.plan import GuardFacts

SCHEMA_VERSION = 2
TRUSTED_CONFIDENCE = 0.7
ASSISTED_DECODE_TOKENS = 16

REGION_KINDS = (
    "attention", "kv_cache", "mlp", "gated_mlp", "moe_router", "moe_experts", "embedding", "norm", "positional",
    "logits_head", "conv_stage", "patch_embedding", "pooling", "modality_encoder", "fusion", "state_space",
    "recurrent", "loss", "optimizer_update")
WORKLOADS = ("llm", "vision", "recsys", "multimodal", "audio", "unknown")
PHASES = ("prefill", "decode", "forward", "backward", "optimizer")

Scalar = str | int | float | bool
Dim = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes that form one thing that a person would name.

    Fields:  region_id: unique in its graph, such as "attention.3".  nodes: names in topological order.
             flops, bytes_moved: of one call at the captured sizes; None where nobody counted them.
             annotations: what the pattern adds, such as ("variant", "cross") or ("window", 4096).
             parent: the container (modality encoder, stage) that holds it, or "".
    """

    region_id: str
    kind: str
    nodes: tuple[str, ...]
    confidence: float
    reason: str
    pattern: str = ""
    module_path: str = ""
    modality: str = ""
    phase: str = "forward"
    flops: float | None = None
    bytes_moved: float | None = None
    annotations: tuple[tuple[str, Scalar], ...] = ()
    parent: str = ""

    @property
    def trusted(self) -> bool:
        """False: too uncertain to act on; placement treats the nodes as ordinary ones."""
        return self.confidence >= TRUSTED_CONFIDENCE

    @property
    def arithmetic_intensity(self) -> float | None:
        """FLOPs per byte moved; None where one of them is unknown."""
        if self.flops is None or not self.bytes_moved:
            return None
        return self.flops / self.bytes_moved

    def annotation(self, name: str, default: Scalar | None = None) -> Scalar | None:
        return dict(self.annotations).get(name, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRule:
    """Prefill or decode as a predicate over the sizes of one call.

    decode  the cache holds earlier tokens and the call adds one, or up to ASSISTED_DECODE_TOKENS (a draft that is
            checked: assisted decode)
    prefill everything else that fills a cache: a prompt into an empty cache (also a prompt of one token), and the
            later pieces of a long prompt (chunked prefill)

    A static cache has one size however full it is. There a single token counts as decode, since it costs what a decode
    step costs, and several count as prefill.
    """

    query_length: Dim
    past_length: Dim = 0           # tokens in the cache before the call; of a static cache its capacity
    static_cache: bool = False

    @property
    def symbolic(self) -> bool:
        """Whether the answer may differ between calls of one graph."""
        return isinstance(self.query_length, str) or isinstance(self.past_length, str)

    def phase(self, sizes: Mapping[str, int] | None = None) -> str:
        """The phase of a call.

        Args:   sizes: symbol -> size in this call.
        Raises: KeyError for a symbol that `sizes` lacks.
        """
        query = self._size(self.query_length, sizes or {})
        past = self._size(self.past_length, sizes or {})
        if self.static_cache:
            return "decode" if query == 1 else "prefill"
        return "decode" if past > 0 and query <= ASSISTED_DECODE_TOKENS else "prefill"

    @staticmethod
    def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
        return dim if isinstance(dim, int) else sizes[dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticGraph:
    """The regions of a graph, and what they make it.

    Fields:  confidence: of the workload.  warnings: what is uncertain and why, and patterns that were disabled.
             flows: (region that makes a value, region that reads it), by their ids.  guards: ordered by kind.
             phase_rule: where the graph keeps a cache. `phase` is its answer for the captured call.
    """

    workload: str = "unknown"
    confidence: float = 0.0
    phase: str = "forward"
    modalities: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    guards: GuardFacts = field(default_factory=GuardFacts)
    warnings: tuple[str, ...] = ()
    phase_rule: PhaseRule | None = None
    reason: str = ""
    num_nodes: int = 0
    flows: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.guards.guards, key=lambda guard: guard[1]))
        object.__setattr__(self, "guards", replace(self.guards, guards=ordered))

    def of_kind(self, kind: str) -> tuple[Region, ...]:
        return tuple(region for region in self.regions if region.kind == kind)

    def phase_at(self, sizes: Mapping[str, int]) -> str:
        """The phase of a call with these sizes of the graph's symbols."""
        return self.phase if self.phase_rule is None else self.phase_rule.phase(sizes)

    def to_json(self) -> str:
        """The graph as JSON, one line; see the schema above."""
        document = {name: getattr(self, name) for name in _SIMPLE_FIELDS}
        document["schema"] = SCHEMA_VERSION
        document["regions"] = [_region_document(region) for region in self.regions]
        guards = self.guards
        document["guards"] = {
            "guards": _by_kind(guards.guards), "ranges": guards.ranges, "expression": guards.expression}
        rule = self.phase_rule
        document["phase_rule"] = None if rule is None else {
            "query_length": rule.query_length, "past_length": rule.past_length, "static_cache": rule.static_cache}
        return _ENCODER.encode(document)

    @classmethod
    def from_json(cls, text: str) -> SemanticGraph:
        """The graph behind `to_json`, also of an older release.

        Raises: ConfigError for what is not such a document, or one of a newer release.
        """
        try:
            document = json.loads(text)
            version = document.pop("schema")
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(f"not a semantic graph: {exc!r:.200}") from exc
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ConfigError(f"a semantic graph of schema {version!r}; this release reads up to {SCHEMA_VERSION}: "
                              "update genie-dynamo", version=version)
        try:
            for step in range(version, SCHEMA_VERSION):
                document = _MIGRATIONS[step](document)
            return cls(**_values(document))
        except (TypeError, KeyError, AttributeError, ValueError) as exc:
            raise ConfigError(f"a semantic graph of schema {version} with wrong fields: {exc}") from exc

    def to_dot(self) -> str:
        """Regions and the values between them, as Graphviz text."""
        from genie_dynamo.core.semantics_report import dot

        return dot(self)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page to look at."""
        from genie_dynamo.core.semantics_report import page

        Path(path).write_text(page(self), encoding="utf-8")

    def __str__(self) -> str:
        from genie_dynamo.core.semantics_report import table

        return table(self)


def _by_kind(guards: Iterable[Sequence[str]]) -> dict[str, list[str | tuple[str, str]]]:
    """Kind -> sources; a guard with code of its own is a pair of both."""
    found: dict[str, list[str | tuple[str, str]]] = {}
    for kind, group in itertools.groupby(guards, key=_KIND):
        found.setdefault(kind, []).extend([(source, code) if code else source for source, _, code in group])
    return found


def _guards_by_kind(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 to 2."""
    guards = document["guards"]
    return {**document, "guards": {**guards, "guards": _by_kind(guards["guards"])}}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _guards_by_kind}
"""Schema version -> how a document of it becomes one of the next."""

_SIMPLE_FIELDS = tuple(f.name for f in fields(SemanticGraph) if f.name not in ("regions", "guards", "phase_rule"))
_REGION_FIELDS = tuple(f.name for f in fields(Region))
_REGION_VALUES = operator.attrgetter(*_REGION_FIELDS)
_KIND = operator.itemgetter(1)
_ENCODER = json.JSONEncoder(check_circular=False, separators=(",", ":"))     # a tree of plain values


def _region_document(region: Region) -> dict[str, Any]:
    return dict(zip(_REGION_FIELDS, _REGION_VALUES(region), strict=True))


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _tuples(value) for name, value in document.items()}
    values["regions"] = tuple(
        Region(**{name: _tuples(value) for name, value in region.items()}) for region in document["regions"])
    guards = {name: _tuples(value) for name, value in document["guards"].items() if name != "guards"}
    guards["guards"] = tuple((source, kind, "") if isinstance(source, str) else (source[0], kind, source[1])
                             for kind, sources in document["guards"]["guards"].items() for source in sources)
    values["guards"] = GuardFacts(**guards)
    rule = document["phase_rule"]
    values["phase_rule"] = None if rule is None else PhaseRule(**rule)
    return values


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
