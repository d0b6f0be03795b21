"""Generation: one pass over the prompts, then one token of every text at a time.

    prefill   all prompts at once, padded on the left      [longest, B] tokens     fills the cache
    decode    the newest token of each text                [1, B] tokens           reads and extends it

Every tensor rank computes its heads and its columns of the logits; the columns of the last position alone are gathered.
In a pipeline the hidden state goes from stage to stage.  The last stage chooses, its first tensor rank for all (one
decision, never T equal ones), and the chosen ids go to its tensor peers and up the pipeline: every rank knows every
text and they all stop together.

The host reads the chosen ids of a step, to know which texts have ended, and nothing else.

A pipeline of P stages generates P times slower than its stages could, for one token depends on the one before; it is
for models that fit no other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import ModelConfig
from engine.distributed.collectives import all_gather, broadcast
from engine.errors import RequestError
from engine.generate.cache import Cache, visible
from engine.generate.request import Limits, Sampling
from engine.generate.sampling import choose, put
from engine.model.context import Batch
from engine.parallel.parallelize import ParallelModel


class Generator:
    """Continues texts with a model made by `parallelize(…, training=False)`, one chunk per pipeline stage.

    All ranks of one copy of the model call its methods alike.
    """

    def __init__(self, model: ParallelModel, num_ids: int | None = None) -> None:
        """`num_ids`: choose among so many ids, those of the tokenizer; None: all that the model has."""
        [self._chunk] = model.chunks.values()
        self._model, self._mesh = model.config.model, model.mesh
        self._num_ids = min(num_ids or self._model.vocab_size, self._model.vocab_size)
        self._weight = next(self._chunk.parameters())        # its dtype is the model's

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits,
                 first_index: int = 0) -> list[list[int]]:
        """The new tokens of every prompt; the last one is a stop id where the text ended by itself.  See `stream`."""
        texts: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, sampling, limits, first_index):
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    text.append(token)
        return texts

    def stream(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits, first_index: int = 0,
               names: Sequence[str] | None = None,
               heard: Callable[[Tensor, Tensor], None] | None = None) -> Iterator[list[int | None]]:
        """One new token of every prompt at a time, None for texts that have ended.

        Args:
            prompts: token ids, at least one each.
            first_index: number of the first prompt; it names its random numbers, so a prompt gives the same text in
                whichever batch it is.
            names: what names the random numbers of each prompt instead.
            heard: told of every step's logits [B, num_ids] and choices [B], where the last stage is.

        Raises:
            RequestError: see `check_prompts`.
        """
        check_prompts(prompts, self._model)
        lengths = [len(prompt) for prompt in prompts]
        room = [min(limits.max_new_tokens, self._model.max_seq_len - length) for length in lengths]
        indices: Sequence[int | str] = names or range(first_index, first_index + len(prompts))
        fed_SB, padding_B = self._pad(prompts)
        cache = self.new_cache(max(lengths) + max(room) - 1, len(prompts))
        ended = [False] * len(prompts)
        for step in range(max(room)):
            logits = self.next_logits(fed_SB, cache, padding_B)
            positions = [length + step for length in lengths]
            chosen_B = self._agree(None if logits is None else choose(logits, sampling, indices, positions), fed_SB[-1])
            if heard is not None and logits is not None:
                heard(logits, chosen_B)
            tokens = [None if over else token for over, token in zip(ended, chosen_B.tolist(), strict=True)]
            ended = [over or token in limits.stop_ids or step + 1 >= most
                     for over, token, most in zip(ended, tokens, room, strict=True)]
            yield tokens
            if all(ended):
                return
            fed_SB = chosen_B.unsqueeze(0)

    @torch.no_grad()
    def next_logits(self, tokens_SB: Tensor, cache: Cache, padding_B: Tensor | None) -> Tensor | None:
        """Feeds every text's next tokens; logits of the one that follows, [B, num_ids], on the last stage.

        Args:
            tokens_SB: the same number for every text.
            cache: what was fed before; extended by this.
            padding_B: how many of the first places of each text are padding; None: none at all.

        Returns:
            None on the other stages.
        """
        start, stop, device = cache.num_tokens, cache.num_tokens + len(tokens_SB), self._mesh.device
        positions_SB = torch.arange(start, stop, device=device).unsqueeze(1)
        if padding_B is not None:
            positions_SB = (positions_SB - padding_B).clamp(min=0)
        batch = Batch(tokens_SB, positions_SB, attention_mask=visible(start, stop, padding_B, device), cache=cache)
        x_SBH = self._chunk.hidden_states(tokens_SB if self._mesh.is_first_stage else self._receive(tokens_SB), batch)
        cache.advance(len(tokens_SB))
        if not self._mesh.is_last_stage:
            pipeline = self._mesh.pipeline
            dist.send(x_SBH.contiguous(), pipeline.ranks[pipeline.index + 1], group=pipeline.group)
            return None
        columns_BV = self._chunk.logits(x_SBH[-1:]).squeeze(0)
        return all_gather(columns_BV.T, self._mesh.tensor).T[:, : self._num_ids]      # padding comes last

    def new_cache(self, max_tokens: int, rows: int) -> Cache:
        """An empty cache for this rank's layers and key-value groups."""
        model = self._model
        return Cache(map(int, self._chunk.layers), max_tokens, rows, model.num_kv_heads // self._mesh.tensor.size,
                     model.head_dim, dtype=self._weight.dtype, device=self._mesh.device)

    def _receive(self, tokens_SB: Tensor) -> Tensor:
        """The hidden states of these tokens from the stage before."""
        pipeline = self._mesh.pipeline
        shape = (*tokens_SB.shape, self._model.hidden_size)
        x_SBH = torch.empty(shape, dtype=self._weight.dtype, device=self._mesh.device)
        dist.recv(x_SBH, pipeline.ranks[pipeline.index - 1], group=pipeline.group)
        return x_SBH

    def _agree(self, chosen_B: Tensor | None, like_B: Tensor) -> Tensor:
        """What the last stage's first tensor rank has chosen, on every rank; None on ranks that chose nothing."""
        chosen_B = torch.empty_like(like_B) if chosen_B is None else chosen_B.contiguous()
        if self._mesh.is_last_stage:
            broadcast(chosen_B, self._mesh.tensor, 0)
        broadcast(chosen_B, self._mesh.pipeline, self._mesh.pipeline.size - 1)
        return chosen_B

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Prompts side by side, [longest, B], the shorter ones padded on the left, and by how much, [B]."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        device = self._mesh.device
        padding_B = put(torch.tensor(padding), device) if any(padding) else None
        return put(torch.tensor(rows, dtype=torch.int64).T.contiguous(), device), padding_B


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
