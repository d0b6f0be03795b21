"""The pipeline schedule of a configuration with the costs that its model suggests.

All costs are in forward passes of the stage with the most work, which is the pace of the pipeline.  With N
multiply-accumulates in matrix products with weights and A in attention (scores, and the sum of values), a token costs

    forward           N + A
    backward, input   N + 2A      both operands of attention's products get a gradient
    backward, weight  N
    recompute: full   N + A more in the backward pass, for the layers that recompute

Messages cost nothing here: how long they take is a matter of the network.
"""

from __future__ import annotations

from engine.config import Config
from engine.model.flops import products
from engine.parallel.pipeline.partition import deal_layers, layer_costs
from engine.schedules.simulate import Costs, Timeline, simulate
from engine.schedules.table import build_schedule


def timeline(config: Config) -> Timeline:
    """One step of the pipeline of a resolved configuration, on paper."""
    parallel = config.parallel
    schedule = build_schedule(parallel.schedule, parallel.pipeline, config.num_microbatches, parallel.virtual_stages)
    layer, embedding, output = layer_costs(config.model, config.data.seq_len)
    deal = deal_layers(config.model.num_layers, len(schedule.placement), layer=layer, embedding=embedding,
                       output=output)
    num_layers = [0] * parallel.pipeline
    work = [0.0] * parallel.pipeline
    for chunk, stage in enumerate(schedule.placement):
        num_layers[stage] += len(deal[chunk])
        work[stage] += len(deal[chunk]) * layer + embedding * (chunk == 0) + output * (chunk == len(deal) - 1)
    slowest = max(range(parallel.pipeline), key=work.__getitem__)
    forward = work[slowest]
    attention = num_layers[slowest] * products(config.model, config.data.seq_len) / forward
    again = _recomputed_layers(config, slowest, num_layers[slowest]) * layer / forward
    return simulate(schedule, Costs(1, 1 + attention + again, 1 - attention))


def _recomputed_layers(config: Config, stage: int, num_layers: int) -> int:
    if config.parallel.recompute != "full":
        return 0
    limit = config.parallel.recompute_layers
    limit = limit[stage] if isinstance(limit, tuple) else limit
    return num_layers if limit is None else min(limit, num_layers)
