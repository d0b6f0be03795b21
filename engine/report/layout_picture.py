"""A picture of the layout: which rank holds which part of the model.

Columns are pipeline stages, with the layers each holds above them; rows are tensor ranks, grouped by data (and context)
replica.  Reading along a row follows an activation through the pipeline; reading down a group lists the ranks that
share every matrix of a stage.  Replicas all look the same, so only the first few are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.distributed.topology import Topology
from engine.report.svg import color_of, group, picture, rect, text

WIDTH = 1000
LABELS = 128                    # pixels left of the first stage
HEADER, ROW, GAP = 74, 26, 14
MAX_ROWS = 16


def layout_picture(topology: Topology, stage_contents: Sequence[Sequence[str]]) -> str:
    """The layout as an `<svg>` element for a page that has the `STYLE` of `engine.report.svg`.

    Args:
        topology: the degrees of the job.
        stage_contents: for each pipeline stage what it holds, such as `["embedding", "layers 0–9"]`.
    """
    replicas = [(data, context) for data in range(topology.data) for context in range(topology.context)]
    shown = replicas[:max(1, MAX_ROWS // topology.tensor)]
    column = (WIDTH - LABELS - 16) / topology.pipeline
    body = [_header(stage, contents, column) for stage, contents in enumerate(stage_contents)]
    top = HEADER
    for data, context in shown:
        body += _replica(topology, data, context, top, column, stage_contents)
        top += topology.tensor * ROW + GAP
    if len(shown) < len(replicas):
        body.append(text(LABELS, top + 8, f"and {len(replicas) - len(shown):,} more replicas, laid out the same way"))
        top += 24
    return picture(WIDTH, top, f"Layout of {topology.world_size} ranks", body)


def _header(stage: int, contents: Sequence[str], column: float) -> str:
    left = LABELS + stage * column
    lines = [f"stage {stage}", *contents] if column >= 84 else [str(stage)]
    return group(rect(left + 2, 4, column - 4, HEADER - 12, rx=6, style=f"fill:{color_of(stage)};opacity:.14"),
                 *(text(left + column / 2, 22 + 17 * i, words, "number" if i else "title", "middle")
                   for i, words in enumerate(lines[:3])), hint=f"stage {stage}: " + ", ".join(contents))


def _replica(topology: Topology, data: int, context: int, top: int, column: float,
             stage_contents: Sequence[Sequence[str]]) -> list[str]:
    name = f"data {data}" + (f" · context {context}" if topology.context > 1 else "")
    parts = [text(12, top + 17, name, "number")]
    for tensor in range(topology.tensor):
        y = top + tensor * ROW
        if topology.tensor > 1:
            parts.append(text(LABELS - 8, y + 17, f"tensor {tensor}", anchor="end"))
        for stage in range(topology.pipeline):
            rank = topology.rank(pipeline=stage, data=data, context=context, tensor=tensor)
            left = LABELS + stage * column
            parts.append(group(
                rect(left + 2, y, column - 4, ROW - 3, rx=4, style=f"fill:{color_of(stage)};opacity:.3"),
                text(left + column / 2, y + 16, f"rank {rank}" if column >= 60 else str(rank), "number", "middle"),
                hint=f"rank {rank}: {name}, tensor {tensor}, stage {stage} ({', '.join(stage_contents[stage])})"))
    return parts
