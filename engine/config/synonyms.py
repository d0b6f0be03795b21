"""What other trainers call our keys: for whoever comes from there, and for the message where such a name is typed.

One row per thing, with its names in Megatron-LM (options without dashes), litgpt, torchtitan, and Hugging Face's
`TrainingArguments` and `config.json`; the last column is what people abbreviate.  A name may stand in several columns,
never for two things.  docs/coming-from.md prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PROJECTS = ("Megatron-LM", "litgpt", "torchtitan", "Hugging Face")


@dataclass(frozen=True)
class Row:
    """A key of ours, what to know about it, and the names that others give it, separated by spaces."""

    key: str
    megatron: str = ""
    litgpt: str = ""
    torchtitan: str = ""
    hugging_face: str = ""
    others: str = ""
    note: str = ""

    def names(self, project: int) -> list[str]:
        """The names in one of `PROJECTS`."""
        return (self.megatron, self.litgpt, self.torchtitan, self.hugging_face)[project].split()


ROWS = (
    Row("run.dir", "save", "out_dir", "job.dump_folder dump_folder", "output_dir", "save_dir dir",
        note="checkpoints, metrics and logs go there"),
    Row("run.name", "wandb_exp_name", "", "job.description", "run_name", "name"),
    Row("run.seed", "seed", "seed", "training.seed debug.seed", "seed", "random_seed"),
    Row("run.device", "", "accelerator", "", "use_cpu no_cuda", "device"),
    Row("model.preset", "", "model_name", "model.flavor model.name flavor", "model_name_or_path", "preset model_type"),
    Row("model.num_layers", "num_layers", "n_layer", "", "num_hidden_layers", "n_layers layers"),
    Row("model.hidden_size", "hidden_size", "n_embd", "", "hidden_size", "dim d_model embed_dim"),
    Row("model.num_heads", "num_attention_heads", "n_head", "", "num_attention_heads", "n_heads heads"),
    Row("model.num_kv_heads", "num_query_groups group_query_attention", "n_query_groups", "", "num_key_value_heads",
        "n_kv_heads kv_heads"),
    Row("model.head_dim", "kv_channels", "head_size", "", "head_dim"),
    Row("model.ffn_hidden_size", "ffn_hidden_size", "intermediate_size", "", "intermediate_size",
        "ffn_dim mlp_dim d_ff"),
    Row("model.vocab_size", "vocab_size padded_vocab_size make_vocab_size_divisible_by", "padded_vocab_size", "",
        "vocab_size", note="the true size; padding is internal"),
    Row("model.max_seq_len", "max_position_embeddings", "block_size", "", "max_position_embeddings", "max_length"),
    Row("model.rope_theta", "rotary_base", "rope_base", "", "rope_theta"),
    Row("model.norm_eps", "norm_epsilon layernorm_epsilon", "norm_eps", "", "rms_norm_eps layer_norm_eps"),
    Row("model.tie_embeddings", "untie_embeddings_and_output_weights", "tie_embeddings train.tie_embeddings", "",
        "tie_word_embeddings", note="Megatron-LM's says the opposite"),
    Row("model.qkv_bias", "add_qkv_bias", "attn_bias", "", "attention_bias"),
    Row("parallel.tensor", "tensor_model_parallel_size", "", "parallelism.tensor_parallel_degree",
        "tensor_parallel_size", "tp tp_size tensor_parallel tensor_parallel_degree"),
    Row("parallel.pipeline", "pipeline_model_parallel_size", "", "parallelism.pipeline_parallel_degree",
        "pipeline_parallel_size", "pp pp_size pipeline_parallel pipeline_parallel_degree"),
    Row("parallel.context", "context_parallel_size", "", "parallelism.context_parallel_degree", "",
        "cp cp_size context_parallel context_parallel_degree"),
    Row("parallel.data", "", "devices", "parallelism.data_parallel_replicate_degree", "",
        "dp dp_size data_parallel data_parallel_size num_gpus gpus world_size",
        note="auto: the processes that are left"),
    Row("parallel.sequence", "sequence_parallel", "", "", "", "sp"),
    Row("parallel.schedule", "", "", "parallelism.pipeline_parallel_schedule", "", "pipeline_schedule"),
    Row("parallel.virtual_stages", "num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage",
        "", "", "", "vpp virtual_pipeline_model_parallel_size", note="chunks per stage, not layers per chunk"),
    Row("parallel.zero", "use_distributed_optimizer data_parallel_sharding_strategy use_torch_fsdp2", "",
        "parallelism.data_parallel_shard_degree", "fsdp deepspeed", "zero zero_stage stage fsdp_size",
        note="0 to 3: 1 is Megatron-LM's distributed optimizer, 3 is FSDP"),
    Row("parallel.recompute", "recompute_granularity", "", "activation_checkpoint.mode", "gradient_checkpointing",
        "activation_checkpointing", note="none, selective or full"),
    Row("parallel.recompute_layers", "recompute_num_layers"),
    Row("precision.compute", "bf16 fp16 params_dtype", "precision", "training.mixed_precision_param", "bf16 fp16",
        "dtype mixed_precision torch_dtype", note="bf16, fp16 or fp32"),
    Row("precision.fp8", "fp8_format fp8_recipe", "", "float8.recipe_name", "", "float8"),
    Row("precision.grad_reduce", "accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16", "",
        "training.mixed_precision_reduce"),
    Row("data.tokenizer", "tokenizer_model tokenizer_type", "tokenizer_dir",
        "model.tokenizer_path model.hf_assets_path hf_assets_path", "tokenizer_name", "tokenizer tokenizer_path"),
    Row("data.seq_len", "seq_length", "train.max_seq_length", "training.seq_len", "max_seq_length",
        "seqlen sequence_length context_length"),
    Row("data.train", "data_path train_data_path", "data", "training.dataset training.dataset_path",
        "train_file dataset_name", "dataset train_data", note="a list: [{path: data/web, weight: 0.7}]"),
    Row("data.valid", "valid_data_path split", "", "validation.dataset", "validation_file", "val_data eval_data",
        note="a list, as data.train is"),
    Row("data.document_mask", "reset_attention_mask reset_position_ids"),
    Row("batch.micro", "micro_batch_size", "train.micro_batch_size", "training.local_batch_size local_batch_size",
        "per_device_train_batch_size", "mbs micro_batch"),
    Row("batch.global", "global_batch_size", "train.global_batch_size", "training.global_batch_size",
        "gradient_accumulation_steps", "gbs batch_size bs train_batch_size grad_accum accumulation_steps",
        note="sequences per step over all processes: micro × data × microbatches"),
    Row("steps", "train_iters train_samples", "train.max_steps train.max_tokens", "training.steps",
        "max_steps num_train_epochs", "iterations max_iters num_steps epochs max_tokens",
        note="optimizer steps: tokens / (batch.global × data.seq_len)"),
    Row("optim.lr", "lr", "train.learning_rate", "optimizer.lr", "learning_rate", "max_lr"),
    Row("optim.min_lr", "min_lr", "train.min_lr", "lr_scheduler.min_lr_factor", "lr_scheduler_kwargs",
        "min_lr_ratio", note="a rate, not a factor"),
    Row("optim.warmup_steps", "lr_warmup_iters lr_warmup_samples lr_warmup_fraction", "train.lr_warmup_steps",
        "lr_scheduler.warmup_steps", "warmup_steps warmup_ratio", "warmup warmup_iters", note="steps"),
    Row("optim.decay", "lr_decay_style lr_decay_iters", "", "lr_scheduler.decay_type lr_scheduler.decay_ratio",
        "lr_scheduler_type", "scheduler lr_schedule lr_scheduler"),
    Row("optim.betas", "adam_beta1 adam_beta2", "train.beta1 train.beta2", "optimizer.beta1 optimizer.beta2",
        "adam_beta1 adam_beta2", note="both in one list: [0.9, 0.95]"),
    Row("optim.eps", "adam_eps", "", "optimizer.eps", "adam_epsilon", "epsilon"),
    Row("optim.weight_decay", "weight_decay", "train.weight_decay", "optimizer.weight_decay", "weight_decay", "wd"),
    Row("optim.grad_clip", "clip_grad", "train.max_norm", "training.max_norm", "max_grad_norm",
        "gradient_clipping grad_clip_norm"),
    Row("checkpoint.every", "save_interval", "train.save_interval", "checkpoint.interval", "save_steps",
        "save_every checkpoint_interval"),
    Row("checkpoint.keep", "", "", "checkpoint.keep_latest_k", "save_total_limit"),
    Row("checkpoint.async", "async_save", "", "checkpoint.async_mode"),
    Row("checkpoint.resume", "", "resume", "checkpoint.load_step", "resume_from_checkpoint", "resume_from",
        note="auto (the newest that verifies), never, or the path of one"),
    Row("checkpoint.load", "load finetune pretrained_checkpoint", "initial_checkpoint_dir",
        "checkpoint.initial_load_path", "", "init_from pretrained", note="weights only; to go on, run.dir is enough"),
    Row("eval.every", "eval_interval", "eval.interval", "validation.freq", "eval_steps", "eval_every"),
    Row("eval.batches", "eval_iters", "eval.max_iters", "validation.steps", "", "eval_batches"),
    Row("log.every", "log_interval", "train.log_interval", "metrics.log_freq", "logging_steps", "log_every"),
    Row("log.tensorboard", "tensorboard_dir", "logger_name", "metrics.enable_tensorboard", "report_to", "tensorboard"),
    Row("log.wandb", "wandb_project", "", "metrics.enable_wandb", "", "wandb", note="the project's name"),
)


def _all_names(row: Row) -> Iterator[str]:
    for names in (row.megatron, row.litgpt, row.torchtitan, row.hugging_face, row.others):
        for name in names.split():
            yield name
            yield name.rpartition(".")[2]


_BY_NAME: dict[str, Row] = {}
for _row in ROWS:
    for _name in _all_names(_row):
        _BY_NAME.setdefault(_name, _row)


def ours(name: str) -> Row | None:
    """The row of a name that somebody else gives one of our keys; dashes, case and sections do not matter."""
    plain = name.strip().lstrip("-").lower().replace("-", "_")
    return _BY_NAME.get(plain) or _BY_NAME.get(plain.rpartition(".")[2])
