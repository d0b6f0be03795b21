"""How much of a layer stays in memory between its forward and its backward pass.

Of each half that is the input of its norm and the norm's output, [S, B, H] each, one fp32 number per token for the norm
(two of a LayerNorm), where there is a norm of its output the half's output and as many numbers again, and what the half
keeps inside its region (`Kind.kept`).  T tensor ranks divide the inside, and with sequence parallelism the outside too.
Recomputation takes away

    selective    both norms' outputs, and what the halves call cheap
    full         all but the layer's input

Buffers that come and go while a layer is computed, and what is kept once for all layers (rotary angles, a document
mask), are not in it.
"""

from __future__ import annotations

from typing import Literal

from engine.config import ModelConfig
from engine.model.kinds import attention_of, mlp_of, norm_of

STATISTIC_BYTES = 4


def layer_bytes_per_token(config: ModelConfig, width: int, *, tensor: int = 1, sequence: bool = True,
                          recompute: Literal["none", "selective", "full"] = "none") -> float:
    """Bytes that one layer keeps on one rank for each token of a microbatch.  Ring attention keeps more.

    Args:
        width: bytes of an element in the compute dtype.
        tensor: ranks that share the layer.
        sequence: whether they divide the sequence outside the regions.
    """
    config = config.model_copy(update={"num_kv_heads": max(config.num_kv_heads, tensor)})      # copied on ranks
    of_hidden, outside = config.hidden_size * width, tensor if sequence else 1
    if recompute == "full":
        return of_hidden / outside
    total, statistics = 0.0, norm_of(config).statistics * STATISTIC_BYTES
    before, behind = config.norm_place != "post", config.norm_place != "pre"
    for half in (attention_of(config), mlp_of(config)):
        kept, forgets = half.kept(config), recompute == "selective"
        hidden = 1 + (before and not forgets) + behind
        total += (of_hidden * hidden + statistics * (before + behind)) / outside
        total += ((kept.elements - forgets * kept.cheap) * width + kept.statistics * STATISTIC_BYTES) / tensor
    return total - (of_hidden / outside if config.residual == "parallel" else 0.0)        # the halves share their input
