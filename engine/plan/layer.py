"""What a layer, the embedding and the head take and give back, forward and backward, in the order of the code.

The letters are those of the model: of a microbatch of B sequences a rank has `inside` tokens between the entrance of a
column-parallel layer and the exit of a row-parallel one, and `outside` tokens elsewhere, which are fewer where sequence
parallelism divides them.  `width` is bytes of an element in the compute dtype.

Two things decide what a line costs.  *Saved* is what an autograd function keeps: it is freed when its backward pass has
run.  *Passing* is a result that somebody else reads once: it is freed when that one returns.  What comes and goes
inside a kernel depends on the device: a GPU's fused norm needs no wide copies, and its products add to an fp32
accumulator in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Config
from engine.config.objectives import OBJECTIVES
from engine.model.chunks import rows_of_chunk
from engine.model.inventory import end_specs
from engine.model.kinds import FeedForward, mlp_of
from engine.plan.tape import Tape

FP32 = 4
ID = 8                                     # bytes of a token id

# Names under which memory is held, where more than one function must know them.
INPUT, BETWEEN_HALVES, GRADIENT = "layer inputs", "inputs between halves", "gradient"
PROJECTIONS, ACTIVATION, SOFTMAX = "mlp: projections", "mlp: activation", "softmax of the logits"
ATTENTION = ("attention: q, k, v", "attention: output", "attention: joined", "attention: statistics",
             "attention: keys and values in a ring")

BEHIND = ("norms: input behind attention", "norms: input behind the feed-forward layer")
CHEAP = (ACTIVATION, "norms: first output", "norms: second output")
# What products of weight gradients read: x and dy of each.  The dy of the two row-parallel layers is the gradient of
# the layer's output, or of the state between its halves, gathered where it is divided.
OPERANDS = (*CHEAP, "attention: output", "qkv's gradient", "projections' gradient", "gathered outputs' gradients",
            "gathered inputs", "outputs' gradients")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of a microbatch on one rank.

    Attributes:
        hidden: a hidden state outside of the regions; `full` one inside, of all tokens there.
        statistic: one fp32 number for each token outside; `statistics` one for each token inside.
        query, key: all query heads of this rank, all its keys (or values).
        features: the feed-forward layer's; `inputs` so many of them come out of its first projection.
        logits: of this rank's part of the vocabulary, padding included, in the compute dtype; `chunk` of so many tokens
            as there are at once, and `ahead`: their gradient is computed in the forward pass.
        gathers: with sequence parallelism: hidden states are gathered in front of a region and scattered behind.
        grouped: several query heads share a key.
        ring: context ranks.
        before, behind: there is a norm in front of each half, and one of its output.
        wide: a hidden state outside in fp32, where that is a copy.
        on_gpu: kernels are a GPU's.
    """

    hidden: float
    full: float
    statistic: float
    statistics: float
    query: float
    key: float
    features: float
    inputs: int
    logits: float
    chunk: float
    ahead: bool
    padded: bool
    width: int
    heads: int
    gathers: bool
    divided: bool
    grouped: bool
    ring: int
    qk_norm: bool
    before: bool
    behind: bool
    on_gpu: bool
    joins: bool
    tokens: float

    @staticmethod
    def of(config: Config, on_gpu: bool = True) -> Sizes:
        """Of the resolved `config`."""
        model, parallel = config.model, config.parallel
        width, tensor = (FP32 if config.precision.compute == "fp32" else 2), parallel.tensor
        inside = config.batch.micro * config.rows_per_sample * config.data.seq_len / parallel.context
        outside = inside / tensor if parallel.sequence else inside
        kind = mlp_of(model)
        head = end_specs(model).get("output_layer.weight")
        adapted = config.adapter is not None and config.adapter.adapts("lm_head")      # its logits are there at once
        columns = 0 if head is None else head.on_tensor_rank(tensor, 0, parallel.sequence).local_shape[0]
        return Sizes(
            hidden=outside * model.hidden_size * width, full=inside * model.hidden_size * width,
            statistic=outside * FP32, statistics=inside * FP32,
            query=inside * model.num_heads * model.head_dim * width / tensor,
            key=inside * max(model.num_kv_heads, tensor) * model.head_dim * width / tensor,
            features=inside * model.ffn_hidden_size * width / tensor,
            inputs=kind.inputs if isinstance(kind, FeedForward) else 1, logits=inside * columns * width,
            chunk=(inside if adapted else rows_of_chunk(int(inside), columns)) * columns * width,
            ahead=(OBJECTIVES[config.run.objective].weighted_sum and not config.roles.reward
                   and not parallel.reproducible and not adapted),
            padded=columns * tensor != model.vocab_size, width=width, heads=model.num_heads // tensor,
            gathers=parallel.sequence and tensor > 1, divided=tensor > 1,
            grouped=model.num_heads > model.num_kv_heads, ring=parallel.context, qk_norm=bool(model.qk_norm),
            on_gpu=on_gpu, before=model.norm_place != "post", behind=model.norm_place != "pre",
            joins=config.data.document_mask and not on_gpu, tokens=inside)


@dataclass(frozen=True)
class LayerBytes:
    """What one layer does to memory.

    Attributes:
        kept: from its forward to its backward pass, by name; its input is in it.
        forward: the most held while it runs forward, its input in it.
        backward: the most held while it runs backward, beginning with `kept` and the gradient of its output.  What it
            leaves behind, besides the gradient, stays until the chunk's backward pass is over: what a selective
            recomputation has filled again.
    """

    kept: dict[str, float]
    forward: Tape
    backward: Tape

    @property
    def left(self) -> dict[str, float]:
        """What stays until the chunk's backward pass is over."""
        return {name: size for name, size in self.backward.names.items() if name != GRADIENT}


def layer_bytes(sizes: Sizes, recompute: str, *, split: bool = False) -> LayerBytes:
    """Of a layer that recomputes `none`, `selective` or `full`; `split`: its weight gradients wait for W."""
    forward = Tape({INPUT: sizes.hidden})
    _forward(forward, sizes, saving=recompute != "full", selective=recompute == "selective")
    kept = {name: size for name, size in forward.names.items() if name != "output"}
    pinned = OPERANDS if split else CHEAP if recompute == "selective" else ()
    backward = Tape(kept | {GRADIENT: sizes.hidden}, pinned)
    if recompute == "full":
        _forward(backward, sizes, saving=True)
        backward.drop("output")
    _mlp_backward(backward, sizes, recompute == "selective")
    _attention_backward(backward, sizes, recompute == "selective")
    return LayerBytes(kept, forward, backward)


def _forward(tape: Tape, sizes: Sizes, saving: bool, selective: bool = False) -> None:
    """A layer's tensors in the order in which they appear; without `saving` as under no_grad."""
    forgets = not saving or selective
    tape.take("norms: statistics", saving * sizes.statistic * sizes.before)
    tape.take("norms: first output", sizes.hidden * sizes.before)
    _entrance(tape, sizes, sizes.query + 2 * sizes.key, "qkv")
    if forgets:
        tape.drop("norms: first output")
    if sizes.qk_norm:                      # both norms' outputs, then one tensor of them and the values
        heads = sizes.heads * (1 + sizes.key / sizes.query)
        tape.take("attention: statistics", saving * sizes.statistics * heads)
        tape.take("normalised", sizes.query + sizes.key)
        tape.take("joined", sizes.query + 2 * sizes.key)
        tape.drop("normalised")
        tape.rename("qkv", "attention: q, k before their norms")
        tape.rename("joined", "qkv")
        if not saving:
            tape.drop("attention: q, k before their norms")
    tape.take("attention: q, k, v", sizes.query + 2 * sizes.key)
    tape.drop("qkv")
    _attention_forward(tape, sizes)
    _exit(tape, sizes)
    if not saving:
        tape.drop(*ATTENTION)
    _norm_behind(tape, sizes, saving, BEHIND[0])
    tape.take(BETWEEN_HALVES, sizes.hidden)
    tape.drop("sum")
    tape.take("norms: statistics", saving * sizes.statistic * sizes.before)
    tape.take("norms: second output", sizes.hidden * sizes.before)
    _entrance(tape, sizes, sizes.inputs * sizes.features, PROJECTIONS)
    if forgets:
        tape.drop("norms: second output")
    tape.take(ACTIVATION, sizes.features)
    if not saving:
        tape.drop(PROJECTIONS)
    _exit(tape, sizes)
    if forgets:
        tape.drop(ACTIVATION)
    _norm_behind(tape, sizes, saving, BEHIND[1])
    tape.take("output", sizes.hidden)
    tape.drop("sum")
    if not saving:
        tape.drop(BETWEEN_HALVES)


def _entrance(tape: Tape, sizes: Sizes, out: float, name: str) -> None:
    """A column-parallel layer: the input is gathered for as long as the product runs."""
    gathered = sizes.full if sizes.gathers else 0.0
    tape.take("gathered", gathered)
    tape.take(name, out)
    tape.drop("gathered")


def _exit(tape: Tape, sizes: Sizes) -> None:
    """A row-parallel layer: its partial sums are scattered, or summed up in place; `sum` is left."""
    if sizes.gathers:
        tape.take("gathered", sizes.full)
    tape.take("sum", sizes.hidden)
    tape.drop("gathered")


def _norm_behind(tape: Tape, sizes: Sizes, saving: bool, name: str) -> None:
    """Of `sum`, the output of a half, which is kept, to be normalised."""
    if sizes.behind:
        tape.take("norms: statistics", saving * sizes.statistic)
        tape.rename("sum", name)
        tape.take("sum", sizes.hidden)
        if not saving:
            tape.drop(name)


def _norm_behind_backward(tape: Tape, sizes: Sizes, name: str) -> None:
    """The gradient of a half's output, from that of the sum that it goes into; it is left as `half's gradient`."""
    if sizes.behind:
        tape.passing("norms", (1 if sizes.on_gpu else 3) * sizes.hidden * FP32 / sizes.width)
        tape.take("half's gradient", sizes.hidden)
        tape.drop(name)


def _attention_forward(tape: Tape, sizes: Sizes) -> None:
    lse = sizes.statistics * sizes.heads
    if sizes.grouped:                      # a key's query heads lie apart from the next key's: flattening copies them
        tape.take("attention: q, k, v", sizes.query)
    if sizes.ring == 1:
        tape.take("attention: output", sizes.query)
        if sizes.joins:                    # documents one by one, then joined; on a GPU one call writes all
            tape.take("attention: joined", sizes.query)
        tape.take("attention: statistics", lse)
        return
    wide = sizes.query * FP32 / sizes.width
    tape.take("attention: keys and values in a ring", 2 * sizes.key)
    tape.take("ring", wide + 2 * sizes.key + sizes.query + 2 * lse)        # the sum, what arrives, a block's result
    tape.take("attention: statistics", lse)
    if sizes.width < FP32:
        tape.take("attention: output", sizes.query)
        tape.drop("ring")
    else:
        tape.drop("ring")
        tape.take("attention: output", sizes.query)


def _mlp_backward(tape: Tape, sizes: Sizes, selective: bool) -> None:
    if selective:
        tape.passing("refill", 2 * sizes.features)
        tape.take(ACTIVATION, sizes.features)
    _norm_behind_backward(tape, sizes, BEHIND[1])
    _exit_backward(tape, sizes)
    tape.take("features' gradient", sizes.features)
    tape.drop("gathered outputs' gradients", ACTIVATION, "half's gradient")
    tape.take("projections' gradient", sizes.inputs * sizes.features)
    tape.drop("features' gradient", PROJECTIONS)
    if selective and sizes.before:
        tape.passing("refill", 2 * sizes.hidden)
        tape.take("norms: second output", sizes.hidden)
    _entrance_backward(tape, sizes)
    tape.drop("projections' gradient", "norms: second output")
    _norm_backward(tape, sizes, BETWEEN_HALVES)


def _attention_backward(tape: Tape, sizes: Sizes, selective: bool) -> None:
    qkv = sizes.query + 2 * sizes.key
    _norm_behind_backward(tape, sizes, BEHIND[0])
    _exit_backward(tape, sizes)
    tape.take("output's gradient", sizes.query)
    tape.drop("gathered outputs' gradients", "half's gradient")
    wide = FP32 / sizes.width
    tape.take("ring", ((sizes.query + 4 * sizes.key) * wide + 2 * sizes.key + qkv) * (sizes.ring > 1))
    tape.take("q, k, v: gradients", qkv)
    tape.drop("ring", "output's gradient", *ATTENTION)
    tape.take("qkv's gradient", qkv)
    tape.drop("q, k, v: gradients")
    if sizes.qk_norm:
        tape.passing("norms", 2 * qkv)
        tape.drop("attention: q, k before their norms")
    if selective and sizes.before:
        tape.passing("refill", 2 * sizes.hidden)
        tape.take("norms: first output", sizes.hidden)
    _entrance_backward(tape, sizes)
    tape.drop("qkv's gradient", "norms: first output")
    _norm_backward(tape, sizes, INPUT)


def _exit_backward(tape: Tape, sizes: Sizes) -> None:
    """The gradient of a region's output: gathered, or as it is, and then held by its product as well."""
    tape.take("gathered outputs' gradients", sizes.full if sizes.gathers else 0)
    if not sizes.gathers and "outputs' gradients" in tape.pinned:
        tape.take("outputs' gradients", sizes.hidden)


def _entrance_backward(tape: Tape, sizes: Sizes) -> None:
    """The input is gathered once more; its gradient is that of all tokens before it is summed up and scattered."""
    tape.take("gathered inputs", sizes.full if sizes.gathers else 0)
    tape.take("gathered", sizes.full if sizes.gathers else 0)
    tape.take("branch", sizes.hidden)
    tape.drop("gathered", "gathered inputs")


def _norm_backward(tape: Tape, sizes: Sizes, x: str) -> None:
    """`branch`, the gradient of the norm's output, becomes that of its input `x` and joins `gradient`."""
    if not sizes.before:
        tape.drop("branch", x)
        return
    wide = sizes.hidden * FP32 / sizes.width
    if sizes.on_gpu:
        tape.take("norm's gradient", sizes.hidden)
        tape.passing("norms", wide)
    else:
        tape.passing("norms", 3 * wide + 2 * (wide if sizes.width < FP32 else 0))
        tape.take("norm's gradient", sizes.hidden)
    tape.drop("branch", x, GRADIENT)               # what came down the residual stream is added in place
    tape.rename("norm's gradient", GRADIENT)


def head_bytes(sizes: Sizes) -> LayerBytes:
    """Final norm, output layer and loss, chunk of tokens by chunk (`engine.parallel.tensor.vocabulary`)."""
    forward = Tape({INPUT: sizes.hidden})
    forward.take("norms: statistics", sizes.statistic)
    forward.take("norms: last output", sizes.hidden)
    forward.take("gathered", sizes.full if sizes.gathers else 0)
    if sizes.ahead:
        _chunk_backward(forward, sizes)
        forward.drop("norms: last output")
    else:
        _logits(forward, sizes)
    forward.drop("gathered")
    kept = dict(forward.names)
    backward = Tape(kept)
    if not sizes.ahead:
        backward.take("gathered inputs", sizes.full if sizes.gathers else 0)
        _chunk_backward(backward, sizes, kept=True)
        backward.drop("gathered inputs", "norms: last output")
    backward.passing("norms", sizes.hidden * FP32 / sizes.width * (1 if sizes.on_gpu else 3))
    backward.take(GRADIENT, sizes.hidden)
    backward.drop("loss: gradient", INPUT)
    return LayerBytes(kept, forward, backward)


def _logits(tape: Tape, sizes: Sizes) -> None:
    """A chunk's logits and what is made of them; a GPU's kernel reads them and keeps nothing as large."""
    wide = 0.0 if sizes.on_gpu else sizes.chunk * FP32 / sizes.width
    tape.take("logits", sizes.chunk)
    if not sizes.on_gpu and sizes.width < FP32:
        tape.passing("logits in fp32", 2 * wide)
    tape.take(SOFTMAX, wide)
    tape.take("loss: statistics", sizes.statistics * 5)


def _chunk_backward(tape: Tape, sizes: Sizes, kept: bool = False) -> None:
    """From a chunk's logits, `kept` or not, to its share of the gradients; `loss: gradient` of all tokens is left."""
    several = sizes.chunk < sizes.logits
    tape.take("gradient of all", sizes.full if several else 0)
    if not kept:
        _logits(tape, sizes)
    if not sizes.on_gpu:                                   # a GPU's is written over the logits, fp32's over the softmax
        tape.take("logits' gradient", sizes.chunk if sizes.width < FP32 or sizes.padded else 0)
    if sizes.width < FP32 or sizes.padded:
        tape.drop(SOFTMAX)
    if not sizes.on_gpu:
        tape.drop("logits")
    tape.take("gradient of all", 0 if several else sizes.full)
    if not sizes.on_gpu and sizes.width < FP32:
        tape.passing("logits' gradient in fp32", sizes.chunk * FP32 / sizes.width)
    tape.drop("logits", SOFTMAX, "logits' gradient", "loss: statistics")
    tape.take("loss: gradient", sizes.hidden if sizes.gathers else 0)
    if sizes.gathers:
        tape.drop("gradient of all")
    tape.rename("gradient of all", "loss: gradient")


def embedding_bytes(sizes: Sizes) -> LayerBytes:
    """The look-up, whose output is the first layer's input."""
    forward = Tape()
    forward.take("token ids", sizes.tokens * (ID + 1))
    forward.take("gathered", 2 * sizes.full if sizes.gathers else 0)
    forward.take("output", sizes.hidden)
    forward.drop("gathered")
    kept = {"token ids": sizes.tokens * (ID + 1)}
    backward = Tape(kept | {GRADIENT: sizes.hidden})
    backward.take("gathered", (2 if sizes.gathers else 1) * sizes.full * sizes.divided)
    backward.passing("rows in fp32", sizes.full * FP32 / sizes.width * (sizes.width < FP32))
    return LayerBytes(kept, forward, backward)
