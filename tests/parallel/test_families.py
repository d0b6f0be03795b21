"""What GPT-2, OPT, GPT-NeoX, StarCoder 2, Phi-3, Gemma and OLMo 2 have and Llama has not: layouts are one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, tiny_config, train_layout
from tests.kit.reference import train_reference

BIASED = {"norm": "layernorm", "attention_bias": True, "mlp_bias": True}
# `gelu` stands for OPT's `relu`, whose kink makes of a rounding error another gradient.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt-neox": {**BIASED, "residual": "parallel", "rope_share": 0.25, "head_dim": 16, "mlp": "gelu"},
    "opt": {**BIASED, "position": "learned", "position_offset": 2, "mlp": "gelu", "tie_embeddings": True},
    "gemma": {"norm": "rmsnorm-1p", "mlp": "geglu", "embedding_scale": 32**0.5, "tie_embeddings": True, "head_dim": 16,
              "num_kv_heads": 2, "qk_norm": True},
    "starcoder2": {**BIASED, "mlp": "gelu-tanh", "num_kv_heads": 2},
    "mistral": {"num_kv_heads": 2, "window": 5},
    "windows in three of four layers": {"num_kv_heads": 2, "window": 3, "full_every": 4},
    "gemma 2 and 3": {"norm": "rmsnorm-1p", "norm_place": "both", "mlp": "geglu", "qk_norm": True, "num_kv_heads": 2,
                      "attention_softcap": 2.0, "logit_softcap": 1.5, "query_pre_attn_scalar": 5, "window": 5,
                      "full_every": 2, "rope_local_theta": 100.0, "tie_embeddings": True},
    "bloom": {**BIASED, "position": "alibi", "embedding_norm": True, "mlp": "gelu-tanh", "tie_embeddings": True},
    "olmo 2": {"norm_place": "post", "qk_norm": "projection", "num_kv_heads": 1},
}
LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "recompute": "selective"}, {"tensor": 2, "sequence": False, "data": 2, "zero": 3},
    {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2, "recompute": "full"}, {"context": 2, "tensor": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.items())))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_one_process(family: str, layout: dict[str, Any]) -> None:
    if "window" in FAMILIES[family] and "context" in layout:
        with pytest.raises(ValueError, match=r"parallel.context\(2\) has every token see all before it"):
            tiny_config(model=FAMILIES[family], parallel=layout)
        return
    if FAMILIES[family].get("position") == "alibi" and "context" in layout:
        with pytest.raises(ValueError, match=r"know no model.position: alibi: set parallel.context to 1"):
            tiny_config(model=FAMILIES[family], parallel=layout)
        return
    config = tiny_config(model=FAMILIES[family], parallel=layout, data={"document_mask": "window" in FAMILIES[family]})
    check(run_distributed(train_layout, config.parallel.world_size, config, 3), train_reference(config, 3))
