"""What `genie.explain` returns: plans as tables, as JSON, and as a page to look at."""
from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from genie_dynamo.passes.kept import How
from genie_dynamo.passes.partition import Alternative

SCHEMA_VERSION = 1

_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentRow:
    """One fragment of a plan.

    est_s, measured_s  compute seconds; measured is its worker's, shared out by estimate where it has several fragments
    bytes_in           values that come from other workers or from the client, parameters not counted
    bytes_out          values that other workers or the client get
    memory_bytes       parameters that it reads
    """

    fragment: int
    worker: str
    regions: tuple[str, ...]
    num_nodes: int
    est_s: float
    measured_s: float | None
    bytes_in: int
    bytes_out: int
    memory_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A fragment, or a transfer, on the estimated timeline of one call."""

    lane: str
    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossingRow:
    """A value of a forward that its backward reads on another worker than that which made it.

    how      "kept": that worker had it in the forward and keeps it; "moved": it is sent there for the backward;
             "again": the backward computes it there
    move_s   seconds of sending it, 0 where it is there anyway
    again_s  of computing it there with what that needs and is not there anyway; None where it must not be
    """

    value: str
    worker: str
    how: How
    size_bytes: int
    move_s: float
    again_s: float | None

    def __str__(self) -> str:
        again = "not to be computed twice" if self.again_s is None else f"computing it again takes {_ms(self.again_s)}"
        move = f"moving it takes {_ms(self.move_s)}" if self.move_s else "the forward has it there"
        return (f"{self.value} ({_size(self.size_bytes)}), read by the backward on {self.worker}: "
                f"{_HOW[self.how]}; {move}, {again}")


_HOW = {"kept": "kept there", "moved": "sent there by the forward", "again": "computed again there"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """One graph: its fragments, and how else it could have been placed."""

    label: str
    kind: str
    workload: str
    phase: str
    est_s: float
    measured_s: float | None
    fragments: tuple[FragmentRow, ...]
    alternatives: tuple[Alternative, ...]
    timeline: tuple[Span, ...]
    crossings: tuple[CrossingRow, ...] = ()
    unpriced: str = ""               # why there are no estimates

    def __str__(self) -> str:
        head = (f"{self.label}: {self.workload}, {self.phase}; estimated {_ms(self.est_s)}, "
                f"measured {_ms(self.measured_s)}")
        rows = [("fragment", "worker", "nodes", "estimated", "measured", "in", "out", "memory", "regions")]
        rows += [(str(f.fragment), f.worker, str(f.num_nodes), _ms(f.est_s), _ms(f.measured_s), _size(f.bytes_in),
                  _size(f.bytes_out), _size(f.memory_bytes), _short(f.regions)) for f in self.fragments]
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [head] + ["  " + "  ".join(cell.rjust(w) if 1 < k < 8 else cell.ljust(w)
                                           for k, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
                          for row in rows]
        lines += [f"  fragment {f.fragment} on {f.worker}: {f.why}" for f in self.fragments]
        lines += [f"  {row}" for row in self.crossings]
        if self.unpriced:
            lines.append(f"  no estimates: {self.unpriced}")
        if self.alternatives:
            lines.append("  considered:")
        for option in self.alternatives:
            mark = "*" if option.chosen else "-"
            reason = f" ({option.reason})" if option.reason else ""
            lines.append(f"    {mark} {option.name}: {_ms(option.est_s)}{reason}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The plans of every graph of a call, in the order in which they ran first."""

    graphs: tuple[GraphPlan, ...]
    workers: tuple[str, ...]
    policy: str
    fallbacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{len(self.graphs)} graph(s) on workers {', '.join(self.workers)}, policy {self.policy}"
        local = [f"runs locally: {reason}" for reason in self.fallbacks]
        return "\n\n".join(["\n".join([head, *local]), *map(str, self.graphs)])

    def to_json(self) -> str:
        """Everything, with "version" first."""
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)})

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs nothing else: fragments, timeline, alternatives of each graph."""
        body = "\n".join(_section(graph) for graph in self.graphs)
        fallbacks = "".join(f"<p class=local>Runs locally: {html.escape(reason)}</p>" for reason in self.fallbacks)
        Path(path).write_text(_PAGE.format(
            workers=html.escape(", ".join(self.workers)), policy=html.escape(self.policy), body=fallbacks + body))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} B"


def _short(regions: Sequence[str]) -> str:
    if not regions:
        return "-"
    return ", ".join(regions[:3]) + (f" and {len(regions) - 3} more" if len(regions) > 3 else "")


def _section(graph: GraphPlan) -> str:
    rows = "".join(
        f"<tr><td>{f.fragment}<td>{html.escape(f.worker)}<td>{f.num_nodes}<td>{_ms(f.est_s)}<td>{_ms(f.measured_s)}"
        f"<td>{_size(f.bytes_in)}<td>{_size(f.bytes_out)}<td>{_size(f.memory_bytes)}"
        f"<td class=left>{html.escape(', '.join(f.regions) or '-')}<td class=left>{html.escape(f.why)}</tr>"
        for f in graph.fragments)
    options = "".join(
        f"<li class={'chosen' if a.chosen else 'rejected'}>{html.escape(a.name)}: {_ms(a.est_s)}"
        f"{' (' + html.escape(a.reason) + ')' if a.reason else ''}</li>" for a in graph.alternatives)
    crossings = "".join(f"<li>{html.escape(str(row))}</li>" for row in graph.crossings)
    crossings = f"<h3>Between forward and backward</h3><ul>{crossings}</ul>" if crossings else ""
    unpriced = f"<p>No estimates: {html.escape(graph.unpriced)}</p>" if graph.unpriced else ""
    return (f"<section><h2>{html.escape(graph.label)}</h2>"
            f"<p>{html.escape(graph.workload)}, {html.escape(graph.phase)}; estimated {_ms(graph.est_s)}, "
            f"measured {_ms(graph.measured_s)}</p>{unpriced}{_timeline(graph)}<table>"
            "<tr><th>fragment<th>worker<th>nodes<th>estimated<th>measured<th>in<th>out<th>memory"
            f"<th class=left>regions<th class=left>why here</tr>{rows}</table>{crossings}"
            f"<h3>Considered</h3><ul>{options}</ul></section>")


def _timeline(graph: GraphPlan) -> str:
    """Lanes as rows, time to the right."""
    end_s = max((span.end_s for span in graph.timeline), default=0.0)
    if end_s <= 0:
        return ""
    lanes = list(dict.fromkeys(span.lane for span in graph.timeline))
    width, left, height = 900, 130, 30
    parts = [f'<text x="0" y="{row * height + 20}">{html.escape(lane)}</text>' for row, lane in enumerate(lanes)]
    for span in graph.timeline:
        row = lanes.index(span.lane)
        x = left + span.start_s / end_s * width
        length = max((span.end_s - span.start_s) / end_s * width, 1.0)
        color = _COLORS[row % len(_COLORS)]
        title = html.escape(f"{span.label}: {_ms(span.start_s)} to {_ms(span.end_s)}")
        parts.append(f'<rect x="{x:.1f}" y="{row * height + 4}" width="{length:.1f}" height="{height - 8}" '
                     f'fill="{color}" stroke="white"><title>{title}</title></rect>')
    bottom = len(lanes) * height + 16
    parts.append(f'<text x="{left}" y="{bottom}">0</text>'
                 f'<text x="{left + width}" y="{bottom}" text-anchor="end">{_ms(end_s)}, estimated</text>')
    return f'<svg viewBox="0 0 {left + width} {bottom + 6}" role="img">{"".join(parts)}</svg>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>genie plan</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100% }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #dde3ea; vertical-align: top }}
.left {{ text-align: left }}
svg {{ width: 100%; font-size: 13px }}
.chosen {{ font-weight: 600 }} .rejected, .local {{ color: #5b6876 }}
</style>
<h1>Where each graph runs, and why</h1>
<p>Workers {workers}; policy {policy}.</p>
{body}
</html>
"""
