"""`octant presets`: the models that `model.preset` knows, and one of them as YAML."""

from __future__ import annotations

import argparse

from engine.config import ModelConfig
from engine.config.fields import nearest
from engine.config.load import preset_fields, preset_names
from engine.config.yaml_values import dump_yaml
from engine.errors import RequestError
from engine.hints import hint
from engine.model.flops import count_parameters
from engine.plan.words import table

TITLES = ("preset", "parameters", "layers", "hidden", "heads", "key-value", "FFN", "vocabulary", "tokens")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the fields of one preset, to be changed.

    Raises:
        RequestError: there is no such preset.
    """
    if args.name is None:
        rows = [TITLES, *(_row(name) for name in preset_names())]
        print("\n".join(table(rows, right=range(1, len(TITLES)))))
        print(f"\n{hint('presets', 'tiny')}")
        return 0
    if args.name not in preset_names():
        raise RequestError(f"there is no preset {args.name!r:.60}; {nearest(args.name, preset_names())}")
    print(dump_yaml({"model": preset_fields(args.name)}), end="")
    return 0


def _row(name: str) -> tuple[str, ...]:
    model = ModelConfig.model_validate(preset_fields(name))
    sizes = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.ffn_hidden_size,
             model.vocab_size, model.max_seq_len)
    return name, f"{count_parameters(model).total:,}", *(f"{size:,}" for size in sizes)
