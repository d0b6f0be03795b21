"""Seconds of a forward and a backward pass of a layer, the embedding and the head, by cause.

A product of [tokens, k] with [k, n] takes

    kernel + max(2·tokens·k·n / (peak · product · k / (k + half_depth)),  bytes / (bandwidth · stream))

where a short inner dimension k loses, since a tile of the result is filled and emptied for little work.  Its matrices
are those of the model's specs, cut for a tensor rank.  Attention goes at a share of the peak of its own (or, where
scores are written out, as products and passes over them), and everything else as bytes through memory.  A collective
over g ranks is a ring: (g − 1) steps of latency, and (g − 1)/g of the bytes at the bandwidth of the slowest link that
it crosses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from engine.config import Config
from engine.model.spec import ParamSpec
from engine.plan.devices import Device
from engine.plan.layer import Sizes
from engine.plan.practice import Practice


@dataclass(frozen=True)
class Pass:
    """Seconds of a pass, by cause."""

    compute: float = 0.0
    tensor_comm: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.compute + other.compute, self.tensor_comm + other.tensor_comm,
                    self.recompute + other.recompute)

    def __mul__(self, factor: float) -> Pass:
        return Pass(self.compute * factor, self.tensor_comm * factor, self.recompute * factor)

    @property
    def total(self) -> float:
        return self.compute + self.tensor_comm + self.recompute


@dataclass(frozen=True)
class UnitCost:
    """Of a unit and one microbatch.

    Attributes:
        backward: the gradient of its input, what is computed again included.
        weight: the gradients of its weights.
    """

    forward: Pass
    backward: Pass
    weight: Pass


def _at_least(each: Pass, seconds: float) -> Pass:
    """The pass, stretched where the host takes longer to start it; what it waits for is computation."""
    return each + Pass(max(seconds - each.total, 0.0))


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: how many, and how many of them share a node."""

    size: int
    together: int

    @staticmethod
    def of(size: int, stride: int, per_node: int) -> Group:
        """`size` ranks, `stride` apart, on nodes of `per_node`."""
        return Group(size, max(1, min(size, per_node // stride)))


class Clock:
    """What things take on a device, for one job."""

    def __init__(self, config: Config, device: Device, practice: Practice) -> None:
        self.config, self.device, self.practice = config, device, practice
        self.sizes = Sizes.of(config)
        self.precision = "fp8" if config.precision.fp8 != "off" and "fp8" in device.peaks else config.precision.compute
        self.tensor = Group.of(config.parallel.tensor, 1, device.per_node)

    # ------------------------------------------------------------------ kernels

    def product(self, tokens: float, n: float, k: float, precision: str | None = None) -> float:
        """[tokens, k] · [k, n]; any of the three products of a layer, by its inner dimension k."""
        reached, width = self.device.reached, self.sizes.width
        precision = precision or self.precision
        share = reached.product_fp8 if precision == "fp8" else reached.product
        rate = self.device.peaks[precision] * share * k / (k + reached.half_depth)
        moved = (tokens * k + k * n + tokens * n) * width
        return reached.kernel + max(2 * tokens * n * k / rate, moved / (self.device.bandwidth * reached.stream))

    def stream(self, num_bytes: float, kernels: float = 1) -> float:
        """Elementwise kernels that move so many bytes."""
        return kernels * self.device.reached.kernel + num_bytes / (self.device.bandwidth * self.device.reached.stream)

    def collective(self, num_bytes: float, group: Group, rounds: int = 1) -> float:
        """An all-gather or reduce-scatter of `num_bytes` in all; `rounds` 2: an all-reduce."""
        if group.size == 1:
            return 0.0
        reached = self.device.reached
        inside = self.device.link * reached.link
        nodes = -(-group.size // group.together)
        if nodes == 1:
            return rounds * ((group.size - 1) * reached.latency + (group.size - 1) / group.size * num_bytes / inside)
        # a tree over nodes for the latency; every member of a node has its share of the network
        across = min(inside, self.device.network * reached.network * group.together)
        steps = (group.together - 1) * reached.latency + (nodes - 1).bit_length() * 2 * reached.far
        return rounds * (steps + (group.size - 1) / group.size * num_bytes / across)

    def message(self, num_bytes: float, near: bool) -> float:
        """From one stage to the next."""
        reached = self.device.reached
        if near:
            return reached.latency + num_bytes / (self.device.link * reached.link)
        return reached.far + num_bytes / (self.device.network * reached.network)

    # ------------------------------------------------------------------ units

    def matrices(self, specs: Iterable[ParamSpec]) -> list[tuple[str, int, int]]:
        """(rule, n, k) of this rank's part of each matrix."""
        return [(spec.rule.kind, prod(spec.local_shape[:-1]), spec.local_shape[-1]) for spec in specs if spec.decay]

    def layer(self, specs: Iterable[ParamSpec], recompute: str) -> UnitCost:
        """One layer."""
        tokens, specs = self.sizes.tokens, list(specs)
        matrices, trained = self.matrices(specs), self.matrices(spec for spec in specs if spec.trainable)
        products = sum(self.product(tokens, n, k) for _, n, k in matrices)
        inputs = sum(self.product(tokens, k, n) for _, n, k in matrices)
        weights = sum(self.product(n, k, tokens) for _, n, k in trained)
        attention, scores = self._attention()
        rest = self._elementwise()
        forward = Pass(products + attention + rest, self._collectives())
        again = Pass()
        if recompute == "full":
            again = Pass(recompute=forward.compute, tensor_comm=forward.tensor_comm)
        elif recompute == "selective":
            again = Pass(recompute=scores if self.practice.selective == "attention" else rest * 0.6)
        host = self._host(len(matrices), divided=self.sizes.divided)
        forward = _at_least(forward, host)
        slower = 2.5 if self.practice.fused_attention else 2.0     # fused attention computes its scores again
        backward = Pass(inputs + attention * slower + rest * 1.6, self._collectives(backward=True))
        backward, weight = backward + again, Pass(weights)
        held_up = _at_least(backward + weight, host * (2 + (recompute == "full"))) + (backward + weight) * -1.0
        return UnitCost(forward, backward + held_up, weight)

    def _host(self, num_matrices: int, divided: bool) -> float:
        """Seconds until the host has started a forward pass; backward, with two products for one, it is twice that."""
        reached, practice = self.device.reached, self.practice
        kernels = num_matrices + practice.kernels + (1 if practice.fused_attention else 6)
        return kernels * reached.dispatch + divided * (4 if self.sizes.gathers else 2) * reached.dispatch_collective

    def _attention(self) -> tuple[float, float]:
        """Forward seconds of attention, and of its scores alone where they are written out."""
        config, device, sizes = self.config, self.device, self.sizes
        heads = sizes.heads
        length = config.data.seq_len
        flops = 4 * sizes.tokens * length * heads * config.model.head_dim
        peak = device.peaks[config.precision.compute]
        if self.practice.fused_attention:
            return device.reached.kernel + flops / 2 / (peak * device.reached.attention), 0.0
        # two batched products over the whole square, and passes over the scores: scale and softmax, dropout
        moved = sizes.tokens * length * heads * self.practice.score_bytes
        depth = config.model.head_dim / (config.model.head_dim + device.reached.half_depth)
        seconds = flops / (peak * device.reached.product * depth) + self.stream(moved, 4)
        return seconds, seconds

    def _elementwise(self) -> float:
        sizes, practice = self.sizes, self.practice
        moved = practice.hidden_passes * sizes.hidden + 2 * (sizes.query + 2 * sizes.key)
        moved += (sizes.inputs + 1) * sizes.features
        if practice.dropout:
            moved += 2 * 2.5 * sizes.hidden
        return self.stream(moved, practice.kernels)

    def _collectives(self, backward: bool = False) -> float:
        """Two regions: an all-gather and a reduce-scatter each, or an all-reduce; some of it under products."""
        again = 2 if backward and self.sizes.gathers and self.practice.gathers_again else 0
        one = self.collective(self.sizes.full, self.tensor)
        return one * (4 + again * 0.5) * (1 - self.practice.tensor_hidden)

    def head(self, specs: Iterable[ParamSpec]) -> UnitCost:
        """Final norm, output layer, loss."""
        tokens, compute, specs = self.sizes.tokens, self.config.precision.compute, list(specs)
        matrices, trained = self.matrices(specs), self.matrices(spec for spec in specs if spec.trainable)
        wide = self.sizes.logits * 4 / self.sizes.width
        forward = sum(self.product(tokens, n, k, compute) for _, n, k in matrices)
        backward = sum(self.product(tokens, k, n, compute) for _, n, k in matrices)
        weight = sum(self.product(n, k, tokens, compute) for _, n, k in trained)
        rate = 1.0 if self.sizes.divided else self.practice.whole_output
        forward, backward, weight = forward / rate, backward / rate, weight / rate
        loss = self.stream(2 * self.sizes.logits + 3 * wide, 6)
        comm = self.collective(self.sizes.full, self.tensor)
        host = self._host(len(matrices), self.sizes.divided)
        # Of a weighted sum all comes with the loss, and it takes as long; for others most logits are made again.
        again = 0.0 if self.sizes.ahead else forward * (1 - self.sizes.chunk / max(self.sizes.logits, 1))
        return UnitCost(_at_least(Pass(forward + loss, comm), host) + Pass(self.practice.microbatch),
                        _at_least(Pass(again + backward + loss, comm), 2 * host), Pass(weight))

    def embedding(self) -> UnitCost:
        """The look-up."""
        comm = self.collective(self.sizes.full, self.tensor)
        passes = 3 if self.practice.dropout else 2
        return UnitCost(Pass(self.stream(passes * self.sizes.full, 3), comm),
                        Pass(self.stream(passes * self.sizes.full, 3), comm), Pass())
