"""The projections of a model as Hugging Face's models and PEFT have them, where a weight here is several in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from engine.config import AdapterConfig, ModelConfig
from engine.config.alignment import PROJECTIONS
from engine.errors import ConfigError
from engine.model.inventory import Specs, layer_specs
from engine.model.spec import BETWEEN, ParamSpec, Rule


@dataclass(frozen=True)
class Fused:
    """The projections in the weight of a layer, one behind the other along a dimension.

    Each name takes one index, from the end; the first takes what is left.  Where there are fewer indices than names,
    they are the last names'.
    """

    names: tuple[str, ...]
    dim: int = 0

    def rows(self, size: int) -> Iterator[tuple[str, int, int]]:
        """Name, first index and number of indices of each projection in a weight of `size` along the dimension."""
        names = self.names[-min(len(self.names), size):]
        first = size - len(names) + 1
        yield names[0], 0, first
        yield from ((name, first + i, 1) for i, name in enumerate(names[1:]))


FUSED = {
    "linear_qkv": Fused(("q_proj", "k_proj", "v_proj"), dim=1),
    "linear_proj": Fused(("o_proj",)),
    "linear_fc1": Fused(("gate_proj", "up_proj")),
    "linear_fc2": Fused(("down_proj",)),
    "output_layer": Fused(("lm_head",)),
}


def fused_in(name: str) -> Fused:
    """What the weight or bias called so is made of: of one thing, where it is not a projection's."""
    module, _, kind = name.rpartition(".")
    return FUSED.get(module.rpartition(".")[2] if kind in ("weight", "bias") else "", Fused(("",)))


def is_projection(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer inside a layer of the model."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and name.startswith("layers.") and layer.rpartition(".")[2] in FUSED


def adapter_specs(weight: ParamSpec, fused: Fused, targets: Sequence[tuple[str, int]],
                  rank: int) -> Iterator[ParamSpec]:
    """The adapters of one weight (uncut): one A for all `targets`, then a B for each name and number of indices."""
    layer, inputs, row = weight.name.removesuffix(".weight"), weight.shape[-1], weight.rule.kind == "row"
    yield ParamSpec(f"{layer}.lora_a", (len(targets), rank, inputs), Rule("row", 2) if row else BETWEEN,
                    init_std=(3 * inputs) ** -0.5)
    starts = {name: start for name, start, _ in fused.rows(weight.shape[fused.dim])}
    for name, length in targets:
        shape = list(weight.shape[:-1])
        shape[fused.dim] = length
        rule = BETWEEN if row else weight.rule
        if rule.copied is not None:                     # queries are not, keys and values are
            rule = rule._replace(copied=length if starts[name] >= weight.shape[fused.dim] - rule.copied else 0)
        yield ParamSpec(f"{layer}.lora_b.{name}", (*shape, rank), rule, init="zeros")


def all_adapter_specs(specs: Specs, adapter: AdapterConfig) -> Iterator[ParamSpec]:
    """Those of all of a module's weights that have any."""
    for name, spec in specs.items():
        fused = FUSED.get(name.removesuffix(".weight").rpartition(".")[2])
        if fused is not None and name.endswith(".weight"):
            targets = [(each, length) for each, _, length in fused.rows(spec.shape[fused.dim]) if adapter.adapts(each)]
            if targets:
                yield from adapter_specs(spec, fused, targets, adapter.rank)


def adapter_elements(specs: Specs, adapter: AdapterConfig) -> int:
    """Elements of the A's and B's of a module's parameters: `rank · (in + out)` for each projection that has them."""
    return adapter.rank * sum(size for name, size in _sizes(specs) if adapter.adapts(name))


def _sizes(specs: Specs) -> Iterator[tuple[str, int]]:
    """Each projection and its number of input and output features together."""
    for name, spec in specs.items():
        fused = FUSED.get(name.removesuffix(".weight").rpartition(".")[2])
        if fused is not None and name.endswith(".weight"):
            *out, inputs = spec.shape
            for projection, _, length in fused.rows(out[fused.dim]):
                yield projection, inputs + prod(out) // out[fused.dim] * length


def require_targets(model: ModelConfig, adapter: AdapterConfig) -> None:
    """
    Raises:
        ConfigError: a projection is to have an adapter that no layer of the model has.
    """
    present = dict(_sizes(layer_specs(model, 0)))
    if absent := [name for name in adapter.targets if name in PROJECTIONS and name not in present]:
        raise ConfigError(f"adapter.targets has {absent[0]}, which a model with model.mlp: {model.mlp} does not have; "
                          f"its layers have {', '.join(present)}")
