"""Semantic graphs for people: a table, Graphviz text, one self-contained HTML page. Text in, text out."""
from __future__ import annotations

import html
from collections.abc import Sequence

from genie_dynamo.core.semantics import Region, SemanticGraph

_COLOURS = {
    "attention": "#4e79a7", "kv_cache": "#a0cbe8", "mlp": "#f28e2b", "gated_mlp": "#ffbe7d", "moe_router": "#b07aa1",
    "moe_experts": "#d4a6c8", "embedding": "#59a14f", "norm": "#bab0ac", "positional": "#8cd17d",
    "logits_head": "#e15759", "conv_stage": "#499894", "patch_embedding": "#86bcb6", "pooling": "#d7b5a6",
    "modality_encoder": "#79706e", "fusion": "#ff9d9a", "state_space": "#f1ce63", "recurrent": "#b6992d",
    "loss": "#d37295", "optimizer_update": "#9d7660"}
_OTHER_COLOUR = "#cccccc"


def table(graph: SemanticGraph) -> str:
    """The graph as a table; a region that is not trusted is marked with `?`."""
    header = f"{graph.workload} (confidence {graph.confidence:.2f}: {graph.reason}), {graph.phase}"
    modalities = ", ".join(graph.modalities) or "none known"
    covered = len({name for region in graph.regions for name in region.nodes})
    lines = [header, f"modalities: {modalities}",
             f"{len(graph.regions)} regions over {covered} of {graph.num_nodes} nodes"]
    if graph.phase_rule is not None and graph.phase_rule.symbolic:
        rule = graph.phase_rule
        lines.append(f"phase by call: {rule.query_length} new tokens on {rule.past_length} kept")
    lines.append(f"{'region':<22}{'sure':>5} {'nodes':>7}{'MFLOP':>10}{'MB':>9}{'FLOP/B':>8}  {'modality':<11}"
                 "what, where")
    lines += [_row(region) for region in graph.regions]
    lines += [f"warning: {warning}" for warning in graph.warnings]
    return "\n".join(lines)


def _row(region: Region) -> str:
    flops = f"{region.flops / 1e6:.2f}" if region.flops is not None else "-"
    moved = f"{region.bytes_moved / 1e6:.2f}" if region.bytes_moved is not None else "-"
    ratio = region.arithmetic_intensity
    mark = "" if region.trusted else "?"
    what = " ".join(f"{name}={value}" for name, value in region.annotations)
    where = " @ " + region.module_path if region.module_path else ""
    intensity = "-" if ratio is None else f"{ratio:.1f}"
    return (f"{region.region_id:<22}{region.confidence:>5.2f}{mark:<1}{len(region.nodes):>7}{flops:>10}{moved:>9}"
            f"{intensity:>8}  {region.modality:<11}{what}{where}")


def dot(graph: SemanticGraph) -> str:
    """Regions inside their containers, and which reads values of which, as Graphviz text."""
    lines = ["digraph semantics {", "  rankdir=TB; node [shape=box, style=filled, fontname=Helvetica];"]
    containers = {region.parent for region in graph.regions if region.parent}
    meeting = {name for flow in graph.flows for name in flow}
    for region in graph.regions:
        if region.region_id in containers:
            lines.append(f'  subgraph "cluster_{region.region_id}" {{ label="{_quoted(_title(region))}";')
            inside = [r for r in graph.regions if r.parent == region.region_id and r.region_id not in containers]
            inside += [region] if region.region_id in meeting else []
            lines += [f"    {_node(child)}" for child in inside]
            lines.append("  }")
        elif not region.parent:
            lines.append(f"  {_node(region)}")
    lines += [f'  "{maker}" -> "{reader}";' for maker, reader in graph.flows]
    return "\n".join([*lines, "}"]) + "\n"


def _node(region: Region) -> str:
    colour = _COLOURS.get(region.kind, _OTHER_COLOUR)
    return f'"{region.region_id}" [label="{_quoted(_title(region))}", fillcolor="{colour}"];'


def _title(region: Region) -> str:
    variant = region.annotation("variant") or region.annotation("operation")
    parts = [region.region_id, str(variant) if variant else "", region.module_path]
    return "\n".join(part for part in parts if part)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


_STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
h1{font-size:1.4rem;margin:0}p.why{color:#555;margin:.2rem 0 1.2rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.2rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}.k{display:inline-block;width:.8rem;height:.8rem;margin-right:.4rem;border-radius:2px}
td:first-child{white-space:nowrap}.legend{margin:0 0 1.2rem;color:#555}.legend span+span{margin-left:1rem}
.legend .k{margin-right:.3rem}
.strip{display:flex;height:2.2rem;margin:0 0 .5rem;border-radius:4px;overflow:hidden}.strip span{min-width:2px}
.doubt{color:#a40000}details>summary{cursor:pointer}code{font-size:12px;color:#555;overflow-wrap:anywhere}"""


def page(graph: SemanticGraph) -> str:
    """One HTML page with everything in it: nothing is loaded from anywhere."""
    title = html.escape(f"{graph.workload}, {graph.phase}")
    why = html.escape(f"confidence {graph.confidence:.2f}: {graph.reason}; modalities: "
                      f"{', '.join(graph.modalities) or 'none known'}; {graph.num_nodes} nodes")
    warnings = "".join(f'<p class="doubt">{html.escape(warning)}</p>' for warning in graph.warnings)
    rows = "".join(_html_row(region) for region in graph.regions)
    head = "<th>region</th>" + "".join(f'<th class="n">{name}</th>' for name in ("sure", "nodes", "MFLOP", "MB"))
    head += "".join(f"<th>{name}</th>" for name in ("modality", "module", "what and why"))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p class=\"why\">{why}</p>"
            f"{_strip(graph.regions)}{warnings}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"</body></html>\n")


def _strip(regions: Sequence[Region]) -> str:
    """The graph from front to back, one block a region, as wide as it has nodes."""
    blocks = "".join(
        f'<span style="flex:{len(region.nodes)};background:{_COLOURS.get(region.kind, _OTHER_COLOUR)}" '
        f'title="{html.escape(_title(region), quote=True)}"></span>'
        for region in regions if region.kind not in ("modality_encoder", "fusion"))
    kinds = dict.fromkeys(region.kind for region in regions)
    legend = "".join(f'<span><span class="k" style="background:{_COLOURS.get(kind, _OTHER_COLOUR)}"></span>'
                     f"{html.escape(kind)}</span> " for kind in kinds)
    return f'<div class="strip">{blocks}</div><p class="legend">{legend}</p>'


def _short(value: float) -> str:
    """Three digits, without an exponent where it is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _html_row(region: Region) -> str:
    colour = _COLOURS.get(region.kind, _OTHER_COLOUR)
    flops = "&ndash;" if region.flops is None else _short(region.flops / 1e6)
    moved = "&ndash;" if region.bytes_moved is None else _short(region.bytes_moved / 1e6)
    what = html.escape(", ".join(f"{name} {value}" for name, value in region.annotations))
    nodes = html.escape(" ".join(region.nodes))
    doubt = "" if region.trusted else ' class="doubt"'
    numbers = "".join(f'<td class="n">{text}</td>' for text in (
        f"{region.confidence:.2f}", len(region.nodes), flops, moved))
    return (f'<tr{doubt}><td><span class="k" style="background:{colour}"></span>{html.escape(region.region_id)}</td>'
            f'{numbers}<td>{html.escape(region.modality)}</td>'
            f"<td>{html.escape(region.module_path)}</td><td><details><summary>{what or html.escape(region.reason)}"
            f"</summary>{html.escape(region.reason)}<br><code>{nodes}</code></details></td></tr>")
