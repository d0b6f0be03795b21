"""What Megatron-LM and nanotron hold where Octant holds something else: so that recorded runs of them can be compared.

Parameters, gradients, optimizer and the tensors' sizes are the engine's own (`engine.plan.state`, `engine.plan.layer`);
so is the schedule.  Its layers and its end are not Octant's, and are written down here, in bytes of one microbatch:

    a layer keeps    its input, both norms' outputs, the state between its halves; q, k and v, attention's output;
                     the first projection's output and the activation's; of dropout a byte an element
    attention        fused: statistics; once more its output where flash-attn's is transposed, and in a ring;
                     written out: the scores after softmax and after dropout, and its mask
    the end          logits in the compute dtype with an fp32 copy of them, or, with Transformer Engine's fused loss,
                     nothing besides; the output layer's weight gradient on its way to the fp32 one
    always           two cuBLAS workspaces (a thread forward, one backward), Transformer Engine's own, its stand-ins for
                     weight gradients that were added in place, a buffer for scores that are written out, and the last
                     messages between stages

nanotron's layers keep the gathered inputs of their column-parallel products, keys and values once more (they are copied
to be rotated, and stay part of one buffer with the queries), attention's output transposed, and SiLU's result beside
its product with the other half.  Its end holds the logits twice in fp32.  It has no Transformer Engine, and keeps no
messages.

The worst moment is in the end of the last stage or in the backward pass of a layer, at the most passes in flight.
Sources: Megatron-LM core 0.16 (`tensor_parallel/layers.py`, `fusions/`, `pipeline_parallel/schedules.py`), the cases'
`model_config.yaml`, SimuMax's `run_pretrain_llama3.sh`; nanotron of 2024 (`models/llama.py`, `optim/`,
`parallel/tensor_parallel/functional.py`).  Read off the runs: `MESSAGES`, and that nanotron's gathered inputs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from engine.config import Config
from engine.plan.layer import FP32, Sizes
from engine.plan.stages import stage_program
from engine.plan.state import cut_specs, dealt_layers, stage_state
from engine.schedules.action import Kind

MIB = 2**20
# cuBLAS's workspaces: torch's by architecture, the one that makes it deterministic, and Transformer Engine's.
CUBLAS = {"a100-80g": 8.125 * MIB, "h100-sxm": 32 * MIB, "b200": 8.125 * MIB}
CUBLAS_DETERMINISTIC = 32 * MIB            # CUBLAS_WORKSPACE_CONFIG=:4096:8
ENGINE = {"a100-80g": 4 * MIB, "h100-sxm": 32 * MIB, "b200": 32 * MIB}
MESSAGES = 3                               # hidden states that a stage still refers to; with several chunks twice that


@dataclass(frozen=True)
class Options:
    """How a run was set up, by the words of a row's `options`.

    Attributes:
        local: layers without Transformer Engine.
        unfused: scores of attention are written out.
        transposed: attention by flash-attn, whose [batch, sequence] order is not Megatron-LM's.
        dropout: of hidden states and of scores.
        deterministic: cuBLAS has the workspace that makes it so.
        accumulates: weight gradients are added to the fp32 ones by the product itself.
        fused_loss: Transformer Engine's cross-entropy.
        positions: learned ones, which Octant does not have.
        tied: the output layer is the embedding.
        nanotron: its layers and its end.
    """

    local: bool = False
    unfused: bool = False
    transposed: bool = False
    dropout: bool = False
    deterministic: bool = False
    accumulates: bool = False
    fused_loss: bool = False
    positions: bool = False
    tied: bool = False
    nanotron: bool = False

    @staticmethod
    def of(row: Mapping[str, str]) -> Options:
        """Of a row of benchmarks/planning/rows.csv."""
        return Options(**dict.fromkeys(row["options"].split(), True))


def steady_bytes(config: Config, device: str, options: Options, stage: int) -> float:
    """What a rank of a stage holds between two steps."""
    parallel, sizes = config.parallel, Sizes.of(config)
    state = stage_state(config, stage, even=True)
    held = float(state.bytes.total)
    if options.positions and stage == 0:
        held += config.model.max_seq_len * config.model.hidden_size * state.bytes.total / sum(state.buckets)
    held += 2 * (CUBLAS_DETERMINISTIC if options.deterministic else CUBLAS[device])
    held += 0 if options.local or options.nanotron else ENGINE[device]
    held += 2 * _scores(config, sizes) if options.local else 0
    if options.accumulates and not options.local:
        layer = cut_specs(config.model, config.adapter, parallel.tensor, parallel.sequence)["layer"]
        held += sizes.width * sum(prod(spec.local_shape) for spec in layer if spec.decay)
    messages = 0 if parallel.pipeline == 1 or options.nanotron else MESSAGES * (1 + (parallel.virtual_stages > 1))
    return held + messages * sizes.hidden


def peak_bytes(config: Config, device: str, options: Options, stage: int) -> float:
    """The most that a rank of a stage holds in a step."""
    parallel, sizes = config.parallel, Sizes.of(config)
    again = _layer(config, sizes, options) if parallel.recompute == "full" else 0.0
    gradient = sizes.hidden + (sizes.full if sizes.gathers else 0)
    worst = again + gradient + sizes.inputs * sizes.features
    if stage == parallel.pipeline - 1:
        worst = max(worst, _end(config, sizes, options))
    return steady_bytes(config, device, options, stage) + activation_bytes(config, options, stage) + worst


def activation_bytes(config: Config, options: Options, stage: int) -> float:
    """What the layers of a stage keep for their backward passes, at the most passes in flight."""
    sizes = Sizes.of(config)
    kept = sizes.hidden if config.parallel.recompute == "full" else _layer(config, sizes, options)
    return _layers_in_flight(config, stage) * kept


def layer_state_bytes(config: Config, stage: int) -> float:
    """Parameters, gradients and optimizer of a stage's layers alone."""
    state = stage_state(config, stage, even=True)
    elements = sum(prod(spec.local_shape) for unit in state.units if unit.what == "layer" for spec in unit.specs)
    return state.bytes.total * elements / sum(state.buckets)


def parameter_bytes(config: Config, stage: int) -> float:
    """A stage's parameters in the compute dtype."""
    return stage_state(config, stage, even=True).bytes.parameters


def _scores(config: Config, sizes: Sizes) -> float:
    """Elements of a microbatch's scores of attention."""
    return sizes.tokens * config.data.seq_len * sizes.heads


def _layer(config: Config, sizes: Sizes, options: Options) -> float:
    """What a layer keeps from its forward to its backward pass."""
    if options.nanotron:
        outside = 2 * sizes.hidden + 2 * (sizes.full if sizes.gathers else sizes.hidden) + 2 * sizes.statistic
        inside = 3 * sizes.query + 4 * sizes.key + (sizes.inputs + 2) * sizes.features
        return outside + inside + sizes.statistics * sizes.heads
    outside = 4 * sizes.hidden + 2 * options.dropout * sizes.hidden / sizes.width
    outside += 2 * (1 + (config.model.mlp == "gelu")) * sizes.statistic                 # a LayerNorm has a mean as well
    inside = sizes.query + 2 * sizes.key + sizes.query + (sizes.inputs + 1) * sizes.features
    if options.unfused:
        element = (2 * sizes.width + 1) if options.dropout else sizes.width
        return outside + inside + element * _scores(config, sizes)
    again = options.transposed + (config.parallel.context > 1)
    return outside + inside + again * sizes.query + sizes.statistics * sizes.heads


def _end(config: Config, sizes: Sizes, options: Options) -> float:
    """Final norm, output layer and loss, at the worst moment of their backward passes."""
    specs = cut_specs(config.model, config.adapter, config.parallel.tensor, config.parallel.sequence)["head"]
    weight = sizes.width * sum(prod(spec.local_shape) for spec in specs if spec.decay)
    gathered = sizes.full if sizes.gathers else 0.0
    if options.nanotron:
        return sizes.hidden + gathered + 2 * sizes.logits * FP32 / sizes.width
    loss = 2 * sizes.hidden + gathered + sizes.logits * (1 if options.fused_loss else 1 + FP32 / sizes.width)
    product = 3 * sizes.hidden + 2 * gathered + sizes.logits + weight
    return max(loss, product)


def _layers_in_flight(config: Config, stage: int) -> int:
    """Layers whose activations are held at the worst moment of the schedule."""
    parallel = config.parallel
    _, deal = dealt_layers(config, even=True)
    few = min(config.num_microbatches, 2 * parallel.pipeline * (1 + parallel.virtual_stages))
    program = stage_program(parallel.schedule, parallel.pipeline, few, parallel.virtual_stages, stage)
    changes = [len(deal[action.chunk]) * (1 if action.kind is Kind.F else -1) for action in program
               if action.kind in (Kind.F, Kind.BW)]
    return max(accumulate(changes))
