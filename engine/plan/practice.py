"""How a framework goes about a layer, where that differs: so that one model of time and memory can be held to the
published runs of others.

A planned job is `OCTANT`.  The rows of docs/planning.md were run by Megatron-LM of several years, NeMo and torchtitan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Practice:
    """What one does that others do otherwise.

    Attributes:
        fused_attention: scores are never written out.
        dropout: one mask and one more pass at three places of a layer.
        hidden_passes: times that elementwise kernels read or write a hidden state in a layer's forward pass.
        kernels: small kernels of a layer's forward pass, besides its products.
        gathers_again: with sequence parallelism a column-parallel layer's input is gathered once more for the weights.
        tensor_hidden: share of the tensor axis' collectives that runs under products.
        data_hidden: gradients are reduced, and weights gathered, while others are computed.
        gradient_bytes: in which gradients travel.
        scatters: messages between stages carry a tensor rank's part also without sequence parallelism.
        score_bytes: bytes through memory for a score that is written out, forward: softmax, mask, dropout.
        deals_evenly: every stage has as many layers, whatever else it does.
        selective: what selective recomputation does again: `attention` scores, or `norms` and activation.
        whole_output: share of a product's usual rate that the output layer reaches where tensor parallelism does not
            divide (and so pad) the vocabulary.
        microbatch: seconds in which a device waits for the host with every microbatch: to hand out its tokens, and to
            add up its loss.
    """

    name: str
    fused_attention: bool = True
    dropout: bool = False
    hidden_passes: float = 10.0
    kernels: int = 14
    gathers_again: bool = True
    tensor_hidden: float = 0.0
    data_hidden: bool = True
    gradient_bytes: int = 4
    scatters: bool = False
    score_bytes: float = 13.0
    deals_evenly: bool = False
    selective: str = "norms"
    whole_output: float = 1.0
    microbatch: float = 0.0


OCTANT = Practice("octant")
MEGATRON_2021 = Practice("Megatron-LM 2021", fused_attention=False, dropout=True, hidden_passes=16, kernels=16,
                         data_hidden=False, gradient_bytes=2, scatters=True, deals_evenly=True, selective="attention")
MEGATRON_2022 = Practice("Megatron-LM 2022", fused_attention=False, dropout=True, hidden_passes=14, kernels=16,
                         data_hidden=False, gradient_bytes=2, scatters=True, deals_evenly=True, selective="attention")
# What vTrain timed on one node: many small kernels, and an output layer whose vocabulary is not padded.
MEGATRON_VTRAIN = replace(MEGATRON_2021, name="Megatron-LM of vTrain", hidden_passes=20, kernels=36,
                          whole_output=0.42, microbatch=2e-3)
NEMO_2025 = Practice("NeMo 2025", hidden_passes=8, kernels=10, gathers_again=True, tensor_hidden=0.6, deals_evenly=True)
TORCHTITAN = Practice("torchtitan", hidden_passes=8, kernels=10)
