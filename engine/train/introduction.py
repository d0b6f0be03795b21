"""What is about to run, in plain numbers and without torch: said before the seconds that importing it takes."""

from __future__ import annotations

from engine.config import Config, role_configs, world_size_of
from engine.data.chat.comparisons import ComparisonSource
from engine.data.chat.rows import ConversationSource
from engine.model.flops import count_adapter, count_parameters
from engine.train.corpora import Corpora


def introduction(config: Config, corpora: Corpora) -> list[str]:
    """Lines about the job of `config` (resolved), each of at most 80 characters but for long names."""
    parallel, batch = config.parallel, config.batch
    step_tokens = batch.global_ * config.data.seq_len
    smallest = config.ramp.stages[0].size * config.data.seq_len
    size = parallel.world_size
    lines = [
        f"{config.run.name or config.run.dir}: a model of {short(count_parameters(config.model).total)} parameters",
        *_trained(config),
        f"{config.steps:,} steps of {f'{short(smallest)} to ' * bool(batch.ramp)}{short(step_tokens)} tokens, "
        f"{short(config.num_samples * config.data.seq_len)} tokens in all",
        f"{size} process{'es' * (size > 1)}: tensor {parallel.tensor} × pipeline {parallel.pipeline} × "
        f"context {parallel.context} × data {parallel.data_size}, {parallel.schedule}, ZeRO {parallel.zero}",
        f"a step: {batch.global_:,} sequences of {config.data.seq_len:,} tokens, {batch.micro} at a time",
    ]
    for share in corpora.train.report(config.num_samples):
        lines.append(f"corpus {share.name}: {short(share.source_tokens)} tokens, {share.share:.1%} of the samples, "
                     f"{share.epochs:.2f} epochs")
    lines += [_about_rows(source) for source in corpora.conversations]
    lines += [_about_comparisons(source) for source in corpora.comparisons]
    wanted, held_out = config.eval.batches * batch.global_, corpora.num_evaluated(config)
    if corpora.valid is not None and config.eval.every and held_out < wanted:
        lines.append(f"evaluation: all {held_out:,} held-out windows (eval.batches asks for {wanted:,})")
    return lines


def introduction_of_roles(config: Config) -> list[str]:
    """The same for a run with roles: who is where, and what a step is."""
    world, rollout, learning = world_size_of(config), config.rollout, config.learning
    lines = [f"{config.run.name or config.run.dir}: {config.run.objective}, {config.steps:,} steps on {world} "
             f"process{'es' * (world > 1)}"]
    for name, (ranks, own) in role_configs(config, world).items():
        parallel = own.parallel
        where = f"rank {ranks.start}" if len(ranks) == 1 else f"ranks {ranks.start} to {ranks.stop - 1}"
        cut = [f"{axis} {getattr(parallel, axis)}" for axis in ("tensor", "pipeline", "context", "data")
               if getattr(parallel, axis) > 1]
        lines.append(f"{name}: {short(count_parameters(own.model).total)} parameters on {where}"
                     + f", {' × '.join(cut)}" * bool(cut))
    lines.append(f"a step: {rollout.prompts:,} prompts, {config.texts_per_step:,} texts of at most "
                 f"{rollout.max_new_tokens:,} tokens, {learning.epochs} epochs of "
                 f"{config.texts_per_step // learning.minibatch} updates")
    return lines


def _trained(config: Config) -> list[str]:
    """How much of the model an adapter trains."""
    if config.adapter is None:
        return []
    total = count_parameters(config.model).total
    score = config.model.hidden_size if config.model.head == "score" else 0
    trained = count_adapter(config.model, config.adapter) + score
    return [f"{trained:,} of {total:,} train: an adapter of rank {config.adapter.rank} on "
            f"{', '.join(config.adapter.targets)}"]


def _about_rows(source: ConversationSource) -> str:
    """How conversations lie in sequences, and what did not fit."""
    in_rows = sum(map(len, source.rows))
    how = "packed into" if source.fit.packed else "in"
    rows = f"{len(source.rows):,} sequences, {source.padding:.1%} padding"
    line = f"{source.name}: {in_rows:,} conversations {how} {rows}"
    return line + _did_not_fit(source)


def _about_comparisons(source: ComparisonSource) -> str:
    return f"{source.name}: {source.num_windows:,} {source.corpus.kind}" + _did_not_fit(source)


def _did_not_fit(source: ConversationSource | ComparisonSource) -> str:
    told = ((source.num_cut, "cut at their end, with no end token to learn there"),
            (source.num_left_out, "too long and left out"),
            (source.corpus.about["skipped"], "unusable and left out"))
    return "".join(f", {count:,} {what}" for count, what in told if count)


def short(number: float) -> str:
    """`1.24 B`, `310 M`, `98.3 k`, `512`: three digits."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit * 0.9995:
            value = number / limit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"
