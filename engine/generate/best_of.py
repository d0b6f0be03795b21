"""Best of N: several answers to each prompt, and a reward model says which is best (Stiennon et al. 2020).

Both models lie on the same ranks in the same layout and work in batches, first one and then the other.  An answer is a
function of checkpoint, seed and its number, as all that is generated, so the best of 8 is among the best of 16.

What comes out in JSON is a file to learn from: the winners as conversations for SFT (rejection sampling: Touvron et al.
2023, section 3.2.3), or with all answers kept, ranked answers for a reward model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from engine.data.chat.conversation import ASSISTANT, USER, Turn
from engine.data.chat.tokens import ChatEncoder
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_identity import recorded_tokenizer
from engine.distributed.mesh import Mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.generator import Generator
from engine.generate.load import Wanted, inference_config, load_model, open_shared
from engine.generate.request import Limits, TextRequest
from engine.generate.score import Ids, require_scores, scores_of


@dataclass(frozen=True)
class Answers:
    """Those to one prompt, best first."""

    prompt: str
    texts: Sequence[str]
    scores: Sequence[float]

    def record(self, chat: bool, keep_all: bool) -> dict[str, object]:
        """As a conversation file has it."""
        if keep_all:
            return {"prompt": self.prompt, "responses": list(self.texts), "scores": list(self.scores)}
        about = {"score": self.scores[0], "scores": list(self.scores)}
        if chat:
            return {"messages": [{"role": USER, "content": self.prompt},
                                 {"role": ASSISTANT, "content": self.texts[0]}], **about}
        return {"prompt": self.prompt, "completion": self.texts[0], **about}

    def lines(self, number: int, keep_all: bool) -> str:
        """For people."""
        if not keep_all:
            mean = fmean(self.scores)
            return f"── {number}: {self.scores[0]:+.4f}, the best of {len(self.scores)} (mean {mean:+.4f}) ──\n" \
                f"{self.texts[0]}\n"
        return "".join(f"── {number}: {score:+.4f} ──\n{text}\n"
                       for text, score in zip(self.texts, self.scores, strict=True))


def best_of(request: TextRequest, generator: Generator, prompts: Sequence[Ids], limits: Limits, tokenizer: Tokenizer,
            encoder: ChatEncoder | None, topology: Topology, mesh: Mesh, say: Callable[[str], None]) -> int:
    """Answers all prompts, scores the answers and prints; every rank must call this.

    Args:
        encoder: makes conversations of prompts and answers; None: they are plain texts.

    Returns:
        Tokens generated.

    Raises:
        RequestError: the reward model gives no scores, or reads other tokens.
        CheckpointError, ConfigError: it cannot be used in this layout.
    """
    assert request.reward_model is not None
    reader = open_shared(request.reward_model, mesh)
    require_scores(reader)
    known = recorded_tokenizer(reader.metadata.get("data") or {})
    if known is not None and (difference := tokenizer.info.difference(known)):
        raise RequestError(f"{reader.path} was trained with another tokenizer than {request.checkpoint}: {difference}")
    count, texts, tokens = request.best_of, list[str](), list[list[int]]()
    num_tokens = 0
    for number, made in enumerate(generator.generate(prompts, request.sampling, limits, samples=count)):
        num_tokens += len(made.tokens)
        texts.append(tokenizer.decode(made.tokens[:-1] if made.end == "eod" else made.tokens))
        tokens.append([*prompts[number // count], *made.tokens])
    if encoder is not None:
        asked = (words for words in request.prompts for _ in range(count))
        tokens = [encoder.encode((Turn(USER, words), Turn(ASSISTANT, text)), "last").tokens.tolist()
                  for words, text in zip(asked, texts, strict=True)]
    fill = 1 if topology.pipeline == 1 else 2 * topology.pipeline
    wanted = Wanted(request.dtype, max(map(len, tokens)), request.batch_size, fill)
    scores = scores_of(load_model(reader, inference_config(reader, topology, wanted), mesh), tokens)
    for number, asked_for in enumerate(request.prompts):
        own = slice(number * count, (number + 1) * count)
        ranked = sorted(zip(scores[own], texts[own], strict=True), key=lambda pair: -pair[0])
        answers = Answers(asked_for, [text for _, text in ranked], [score for score, _ in ranked])
        say(json.dumps(answers.record(encoder is not None, request.keep_all), ensure_ascii=False) + "\n"
            if request.as_json else answers.lines(number + 1, request.keep_all))
    return num_tokens
