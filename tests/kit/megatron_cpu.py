"""megatron-core on the CPU, for `test_megatron.py`: a program of its own.

    python -m tests.kit.megatron_cpu FOLDER     every action, in a folder of its name: result-RANK.json

Importing megatron-core takes ten seconds: it is done once, and the ranks of each action are forked from there.

megatron-core means CUDA wherever it needs a device; the few functions that insist on it are replaced here.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig, dot_product_attention

from checkpoints_tools.check import octant_logits
from checkpoints_tools.megatron import convert_from_megatron, convert_to_megatron
from checkpoints_tools.names import PREFIX
from engine.checkpoint.read import CheckpointReader
from engine.config import ModelConfig
from tests.kit.checkpoints import MEGATRON_KINDS, model, write_random

FORK = multiprocessing.get_context("fork")
TOKENS = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(0))


class NoRandomness:
    """In the place of the tracker of CUDA's random states: nothing here is random."""

    def fork(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def pretend_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    filesystem_async._process_memory = lambda: 0
    filesystem_async._results_queue = FORK.Manager().Queue()    # theirs is spawned, which imports all again
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = NoRandomness


def megatron_model(config: ModelConfig, vocab_size: int, tensor: int = 1, pipeline: int = 1) -> GPTModel:
    """The same model there; `vocab_size` with padding."""
    made = TransformerConfig(
        num_layers=config.num_layers, hidden_size=config.hidden_size, num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads, kv_channels=config.head_dim, ffn_hidden_size=config.ffn_hidden_size,
        layernorm_epsilon=config.norm_eps, normalization="RMSNorm", add_bias_linear=False,
        add_qkv_bias=config.qkv_bias, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False)
    scaling = config.rope_scaling
    return GPTModel(
        made, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size, config.max_seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.tie_embeddings, position_embedding_type="rope",
        rotary_base=int(config.rope_theta), rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 8.0).eval()


def save(folder: Path, content: dict[str, Any], iteration: int) -> None:
    """As Megatron-LM does: the iteration's folder, then the tracker."""
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({**content, "iteration": iteration, "checkpoint_version": 3.0}, str(place))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()


def load(made: GPTModel, folder: Path) -> None:
    """Through megatron-core's own loader, as strict as it is by default."""
    state = dist_checkpointing.load({"model": made.sharded_state_dict()}, str(folder))
    made.load_state_dict(state["model"])


def every_kind(folder: Path) -> dict[str, float]:
    """Ours → theirs: the difference of the logits by kind of model, relative to the largest logit."""
    differences = {}
    for number, (kind, changes) in enumerate(MEGATRON_KINDS.items()):
        config = model(**changes)
        reader = write_random(folder / f"{number}-ours", config)
        checked = convert_to_megatron(reader, folder / f"{number}-theirs", file_bytes=100_000)
        assert checked is not None and checked.largest_difference == 0
        made = megatron_model(config, config.vocab_size + 9)
        load(made, folder / f"{number}-theirs" / "iter_0000007")
        ours = octant_logits(config, lambda name, reader=reader: reader.read(PREFIX + name), TOKENS)
        length = TOKENS.shape[1]
        with torch.inference_mode():
            theirs = made(TOKENS, torch.arange(length).expand_as(TOKENS), torch.ones(length, length).triu(1).bool())
        theirs = theirs[..., :config.vocab_size]
        differences[kind] = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return differences


def masters(folder: Path) -> dict[str, bool]:
    """bf16 weights with fp32 masters beside them: ours must be the masters.  Layers stacked, and each by itself."""
    config = model(qkv_bias=True)
    made = megatron_model(config, config.vocab_size)
    exact = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    made.bfloat16()
    same = {}
    for apart in (False, True):
        weights = made.sharded_state_dict(metadata={"non_homogeneous_layers": apart})
        kept = {f"{name}/master": make_sharded_optimizer_tensor(weights[name], tensor, "optimizer.state.fp32_param")
                for name, tensor in exact.items()}
        theirs = folder / f"masters-{apart}"
        save(theirs, {"model": weights, "optimizer": kept}, 3)
        convert_from_megatron(theirs, folder / f"ours-{apart}", config)
        ours = CheckpointReader(folder / f"ours-{apart}")
        for name, key in {"embedding.weight": "embedding.word_embeddings.weight",
                          "layers.1.self_attention.linear_qkv.bias": "decoder.layers.1.self_attention.linear_qkv.bias",
                          "layers.1.mlp.linear_fc1.weight": "decoder.layers.1.mlp.linear_fc1.weight"}.items():
            same[f"{name}, apart={apart}"] = torch.equal(ours.read(PREFIX + name).flatten(), exact[key].flatten())
    return same


def alone(folder: Path) -> dict[str, Any]:
    return {"differences": every_kind(folder), "masters": masters(folder)}


def there_and_back(folder: Path) -> dict[str, bool]:
    """Theirs, cut over tensor 2 × pipeline 2 → ours → theirs: every parameter of this rank, compared bit for bit."""
    config = model(num_kv_heads=2, qkv_bias=True, vocab_size=259, num_layers=4)
    made = megatron_model(config, 272, tensor=2, pipeline=2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(dist.get_rank())
        for name, parameter in made.named_parameters():
            parameter.normal_(generator=generator)
            if "layernorm" in name or "linear_proj.bias" in name:       # the same on both tensor ranks
                dist.broadcast(parameter, parallel_state.get_tensor_model_parallel_src_rank(),
                               parallel_state.get_tensor_model_parallel_group())
    save(folder / "theirs", {"model": made.sharded_state_dict()}, 12)
    if dist.get_rank() == 0:
        checked = convert_from_megatron(folder / "theirs", folder / "ours", config)
        assert checked is not None and checked.largest_difference == 0
        convert_to_megatron(CheckpointReader(folder / "ours"), folder / "back")
    dist.barrier()
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    load(made, folder / "back" / "release")
    rows = 272 // 2
    true_rows = max(0, min(rows, 259 - rows * parallel_state.get_tensor_model_parallel_rank()))
    of_vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: torch.equal(*((tensor[:true_rows] for tensor in (before[name], parameter))
                                if name in of_vocabulary else (before[name], parameter)))
            for name, parameter in made.named_parameters()}


@dataclass(frozen=True)
class Action:
    run: Callable[[Path], dict[str, Any]]
    tensor: int = 1
    pipeline: int = 1


ACTIONS = {"alone": Action(alone), "there_and_back": Action(there_and_back, tensor=2, pipeline=2)}


def run_rank(name: str, folder: Path, rank: int, store: str) -> None:
    action = ACTIONS[name]
    torch.set_num_threads(1)
    pretend_cuda()
    size = action.tensor * action.pipeline
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(action.tensor, action.pipeline)
    (folder / f"result-{rank}.json").write_text(json.dumps(action.run(folder)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    for name, action in ACTIONS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        ranks = [FORK.Process(target=run_rank, args=(name, folder, rank, f"{folder}/store"))
                 for rank in range(action.tensor * action.pipeline)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{name} failed: exit codes {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main()
