"""The configuration: every section, key, default and unit in one place.

A configuration is a value.  It is read once (`engine.config.load`), checked, and never changes; every model below is
frozen and refuses keys it does not know.  A loaded configuration is fully resolved: presets and base files have
been merged in, so what `Config.dump` writes is enough to run the same job again.

Two YAML keys are reserved words in Python; their attributes carry an underscore: `batch.global_` and
`checkpoint.async_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from engine.config.alignment import HEAD, AdapterConfig, DPOConfig, ORPOConfig, RewardConfig, SFTConfig
from engine.config.data import DataConfig
from engine.config.fields import (
    Count,
    NonNegative,
    Section,
    Seed,
    Words,
)
from engine.config.length import BatchConfig, Ramp, Tokens, read_tokens
from engine.config.model import ModelConfig
from engine.config.objectives import OBJECTIVES, PAIRS, ObjectiveName
from engine.config.optim import OptimConfig
from engine.config.parallel import ParallelConfig
from engine.config.precision import PrecisionConfig
from engine.config.reliability import ReliabilityConfig, fault_problems
from engine.config.rl import (
    GROUP_OBJECTIVES,
    RL_OBJECTIVES,
    GRPOConfig,
    PPOConfig,
    RolesConfig,
    RolloutConfig,
    merged_optim,
    texts_of_a_step,
)
from engine.config.yaml_values import dump_yaml


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class RunConfig(Section):
    """Where the run lives, and what it does."""

    dir: Words = "runs/default"
    seed: Seed = 1234
    objective: ObjectiveName = "pretrain"                    # a row of engine.config.objectives
    name: Words | None = None                                # a label for logs and reports; default: the folder's name
    device: Literal["auto", "cpu", "cuda"] = "auto"          # auto: cuda where there is one


class CheckpointConfig(Section):
    """`every` in steps (0: only at the end); `keep` the newest so many (0: all)."""

    every: NonNegative = 500
    keep: NonNegative = 3
    keep_every: NonNegative = 0                              # saved and never deleted at its multiples; 0: none
    async_: bool = Field(default=True, validation_alias="async", serialization_alias="async")
    keep_best: bool | None = None                            # the weights of the lowest valid_loss; null: fine-tuning
    local: Words | None = None                               # a folder on each node's own disk: copies for restarts
    resume: Words = "auto"                                   # auto | never | path of a checkpoint
    load: Words | None = None                                # weights only, step 0


class EvalConfig(Section):
    """`every` in steps (0: never)."""

    every: NonNegative = 500
    batches: Count = 20                                      # global batches per evaluation
    tasks: tuple[Words, ...] = ()                            # files of questions, as `octant eval --tasks` takes them
    tasks_every: NonNegative | None = None                   # steps; null: as `every`


class LogConfig(Section):
    """`every` in steps; `wandb` names a project, `mlflow` an experiment."""

    every: Count = 1
    tensorboard: bool = False
    wandb: Words | None = None
    mlflow: Words | None = None


class ProfileConfig(Section):
    """What torch's profiler records: steps [a, b) of the run, on some ranks."""

    steps: tuple[Count, Count] | None = None                 # [10, 13]: steps 10 to 12; null: nothing
    memory: bool = False                                     # a snapshot of the GPU's memory as well
    ranks: tuple[NonNegative, ...] = (0,)

    @model_validator(mode="after")
    def _some_steps(self) -> ProfileConfig:
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            raise ValueError(f"steps {list(self.steps)} hold no step: [10, 13] is steps 10 to 12")
        return self


class KernelsConfig(Section):
    """Who computes each operation: `auto`, or the name of an implementation that `octant doctor` lists."""

    attention: Words = "auto"
    attention_block: Words = "auto"                          # of ring attention (context > 1)
    rms_norm: Words = "auto"
    layer_norm: Words = "auto"
    rope: Words = "auto"
    swiglu: Words = "auto"
    relu2: Words = "auto"
    cross_entropy: Words = "auto"
    log_probs: Words = "auto"
    linear: Words = "auto"
    weight_gradient: Words = "auto"
    fp8_product: Words = "auto"
    adamw: Words = "auto"


class Config(Section):
    """A whole job."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    tokens: Tokens | None = None                             # instead of `steps`: the steps nearest to it
    steps: Count = Field(default=None, validate_default=True,
                         json_schema_extra=_without_default)
    adapter: AdapterConfig | None = None                     # absent: everything trains
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()
    orpo: ORPOConfig = ORPOConfig()
    sft: SFTConfig = SFTConfig()
    roles: RolesConfig = RolesConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    grpo: GRPOConfig = GRPOConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _a_step_is_its_texts(cls, values: Any) -> Any:
        """`batch.global` of a run that learns from its own texts is how many it makes in a step."""
        if not isinstance(values, dict):
            return values
        run, batch = values.get("run"), values.get("batch", {})
        objective = run.get("objective") if isinstance(run, dict) else getattr(run, "objective", None)
        texts = texts_of_a_step(objective, values.get("rollout", {}), values.get("grpo", {}))
        if texts is None or not isinstance(batch, dict) or "global" in batch:
            return values
        return values | {"batch": batch | {"global": texts}}

    @field_validator("steps", mode="before")
    @classmethod
    def _long_enough(cls, value: object, info: ValidationInfo) -> object:
        """The steps of `tokens` where they are not given; any number where a fault of those is the problem already."""
        if value is not None or "tokens" not in info.data:
            return 1 if value is None else value
        if (tokens := info.data["tokens"]) is None:
            raise ValueError("is missing; give it, or tokens")
        known = "batch" in info.data and "data" in info.data
        return info.data["batch"].steps(tokens, info.data["data"].seq_len) if known else 1

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = [*self._length_problems()]
        if self.data.seq_len > self.model.max_seq_len:
            problems.append(f"data.seq_len({self.data.seq_len}) > model.max_seq_len({self.model.max_seq_len}): "
                            "shorten the sequences or raise the model's maximum")
        if (tokens := self.num_samples * self.data.seq_len) >= 2**63:
            problems.append(f"steps({self.steps:,}) × batch.global({self.batch.global_:,}) × data.seq_len("
                            f"{self.data.seq_len:,}) = {tokens:.1e} tokens, more than can be counted")
        if self.precision.compute == "fp16" and self.precision.fp8 != "off":
            problems.append(f"precision.fp8: {self.precision.fp8} goes with precision.compute: bf16; for fp16 it must "
                            "be off")
        if self.precision.compute == "fp16" and self.run.objective in RL_OBJECTIVES:
            problems.append(f"precision.compute: fp16 scales the loss, which run.objective: {self.run.objective} has "
                            "not: use bf16 or fp32")
        plain = (rope := self.model.rope_scaling) and rope.type == "dynamic" and rope.original_max_seq_len
        if self.run.objective in RL_OBJECTIVES and plain and self.data.seq_len > plain:
            problems.append(f"run.objective: {self.run.objective} samples by a text's length so far, but dynamic RoPE "
                            f"trains by data.seq_len({self.data.seq_len}): make it {plain} or less, or take type: yarn")
        if self.optim.min_lr > self.optim.lr:
            problems.append(f"optim.min_lr({self.optim.min_lr}) > optim.lr({self.optim.lr})")
        if not problems:
            problems += self.optim.decay.problems(round(self.num_batches), self.rates)
        if self.optim.name == "adafactor" and self.parallel.reproducible:
            problems.append("optim.name adafactor sums over rows and columns shard by shard, so its bits depend on the "
                            "number of data-parallel ranks, and parallel.reproducible cannot hold: set it to false")
        if self.model.position == "alibi" and self.parallel.context > 1:
            problems.append(f"parallel.context({self.parallel.context}) has attention in blocks, whose kernels know no "
                            "model.position: alibi: set parallel.context to 1")
        if self.model.attention_softcap and self.parallel.context > 1:
            problems.append(f"parallel.context({self.parallel.context}) has attention in blocks, whose kernels know no "
                            f"model.attention_softcap({self.model.attention_softcap:g}): set parallel.context to 1")
        if self.model.window is not None and self.parallel.context > 1:
            problems.append(f"parallel.context({self.parallel.context}) has every token see all before it, and this "
                            f"model's see {self.model.window} (model.window): set parallel.context to 1")
        problems += self._adapter_problems()
        problems += self._source_problems()
        problems += fault_problems(self.reliability.inject or (), self.run.objective)
        problems += self._role_problems() if self.run.objective in RL_OBJECTIVES else ()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _length_problems(self) -> Iterator[str]:
        if self.tokens is not None and self.steps != (steps := self.batch.steps(self.tokens, self.data.seq_len)):
            yield (f"tokens({self.tokens:,}) are {steps:,} steps of this batch, and steps is {self.steps:,}: leave one "
                   "of them out")
        if self.optim.warmup is not None and self.optim.warmup_steps:
            yield (f"optim.warmup is {self.optim.warmup} and optim.warmup_steps {self.optim.warmup_steps}: leave one "
                   "of them out")

    def _adapter_problems(self) -> Iterator[str]:
        if self.run.objective == "dpo" and self.dpo.reference == "live" and self.adapter is None:
            yield ("dpo.reference: live is the model without its adapter, and there is no adapter: set it to cached, "
                   "or train one")
        if self.adapter is None or HEAD not in self.adapter.targets:
            return
        if self.model.tie_embeddings:
            yield ("adapter.targets has lm_head, whose weight is the embedding too (model.tie_embeddings), which it "
                   "would no longer be: leave lm_head out")
        if self.model.head != "language_model":
            yield f"adapter.targets has lm_head, which a model with model.head: {self.model.head} does not have"
        if self.adapter.targets == (HEAD,) and self.parallel.pipeline > 1:
            yield (f"adapter.targets is lm_head alone: all but the last of parallel.pipeline({self.parallel.pipeline}) "
                   "stages would have nothing to train")

    def _source_problems(self) -> Iterator[str]:
        """Kinds of data that the objective does not learn from."""
        objective = self.run.objective
        if self.optim.z_loss and objective != "pretrain":
            yield (f"optim.z_loss({self.optim.z_loss:g}) is added to the loss of run.objective pretrain, and it is "
                   f"{objective}: leave optim.z_loss out")
        if self.data.fim and objective != "pretrain":
            yield f"data.fim rearranges texts, for run.objective pretrain, and it is {objective}: leave data.fim out"
        if self.eval.tasks and (objective not in ("pretrain", "sft") or self.data.tokenizer is None):
            yield (f"eval.tasks are texts for a language model: they need run.objective pretrain or sft ({objective}) "
                   f"and data.tokenizer ({self.data.tokenizer})")
        for source in (*self.data.train, *self.data.valid):
            if objective == "pretrain" and (source.kind == "chat" or source.columns):
                yield f"{source.path} is of conversations, which run.objective pretrain does not read: set it to sft"
            if objective == "sft" and source.kind == "pretrain" and self.sft.ptx_weight == 0:
                yield (f"{source.path} is pretraining data (kind: pretrain), and sft.ptx_weight is 0, so that nothing "
                       "would be learned from it: give it a weight")
            if objective in RL_OBJECTIVES and source.kind == "pretrain" and self.learning.ptx_coef == 0:
                yield (f"{source.path} is pretraining data (kind: pretrain), and {self.learning_section}.ptx_coef is 0,"
                       " so that nothing would be learned from it: give it a weight")
            if objective not in ("pretrain", "sft", *RL_OBJECTIVES) and source.kind == "pretrain":
                yield f"{source.path} is pretraining data (kind: pretrain), from which {objective} does not learn"

    def _role_problems(self) -> Iterator[str]:
        """What a run that learns from its own texts lacks, or says twice."""
        objective, rollout, learning = self.run.objective, self.rollout, self.learning
        if (texts := self.texts_per_step) != self.batch.global_:
            yield (f"batch.global({self.batch.global_}) is not the {texts} texts of a step (rollout.prompts × samples "
                   "of each): leave batch.global out")
        if objective in GROUP_OBJECTIVES and rollout.samples not in (1, self.grpo.group):
            yield (f"rollout.samples({rollout.samples}) and grpo.group({self.grpo.group}) are the same number for "
                   f"{objective}: leave one of them out")
        if texts % learning.minibatch:
            yield (f"{self.learning_section}.minibatch({learning.minibatch}) does not divide the {texts} texts of a "
                   "step (rollout.prompts × samples of each)")
        if rollout.max_new_tokens >= self.data.seq_len:
            yield (f"rollout.max_new_tokens({rollout.max_new_tokens}) leaves no room for a prompt in data.seq_len("
                   f"{self.data.seq_len})")
        if learning.ptx_coef and not any(source.kind == "pretrain" for source in self.data.train):
            yield (f"{self.learning_section}.ptx_coef({learning.ptx_coef}) weighs pretraining data, and no source of "
                   "data.train has kind: pretrain")
        if not self.roles.reward:
            yield (f"run.objective {objective} needs something that scores its texts: roles.reward, as {{load: RUN}} "
                   "of a reward model, or {function: NAME}")
        if self.model.head != "language_model":
            yield f"model.head is {self.model.head}; the actor of {objective} writes texts: set it to language_model"
        try:
            _ = self.critic_optim
        except ValidationError as error:
            yield f"roles.critic.optim: {error.errors()[0]['msg']}"
        except ValueError as error:
            yield f"roles.critic.optim: {error}"

    @property
    def learning_section(self) -> str:
        """Where a run that learns from its own texts says how."""
        return "grpo" if self.run.objective in GROUP_OBJECTIVES else "ppo"

    @property
    def learning(self) -> PPOConfig | GRPOConfig:
        """That section."""
        return self.grpo if self.run.objective in GROUP_OBJECTIVES else self.ppo

    @property
    def samples_per_prompt(self) -> int:
        """Texts that are made of one prompt."""
        return self.grpo.group if self.run.objective in GROUP_OBJECTIVES else self.rollout.samples

    @property
    def texts_per_step(self) -> int:
        """Texts that a step makes and learns from."""
        return self.rollout.prompts * self.samples_per_prompt

    @property
    def critic_optim(self) -> OptimConfig:
        """The critic's optimizer settings: the run's, as `roles.critic.optim` changes them."""
        return OptimConfig.model_validate(merged_optim(self.optim.model_dump(mode="json", by_alias=True),
                                                       self.roles.critic.optim, [*OptimConfig.model_fields]))

    @property
    def records(self) -> str | None:
        """The kind of records in the run's conversation files; None: it learns from text."""
        records = OBJECTIVES[self.run.objective].records
        return "ranked" if self.run.objective == "reward" and self.reward.loss == "kwise" else records

    @property
    def rows_per_sample(self) -> int:
        """Rows of a batch that one sample takes: 2 for a pair."""
        return {PAIRS: 2, "ranked": self.reward.answers}.get(self.records or "", 1)

    @property
    def num_microbatches(self) -> int:
        """Microbatches each pipeline works through in a step (the layout must be resolved)."""
        return self.batch.global_ // (self.batch.micro * self.parallel.data_size)

    @property
    def ramp(self) -> Ramp:
        """The sizes of the batches."""
        return self.batch.sizes(self.data.seq_len)

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.ramp.samples(self.steps)

    @property
    def num_batches(self) -> float:
        """The run's length in batches of the final size: by these the learning rate goes."""
        return self.num_samples / self.batch.global_

    @property
    def rates(self) -> OptimConfig:
        """`optim` with the warm-up in batches of the final size."""
        warmup = self.optim.warmup
        if warmup is None:
            return self.optim
        batches: float
        if isinstance(warmup, int):
            batches = warmup
        elif warmup.endswith("%"):
            batches = self.num_batches * float(warmup[:-1]) / 100
        else:
            batches = read_tokens(warmup) / self.data.seq_len / self.batch.global_
        return self.optim.model_copy(update={"warmup_steps": batches, "warmup": None})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the YAML key names; `Config.model_validate` reads them back."""
        return self.model_dump(mode="json", by_alias=True)

    def dump(self) -> str:
        """YAML of the resolved configuration, enough to run it again."""
        return dump_yaml(self.to_dict())

    def with_changes(self, **sections: dict[str, Any]) -> Config:
        """A copy with some keys of some sections replaced, checked again: `with_changes(optim={"lr": 1e-3})`."""
        values = self.to_dict()
        for section, changes in sections.items():
            values[section] = values[section] | changes
        return Config.model_validate(values)
