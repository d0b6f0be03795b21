"""`octant eval --harness` on one rank: the tasks of EleutherAI's lm-evaluation-harness, on a model in any layout.

The harness asks three things of a model, text for text: log p of a continuation and whether greedy decoding would give
it, log p of a whole text in windows, and a text that goes on until a string.  `OctantModel` answers them; all ranks run
the same tasks in the same order, so that every pass through the model is one of all ranks, and rank 0 prints.

What a text begins with, where nothing stands before it, is the end of another document, as in training, or with `--bos`
the beginning of text.  Whether a label is the likeliest id is read off its probability at a temperature near 0, which
needs no logits of the whole vocabulary in one place.

In a program of one's own, `lm_eval.simple_evaluate(OctantModel(…), tasks=…)` takes the same class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from torch import Tensor

from engine.data.tokenizer import Tokenizer
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.generator import Generator
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
from engine.generate.request import HarnessRequest, Limits, Sampling
from engine.generate.score import each_row
from engine.generate.tasks import Row, batch_of
from engine.generate.text import StopStrings
from engine.model.context import Batch
from engine.model.objective import Head
from engine.parallel.parallelize import ParallelModel
from engine.reading import said

COLD = 1e-6                                                  # a temperature at which one id has all of the probability


class OctantModel(TemplateLM):
    """A model made by `parallelize(…, training=False)`; all its ranks call its methods alike.

    Args:
        end_ids: end a text besides the end of a document.
        begin: texts begin with the beginning-of-text id.
    """

    def __init__(self, model: ParallelModel, tokenizer: Tokenizer, end_ids: Sequence[int] = (),
                 begin: bool = False) -> None:
        super().__init__()
        if begin and tokenizer.bos_id is None:
            raise RequestError(f"--bos: tokenizer {tokenizer.name} has no beginning-of-text id")
        self.model, self.ids, self.max_length = model, tokenizer, model.config.model.max_seq_len
        self._end_ids, self._begin, self.max_gen_toks = {tokenizer.eod_id, *end_ids}, begin, 256
        self._generator = Generator(model, tokenizer.vocab_size, rows=model.config.batch.micro)

    @property
    def eot_token_id(self) -> int:
        return self.ids.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.ids.bos_id if self._begin and self.ids.bos_id is not None else self.ids.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begins = self._begin and add_special_tokens is not False
        return [*([self.prefix_token_id] if begins else []), *self.ids.encode(string)]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-(self.max_length + 1):]
            rows.append(Row(tokens, max(1, len(tokens) - len(continuation))))
        ordered = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
        found = each_row(self.model, [rows[index] for index in ordered], batch_of, log_prob_and_misses, "answering",
                         numbers=2)
        answers: dict[int, tuple[float, bool]] = {
            index: (log_p, misses == 0) for index, (log_p, misses) in zip(ordered, found, strict=True)}
        return [answers[index] for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            windows += [(number, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False), max_seq_len=self.max_length,
                prefix_token=self.prefix_token_id, context_len=1)]
        sums = [0.0] * len(requests)
        for (number, *_), (log_p, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_p
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """All requests with the same arguments at once."""
        made: dict[int, str] = {}

        def arguments(number: int) -> str:
            return json.dumps(requests[number].args[1], sort_keys=True, default=str)

        for _, numbers in groupby(sorted(range(len(requests)), key=arguments), key=arguments):
            batch = list(numbers)
            asked = normalize_gen_kwargs(dict(requests[batch[0]].args[1]), self.max_gen_toks)
            until = [string for string in handle_stop_sequences(asked["until"], eos=None) if string]
            new = min(asked["max_gen_toks"], self.max_length - 1)
            prompts = [self._prompt(requests[number].args[0], self.max_length - new) for number in batch]
            sampling = Sampling(asked.get("temperature") or 0.0, asked.get("top_k") or 0, asked.get("top_p") or 1.0)
            limits = Limits(new, self._end_ids, partial(StopStrings, self.ids, until) if until else None)
            for number, text in zip(batch, self._generator.generate(prompts, sampling, limits), strict=True):
                made[number] = postprocess_generated_text(self.ids.decode(text.tokens), until, None)
        return [made[number] for number in range(len(requests))]

    def _prompt(self, context: str, room: int) -> list[int]:
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:]


def log_prob_and_misses(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: log p of the labels that count, of every row, and how many of them are not the likeliest id."""
    assert batch.labels_SB is not None and batch.loss_mask_SB is not None
    log_p = -head.token_losses(x_SBH, batch.labels_SB)
    cold, _ = head.token_log_probs_and_entropy(x_SBH, batch.labels_SB, COLD)
    missed = (cold < -1) & batch.loss_mask_SB
    return [head.sum_over_sequence((log_p * batch.loss_mask_SB).sum(0)), head.sum_over_sequence(missed.float().sum(0))]


def manager_for(request: HarnessRequest) -> TaskManager:
    """What knows the tasks; the thousands that come with the harness are only read where they are asked for.

    Raises:
        RequestError: there is no such task.
    """
    unknown: Sequence[str] = request.harness
    for defaults in (False, True) if request.include else (True,):
        manager = TaskManager(include_path=request.include, include_defaults=defaults)
        known = {*manager.all_tasks}
        unknown = [task for task in request.harness if task not in known]
        if not unknown:
            return manager
    raise RequestError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, "
                       "and --include DIR adds a folder of yours")


def run_harness(request: HarnessRequest, topology: Topology, launched: LaunchEnvironment | None) -> None:
    """One rank of the job, from joining it to leaving it; rank 0 prints.

    Raises:
        RequestError: the harness does not know a task, or cannot load it.
        CheckpointError, DataError, ConfigError: what was asked cannot be done.
    """
    with joined_mesh(launched, topology, request.device) as mesh:
        reader = open_shared(request.checkpoint, mesh, request.base)
        tokenizer = load_tokenizer_of(reader, request.tokenizer)
        longest = reader.metadata["config"]["model"]["max_seq_len"]
        fill = 1 if topology.pipeline == 1 else 2 * topology.pipeline
        config = inference_config(reader, topology, Wanted(request.dtype, longest, request.batch_size, fill))
        model = OctantModel(load_model(reader, config, mesh), tokenizer, tuple(reader.end_ids), request.begin)
        manager = manager_for(request)
        try:
            found = simple_evaluate(model, tasks=list(request.harness), num_fewshot=request.fewshot,
                                    limit=request.limit, task_manager=manager, bootstrap_iters=0, log_samples=False)
        except (OSError, ValueError, KeyError) as error:         # a data set that cannot be fetched, above all
            raise RequestError(f"lm-evaluation-harness could not run {', '.join(request.harness)}: {said(error)}") \
                from error
        if mesh.rank == 0 and found is not None:
            print(json.dumps(found["results"]) if request.as_json else make_table(found), flush=True)
