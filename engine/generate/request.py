"""What can be asked for.  Checked when it is made, without torch, so a mistake is refused before any process starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 for the likeliest token.
        top_k: choose among the k likeliest; 0: all.
        top_p: choose among the likeliest whose probabilities first add up to this.
        seed: names the random numbers.
        repetition_penalty: above 1, ids that the text has already become less likely; 1: off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"--temperature {self.temperature}: it must be 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise RequestError(f"--top-k {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"--top-p {self.top_p}: it is a probability, more than 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise RequestError(f"--repetition-penalty {self.repetition_penalty}: more than 0; 1 changes nothing")


@dataclass(frozen=True)
class Limits:
    """When a text ends.

    Attributes:
        max_new_tokens: after so many; earlier where the model's maximum length is reached.
        stop_ids: after one of these tokens; none: never.
        watch: makes of each prompt what is told its text's new tokens, and says after which it ends; None: nothing.
    """

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    watch: Callable[[Sequence[int]], Callable[[int], bool]] | None = None


@dataclass(frozen=True)
class TextRequest:
    """What to generate.

    Attributes:
        checkpoint: a checkpoint, or a run's folder.
        tokenizer: where the model's tokenizer is now; None: where the run found it.
        token_ids: prompts and results are numbers, without a tokenizer.
        begin: start every prompt with the tokenizer's beginning-of-text id.
        batch_size: texts at a time.
        as_json: print one JSON object per text.
        dtype: of the arithmetic, `fp32` or `bf16`; None: as in training.
        device: auto, cpu or cuda.
        base: where the model under the checkpoint's adapter is now; None: where it was.
        chat: prompts are what a user says, and texts the answers.
        template: of conversations; None: the run's.
        best_of: answers to each prompt, of which `reward_model` says which is best; 1: no choice.
        keep_all: print all of them, best first.
        num_samples: texts of each prompt.
        stop: a text ends with the token that completes one of these strings.
        beams: of beam search; 1: none.
    """

    checkpoint: str
    prompts: Sequence[str]
    sampling: Sampling
    max_new_tokens: int
    tokenizer: str | None = None
    token_ids: bool = False
    begin: bool = False
    batch_size: int = 16
    as_json: bool = False
    dtype: str | None = None
    device: str = "auto"
    base: str | None = None
    chat: bool = False
    template: str | None = None
    best_of: int = 1
    reward_model: str | None = None
    keep_all: bool = False
    num_samples: int = 1
    stop: Sequence[str] = ()
    beams: int = 1

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise RequestError(f"--beams {self.beams}: at least 1")
        if self.beams > 1 and (self.num_samples > 1 or self.best_of > 1 or self.stop):
            raise RequestError("--beams looks for the likeliest text: it goes with neither --num-samples, --best-of "
                               "nor --stop")
        if "" in self.stop:
            raise RequestError('--stop "": an empty string is in every text')
        if self.stop and self.token_ids:
            raise RequestError("--token-ids has no texts, which --stop needs")
        if self.num_samples < 1:
            raise RequestError(f"--num-samples {self.num_samples}: at least 1")
        if self.num_samples > 1 and (self.best_of > 1 or self.sampling.temperature == 0):
            raise RequestError("--num-samples goes with neither --best-of, which has its own number, nor --temperature "
                               "0, at which all texts of a prompt are the same")
        if self.best_of < 1:
            raise RequestError(f"--best-of {self.best_of}: at least 1")
        if (self.best_of > 1) != (self.reward_model is not None):
            raise RequestError("--best-of N, above 1, and --reward-model CHECKPOINT go together: it says which is best")
        if self.token_ids and (self.chat or self.best_of > 1):
            raise RequestError("--token-ids has no texts, which --chat and --best-of need")
        if self.best_of > 1 and self.sampling.temperature == 0:
            raise RequestError("--best-of with --temperature 0: all answers to a prompt would be the same")
        if not self.prompts:
            raise RequestError('no prompt: give --prompt "…" or --prompt-file FILE (one per line)')
        if self.max_new_tokens < 1:
            raise RequestError(f"--max-new-tokens {self.max_new_tokens}: at least 1")
        if self.batch_size < 1:
            raise RequestError(f"--batch-size {self.batch_size}: at least 1")


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        checkpoint: a checkpoint, or a run's folder.
        data: prefix of a corpus.
        seq_len: tokens per window; None: as in training.
        batches: only the first so many; None: the whole corpus.
        batch_size: windows at a time.
        tokenizer, dtype, device, base, as_json: as in `TextRequest`.
        stride: tokens from the beginning of a window to that of the next; None: as long as a window.
        positions: the loss by position as well; `svg`: a file for its picture.
    """

    checkpoint: str
    data: str
    seq_len: int | None = None
    batches: int | None = None
    batch_size: int = 8
    tokenizer: str | None = None
    as_json: bool = False
    dtype: str | None = None
    device: str = "auto"
    base: str | None = None
    stride: int | None = None
    positions: bool = False
    svg: str | None = None

    def __post_init__(self) -> None:
        for option, value in (("seq-len", self.seq_len), ("batches", self.batches), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise RequestError(f"--{option} {value}: at least 1")


@dataclass(frozen=True)
class HarnessRequest:
    """Which tasks of lm-evaluation-harness to run.

    Attributes:
        checkpoint: a checkpoint, or a run's folder.
        harness: names of tasks or groups.
        include: a folder with tasks of one's own.
        fewshot: examples before each question; None: as the task says.
        limit: questions of each task; None: all.
        begin, batch_size, tokenizer, as_json, dtype, device, base: as in `TextRequest`.
    """

    checkpoint: str
    harness: Sequence[str]
    include: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    begin: bool = False
    batch_size: int = 8
    tokenizer: str | None = None
    as_json: bool = False
    dtype: str | None = None
    device: str = "auto"
    base: str | None = None

    def __post_init__(self) -> None:
        for option, value, least in (("fewshot", self.fewshot, 0), ("limit", self.limit, 1),
                                     ("batch-size", self.batch_size, 1)):
            if value is not None and value < least:
                raise RequestError(f"--{option} {value}: at least {least}")


@dataclass(frozen=True)
class ScoreRequest:
    """What to score.

    Attributes:
        checkpoint: a checkpoint of a reward model, or its run's folder.
        data: a file of conversations or comparisons.
        template: None: the run's.
        batch_size: texts at a time.
        tokenizer, dtype, device, base, as_json: as in `TextRequest`.
    """

    checkpoint: str
    data: str
    template: str | None = None
    batch_size: int = 8
    tokenizer: str | None = None
    as_json: bool = False
    dtype: str | None = None
    device: str = "auto"
    base: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(f"--batch-size {self.batch_size}: at least 1")


@dataclass(frozen=True)
class TaskRequest:
    """Which questions to answer.

    Attributes:
        checkpoint: a checkpoint, or a run's folder.
        tasks: files of questions.
        begin: start every question with the tokenizer's beginning-of-text id.
        batch_size: answers at a time.
        tokenizer, dtype, device, base, as_json: as in `TextRequest`.
    """

    checkpoint: str
    tasks: Sequence[str]
    begin: bool = False
    batch_size: int = 8
    tokenizer: str | None = None
    as_json: bool = False
    dtype: str | None = None
    device: str = "auto"
    base: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(f"--batch-size {self.batch_size}: at least 1")
