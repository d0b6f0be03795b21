"""Generation: texts pass through the model together, one token of each at a time, and take each other's places.

    plan       who is fed, and where it is stored            `engine.generate.scheduler`
    pass       beginnings of texts, and the newest token     [tokens, 1], see `engine.generate.cache`
               of each that is under way
    choose     the token that follows each newest one        `engine.generate.sampling`

Every tensor rank computes its heads and its columns of the logits; the columns of the newest tokens alone are gathered,
so all tensor ranks of the last stage choose from the same bits.  The choices go up the pipeline: every rank knows every
text, plans the next pass by itself, and all stop together.

*Pipelines.*  One token of a text depends on the one before, so a stage can work only on texts whose last choice has
come back.  Places are therefore dealt to as many lanes as there are stages; while one lane is in the last stage, the
others are in those before:

    stage 0    a b c │ a b c │ a …           each choice travels while the other lanes are computed
    stage 1      a b   c a b   c
    stage 2        a   b c a   b c

The host reads the choices of a pass (ids and their log-probabilities, one tensor), to know which texts have ended, and
nothing else.

Copies of the model (data parallelism) take prompts in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import ModelConfig
from engine.distributed.agree import gather_json, maximum
from engine.distributed.collectives import DONE, Work, all_gather, broadcast
from engine.errors import RequestError
from engine.generate.blocks import BLOCK_TOKENS, Blocks, blocks_for
from engine.generate.cache import Cache, Fed, Pass
from engine.generate.request import Limits, Sampling
from engine.generate.sampling import Name, choose, penalise, put
from engine.generate.scheduler import Beginning, Plan, Scheduler, Text
from engine.kernels.documents import Documents
from engine.model.context import Batch
from engine.parallel.parallelize import ParallelModel

FREE_SHARE = 0.8                     # of a GPU's free memory that a cache may take where nothing else is said


class New(NamedTuple):
    """One more token of a text.

    Attributes:
        text: number of the text, prompt · samples + sample.
        log_prob: at the temperature, over all ids that can be chosen, before top-k and top-p.
        end: why the text ends with it: `eod` (a stop id), `stop` (a stop string) or `length`; empty: it does not.
    """

    text: int
    token: int
    log_prob: float
    end: str


@dataclass
class Made:
    """A text that is complete.

    Attributes:
        tokens: new ids; the last one is a stop id if `end` is `eod`.
        log_probs, end: see `New`.
    """

    tokens: list[int]
    log_probs: list[float]
    end: str

    def add(self, new: New) -> None:
        """Its next token."""
        self.tokens.append(new.token)
        self.log_probs.append(new.log_prob)
        self.end = new.end


class Generator:
    """Continues texts with a model made by `parallelize(…, training=False)`, one chunk per pipeline stage.

    All ranks of the model call its methods alike.
    """

    def __init__(self, model: ParallelModel, num_ids: int | None = None, *, rows: int = 64,
                 cache_bytes: int | None = None) -> None:
        """
        Args:
            num_ids: choose among so many ids, those of the tokenizer; None: all that the model has.
            rows: texts that a copy of the model works on at a time.
            cache_bytes: memory of keys and values on each rank; None: what these texts can need, on a GPU at most
                four fifths of what is free.
        """
        [self._chunk] = model.chunks.values()
        self._model, self._mesh = model.config.model, model.mesh
        self.num_ids = min(num_ids or self._model.vocab_size, self._model.vocab_size)
        self._weight = next(self._chunk.parameters())        # its dtype is the model's
        self.rows, self._cache_bytes = rows, cache_bytes
        self._sending: deque[tuple[Work, Tensor]] = deque()
        self.tokens_fed = 0                                  # in all passes so far

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits, *, samples: int = 1,
                 step: int = 0, numbers: Sequence[int] | None = None) -> list[Made]:
        """The new tokens of `samples` texts of every prompt, on every rank; see `stream`."""
        check_prompts(prompts, self._model)
        copies, copy = self._mesh.data.size, self._mesh.data.index
        names = range(len(prompts)) if numbers is None else numbers
        mine = prompts[copy::copies]
        made = self.own(mine, sampling, limits, samples=samples, step=step, numbers=names[copy::copies]) if mine else []
        if copies == 1:
            return made
        speaks = self._mesh.tensor.index == self._mesh.pipeline.index == 0
        told = gather_json([[text.tokens, text.log_probs, text.end] for text in made] if speaks else None,
                           self._mesh.world.group)
        found: dict[int, Made] = {}
        for rank, texts in enumerate(told):
            for place, text in enumerate(texts or ()):
                prompt, sample = divmod(place, samples)
                place_of_copy = self._mesh.topology.coordinates(rank)["data"]
                found[(place_of_copy + prompt * copies) * samples + sample] = Made(*text)
        return [found[number] for number in range(len(prompts) * samples)]

    def own(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits, *, samples: int = 1,
            step: int = 0, numbers: Sequence[int] | None = None) -> list[Made]:
        """The same by this copy of the model alone, known to its ranks alone."""
        texts = [Made([], [], "") for _ in range(len(prompts) * samples)]
        for new in self.stream(prompts, sampling, limits, samples=samples, step=step, numbers=numbers):
            texts[new.text].add(new)
        return texts

    def stream(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits, *, samples: int = 1,
               step: int = 0, numbers: Sequence[int] | None = None) -> Iterator[New]:
        """Tokens as they are chosen, those of each text in order, by this copy of the model alone.

        Args:
            prompts: token ids, at least one each.
            samples: texts of each prompt.
            step, numbers: of training and of each prompt (None: 0, 1, …): they name the random numbers, with the
                sample and the position, so a prompt gives the same texts in whichever batch it is.

        Raises:
            RequestError: see `check_prompts`; or a text does not fit the cache.
        """
        texts = self.texts(prompts, limits, samples, step, numbers)
        lanes = max(1, min(self._mesh.pipeline.size, self.rows, len(texts)))
        rows = -(-min(self.rows, len(texts)) // lanes)
        blocks = Blocks(self.num_blocks([blocks_for(text.longest - 1) for text in texts], rows * lanes))
        scheduler, cache = Scheduler(texts, blocks, lanes, rows), self.new_cache(blocks.total)
        watchers = {text.number: limits.watch(text.tokens) for text in texts} if limits.watch is not None else {}
        under_way: deque[tuple[int, Plan, Tensor, Work]] = deque()
        turn = 0
        while scheduler.busy:
            if len(under_way) == lanes:
                lane, plan, chosen, work = under_way.popleft()
                work.wait()
                for text, token, log_prob in zip(plan.texts, *chosen.tolist(), strict=True):
                    new = New(text.number, int(token), log_prob, "")
                    text.tokens.append(new.token)
                    stopped = bool(watchers) and watchers[text.number](new.token)
                    end = "eod" if new.token in limits.stop_ids else "stop" if stopped else \
                        "length" if len(text.tokens) == text.longest else ""
                    if end:
                        scheduler.end(lane, text)
                    yield new._replace(end=end)
                continue
            plan = scheduler.plan(turn)
            under_way.append((turn, plan, *self._pass(plan, cache, sampling)))
            turn = (turn + 1) % lanes

    def new_cache(self, num_blocks: int) -> Cache:
        """An empty cache for this rank's layers and key-value groups."""
        return Cache(map(int, self._chunk.layers), num_blocks, self._groups, self._model.head_dim,
                     dtype=self._weight.dtype, device=self._mesh.device)

    @torch.inference_mode()
    def next_logits(self, plan: Plan, cache: Cache) -> Tensor | None:
        """Feeds a pass; logits of the token behind each of its texts, [B, num_ids], on the last stage.

        Returns:
            None on the other stages.
        """
        batch = self._batch(plan, cache)
        self.tokens_fed += len(batch.tokens_SB)
        first = self._mesh.is_first_stage
        x_SBH = self._chunk.hidden_states(batch.tokens_SB if first else self._receive(batch.tokens_SB), batch)
        if not self._mesh.is_last_stage:
            self._send(x_SBH)
            return None
        columns_BV = self._chunk.logits(x_SBH[-len(plan.texts):]).squeeze(1)
        return all_gather(columns_BV.T, self._mesh.tensor).T[:, : self.num_ids]      # padding comes last

    def share(self, chosen: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Work]:
        """Starts telling every stage what the last one has chosen, fp64; None on ranks that chose nothing."""
        if chosen is None:
            chosen = torch.empty(shape, dtype=torch.float64, device=self._mesh.device)
        pipeline = self._mesh.pipeline
        return chosen, broadcast(chosen, pipeline, pipeline.size - 1, asynchronous=True)

    @torch.inference_mode()
    def _pass(self, plan: Plan, cache: Cache, sampling: Sampling) -> tuple[Tensor, Work]:
        """Feeds and chooses: ids and log-probabilities [2, texts], there when the handle says so."""
        if not plan.texts:
            return torch.empty(2, 0), DONE
        logits = self.next_logits(plan, cache)
        chosen = None
        if logits is not None:
            if sampling.repetition_penalty != 1:
                logits = penalise(logits, [text.tokens for text in plan.texts], sampling.repetition_penalty)
            keys = [text.name.at(sampling.seed, len(text.tokens)) for text in plan.texts if sampling.temperature]
            chosen = choose(logits, sampling, keys)
        return self.share(chosen, (2, len(plan.texts)))

    def _batch(self, plan: Plan, cache: Cache) -> Batch:
        """What a plan says, as tensors; one transfer to the device."""
        tokens: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []                              # of each text when its token was fed for the first time
        slots: list[int] = []
        bounds = [0]
        for new, table, num_prompt in plan.beginnings:
            tokens += new
            positions += range(len(new))
            lengths += (max(num_prompt, i + 1) for i in range(len(new)))
            slots += (table[i // BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS for i in range(len(new)))
            bounds.append(len(tokens))
        lasts = [len(text.tokens) - 1 for text in plan.texts]
        tokens += (text.tokens[-1] for text in plan.texts)
        positions += lasts
        lengths += (last + 1 for last in lasts)
        slots += (text.table[last // BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS
                  for text, last in zip(plan.texts, lasts, strict=True))
        longest = max(lasts) + 1
        width = blocks_for(longest)
        strip = _strip(plan.texts[0].table[:width], longest) if len(lasts) == 1 else None
        tables = [] if strip is not None else [
            block for text in plan.texts for block in (*text.table[:width], *[0] * (width - len(text.table)))]
        copies = [block for pair in plan.copies for block in pair]
        everything = put(torch.tensor([*tokens, *positions, *lengths, *slots, *tables, *copies]), self._mesh.device)
        tokens_S, positions_S, lengths_S, slots_S, tables_N, copies_N = everything.split(
            [len(tokens), len(tokens), len(tokens), len(tokens), len(tables), len(copies)])
        beginnings = None
        if plan.beginnings:
            starts = put(torch.tensor(bounds, dtype=torch.int32), self._mesh.device)
            beginnings = Documents((tuple(bounds),), starts)
        visible = None
        if min(lasts) < longest - 1:
            newest_B = positions_S[-len(lasts):]
            visible = (torch.arange(longest, device=self._mesh.device) <= newest_B[:, None])[:, None, None]
        fed = Fed(slots_S, beginnings, copies_N.view(-1, 2).T if copies else None, tables_N.view(len(lasts), -1),
                  longest, visible, strip)
        return Batch(tokens_S.unsqueeze(1), positions_S.unsqueeze(1), cache=Pass(cache, fed),
                     seq_len=lengths_S.unsqueeze(1))

    def _send(self, x_SBH: Tensor) -> None:
        """To the next stage; kept until it has left."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        x_SBH, pipeline = x_SBH.contiguous(), self._mesh.pipeline
        work = dist.isend(x_SBH, pipeline.ranks[pipeline.index + 1], group=pipeline.group)
        self._sending.append((work, x_SBH))

    def _receive(self, tokens_SB: Tensor) -> Tensor:
        """The hidden states of these tokens from the stage before."""
        pipeline = self._mesh.pipeline
        shape = (*tokens_SB.shape, self._model.hidden_size)
        x_SBH = torch.empty(shape, dtype=self._weight.dtype, device=self._mesh.device)
        dist.recv(x_SBH, pipeline.ranks[pipeline.index - 1], group=pipeline.group)
        return x_SBH

    def texts(self, prompts: Sequence[Sequence[int]], limits: Limits, samples: int = 1, step: int = 0,
              numbers: Sequence[int] | None = None) -> list[Text]:
        """All that are asked for, none of them begun.

        Raises:
            RequestError: see `check_prompts`.
        """
        check_prompts(prompts, self._model)
        texts = []
        for place, prompt in enumerate(prompts):
            number = place if numbers is None else numbers[place]
            beginning = Beginning(prompt[:-1], samples)
            longest = min(len(prompt) + limits.max_new_tokens, self._model.max_seq_len)
            texts += [Text(place * samples + sample, Name(step, number, sample), list(prompt), len(prompt), longest,
                           beginning) for sample in range(samples)]
        return texts

    @property
    def _groups(self) -> int:
        """Key-value groups on this rank."""
        return max(1, self._model.num_kv_heads // self._mesh.tensor.size)

    def num_blocks(self, needs: Sequence[int], rows: int) -> int:
        """Of the cache, given what each text can need.

        Raises:
            RequestError: it cannot hold the longest.
        """
        elements = 2 * BLOCK_TOKENS * len(self._chunk.layers) * self._groups * self._model.head_dim
        one = elements * self._weight.element_size()
        room = sum(sorted(needs)[-rows:]) + rows               # and each its copy of the end of a beginning
        allowed = self._cache_bytes
        if allowed is None and self._mesh.device.type == "cuda":
            device = self._mesh.device       # what the allocator keeps and nobody uses is free, too: that of idle roles
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            allowed = int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + kept))
        if allowed is not None:
            room = min(room, allowed // max(one, 1))
            [less] = maximum([-room], self._mesh.world.group)
            room = -less
        if room < max(needs):
            raise RequestError(
                f"a text of up to {max(needs) * BLOCK_TOKENS:,} tokens needs {max(needs) * one / 2**20:,.1f} MiB of "
                f"keys and values on each rank, {room * one / 2**20:,.1f} MiB are there: fewer new tokens, shorter "
                "prompts, or more ranks")
        return room


def _strip(table: Sequence[int], length: int) -> slice | None:
    """So many slots of these blocks, if they are neighbours in order."""
    first = table[0] * BLOCK_TOKENS
    together = all(after == before + 1 for before, after in pairwise(table))
    return slice(first, first + length) if together else None


def check_prompts(prompts: Sequence[Sequence[int]], model: ModelConfig) -> None:
    """
    Raises:
        RequestError: there is no prompt, or one is empty, leaves no room for a token, or holds ids the model lacks.
    """
    longest, size = model.max_seq_len, model.vocab_size
    if not prompts:
        raise RequestError("no prompt to go on from")
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < longest:
            raise RequestError(f"prompt {number} has {len(prompt)} tokens; with the model's maximum of {longest} "
                               f"(model.max_seq_len) it takes 1 to {longest - 1}, so that one can be added")
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise RequestError(f"prompt {number} holds the token id {wrong[0]}; the model's vocabulary has {size} "
                               f"(0 to {size - 1})")
