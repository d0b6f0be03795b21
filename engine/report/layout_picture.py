"""A picture of the layout: which rank holds which part of the model.

Columns are pipeline stages, with the layers each holds above them; rows are tensor ranks, grouped by data (and context)
replica.  Reading along a row follows an activation through the pipeline; reading down a group lists the ranks that
share every matrix of a stage.  Replicas all look the same, so only the first few are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.distributed.topology import Topology
from engine.report.charts import NUM_COLORS, svg

WIDTH = 1000
LABELS = 128                    # pixels left of the first stage
HEADER, ROW, GAP = 74, 26, 14
MAX_ROWS = 16


def layout_picture(topology: Topology, stage_contents: Sequence[Sequence[str]]) -> str:
    """The layout as an `<svg>` element for a page that has `STYLE` of `engine.report.charts`.

    Args:
        topology: the degrees of the job.
        stage_contents: for each pipeline stage what it holds, such as `["embedding", "layers 0–9"]`.
    """
    replicas = [(data, context) for data in range(topology.data) for context in range(topology.context)]
    shown = replicas[:max(1, MAX_ROWS // topology.tensor)]
    column = (WIDTH - LABELS - 16) / topology.pipeline
    body = [part for stage, contents in enumerate(stage_contents) for part in _header(stage, contents, column)]
    top = HEADER
    for data, context in shown:
        body += _replica(topology, data, context, top, column, stage_contents)
        top += topology.tensor * ROW + GAP
    if len(shown) < len(replicas):
        body.append(f'<text x="{LABELS}" y="{top + 8}">and {len(replicas) - len(shown):,} more replicas, laid out '
                    "the same way</text>")
        top += 24
    return svg(WIDTH, top, f"Layout of {topology.world_size} ranks", body)


def _header(stage: int, contents: Sequence[str], column: float) -> list[str]:
    left, middle = LABELS + stage * column, LABELS + (stage + 0.5) * column
    lines = [f"stage {stage}", *contents] if column >= 84 else [str(stage)]
    return [f'<g><title>{escape(f"stage {stage}: " + ", ".join(contents))}</title>'
            f'<rect x="{left + 2:.1f}" y="4" width="{column - 4:.1f}" height="{HEADER - 12}" rx="6" '
            f'style="fill:var(--c{stage % NUM_COLORS});opacity:.14"/>',
            *(f'<text class="{"title" if i == 0 else "number"}" x="{middle:.1f}" y="{22 + 17 * i}" '
              f'text-anchor="middle">{escape(line)}</text>' for i, line in enumerate(lines[:3])),
            "</g>"]


def _replica(topology: Topology, data: int, context: int, top: int, column: float,
             stage_contents: Sequence[Sequence[str]]) -> list[str]:
    name = f"data {data}" + (f" · context {context}" if topology.context > 1 else "")
    parts = [f'<text class="number" x="12" y="{top + 17}">{name}</text>']
    for tensor in range(topology.tensor):
        y = top + tensor * ROW
        if topology.tensor > 1:
            parts.append(f'<text x="{LABELS - 8}" y="{y + 17}" '
                         f'text-anchor="end">tensor {tensor}</text>')
        for stage in range(topology.pipeline):
            rank = topology.rank(pipeline=stage, data=data, context=context, tensor=tensor)
            left = LABELS + stage * column
            text = f"rank {rank}" if column >= 60 else str(rank)
            hint = f"rank {rank}: {name}, tensor {tensor}, stage {stage} ({', '.join(stage_contents[stage])})"
            parts.append(f'<g><title>{escape(hint)}</title><rect x="{left + 2:.1f}" y="{y}" '
                         f'width="{column - 4:.1f}" height="{ROW - 3}" rx="4" '
                         f'style="fill:var(--c{stage % NUM_COLORS});opacity:.3"/><text class="number" '
                         f'x="{left + column / 2:.1f}" y="{y + 16}" text-anchor="middle">{text}</text></g>')
    return parts
