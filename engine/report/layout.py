"""The layout of a run as pictures: which rank holds what, and the order of work in its pipeline."""

from __future__ import annotations

from engine.config import Config
from engine.distributed.topology import Topology
from engine.parallel.pipeline.partition import deal_layers, layer_costs
from engine.parallel.pipeline.timeline import timeline
from engine.report.layout_picture import layout_picture
from engine.report.schedule_picture import schedule_svg
from engine.schedules.table import build_schedule


def stage_contents(config: Config) -> list[list[str]]:
    """What each pipeline stage holds, such as `["embedding", "layers 0–9"]`."""
    parallel, model = config.parallel, config.model
    schedule = build_schedule(parallel.schedule, parallel.pipeline, parallel.pipeline, parallel.virtual_stages)
    placement = schedule.placement
    layer, embedding, output = layer_costs(model, config.data.seq_len)
    dealt = deal_layers(model.num_layers, len(placement), layer=layer, embedding=embedding, output=output)
    contents: list[list[str]] = []
    for stage in range(parallel.pipeline):
        chunks = [chunk for chunk, rank in enumerate(placement) if rank == stage]
        spans = ", ".join(_span(dealt[chunk]) for chunk in chunks)
        ends = [name for name, chunk in (("embedding", 0), ("LM head", len(placement) - 1)) if chunk in chunks]
        contents.append([f"layers {spans}" if len(chunks) > 1 or len(dealt[chunks[0]]) > 1 else f"layer {spans}",
                         *([" + ".join(ends)] if ends else [])])
    return contents


def _span(layers: range) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def layout_svg(config: Config) -> str | None:
    """The picture of the layout, or None where `parallel.data` was left open."""
    parallel = config.parallel
    if not isinstance(parallel.data, int):
        return None
    topology = Topology(parallel.pipeline, parallel.data, parallel.context, parallel.tensor)
    return layout_picture(topology, stage_contents(config))


def schedule_picture(config: Config) -> tuple[str, str] | None:
    """A step of the pipeline as a picture, and what to know about it; None without a pipeline.

    A step of hundreds of microbatches would be a strip of hundreds of screens, and the same pattern again and again: of
    those no more than four for each stage are drawn.
    """
    parallel = config.parallel
    if parallel.pipeline == 1 or not isinstance(parallel.data, int):
        return None
    whole = timeline(config)
    shown = min(config.num_microbatches, 4 * parallel.pipeline)
    if shown == config.num_microbatches:
        return schedule_svg(whole), "The unit of time is the forward pass of the stage with the most work."
    few = config.with_changes(batch={"global": config.batch.micro * parallel.data * shown})
    return schedule_svg(timeline(few)), (
        f"Drawn with {shown:,} of the step's {config.num_microbatches:,} microbatches; with all of them the bubble is "
        f"{whole.bubble:.2%}. The unit of time is the forward pass of the stage with the most work.")
