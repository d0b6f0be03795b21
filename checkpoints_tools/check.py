"""Do both compute the same?

Where the machine has room for the models, one after the other, their logits on random tokens are compared in fp32:
Octant's model with the checkpoint's weights, and `transformers`' with the folder's.  That tests names, arrangement,
configuration and arithmetic at once.  Where it has not, or `transformers` is not installed, every tensor is read back
and compared, bit for bit, with the one it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch

from checkpoints_tools.hf_config import read_hf_config
from checkpoints_tools.hf_files import HFWeights
from checkpoints_tools.names import parameter_shapes
from checkpoints_tools.source import Source
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.context import Batch
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.progress import Begin, quiet

TOLERANCE = 1e-5                        # of the largest logit, or of 1 where that is smaller
NUM_SEQUENCES, NUM_TOKENS = 2, 64
LOADING = 1.5                           # models, one after the other, and what `transformers` reads one from
SPARE_BYTES = 1 << 30                   # activations, logits, and Python itself


@dataclass(frozen=True)
class Checked:
    """What was compared, and how far it is apart."""

    what: str
    largest_difference: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.largest_difference:.2g} (allowed: {self.allowed:.2g})"

    def require(self) -> Checked:
        """
        Raises:
            CheckpointError: too far apart, or not a number.
        """
        if not self.largest_difference <= self.allowed:
            raise CheckpointError(f"the conversion is wrong, and nothing was written: {self}")
        return self


def check_hf(source: Source, folder: Path, dtype: torch.dtype, allow_pickle: bool = False,
             begin: Begin = quiet, available: int | None = None) -> Checked:
    """Compares a checkpoint with a Hugging Face folder.

    Args:
        dtype: what the weights were rounded to on their way, so that rounding does not count as a difference.
        available: bytes of memory that may be used; None: what the machine has free.

    Raises:
        CheckpointError: they differ.
    """
    needed = int(LOADING * model_bytes(source.config, torch.float32)) + SPARE_BYTES
    available = available_bytes() if available is None else available
    if find_spec("transformers") is None:
        why = "transformers is not installed (pip install 'octant[hf]'), so instead of logits: "
    elif needed > available:
        why = (f"comparing logits would take {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free, so "
               "instead of logits: ")
    else:
        return compare_logits(source, folder, dtype, allow_pickle).require()
    return compare_tensors(source, folder, dtype, allow_pickle, why, begin).require()


def compare_logits(source: Source, folder: Path, dtype: torch.dtype, allow_pickle: bool = False) -> Checked:
    """Logits of both models on the same random tokens."""
    length = min(NUM_TOKENS, source.config.max_seq_len)
    tokens_BS = torch.randint(0, source.config.vocab_size, (NUM_SEQUENCES, length),
                              generator=torch.Generator().manual_seed(0))
    ours = octant_logits(source.config, lambda name: source.read(name, dtype), tokens_BS)
    name, theirs = _hf_logits(folder, tokens_BS, source.config.head, allow_pickle)
    largest = ours.abs().max().item()
    numbers = "scores" if source.config.head == "score" else "logits"
    what = f"{numbers} (up to {largest:.3g}) of {tokens_BS.numel()} random tokens, Octant's model against {name}, fp32"
    return Checked(what, (ours - theirs).abs().max().item(), TOLERANCE * max(1.0, largest))


@torch.inference_mode()
def octant_logits(config: ModelConfig, read: Callable[[str], torch.Tensor], tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B, S, V], or scores [B, S], of the model whose parameters `read` gives."""
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.copy_(read(spec_of(parameter).name))
    tokens_SB = tokens_BS.T
    logits: torch.Tensor = model(tokens_SB, Batch(tokens_SB, torch.arange(len(tokens_SB)).unsqueeze(1)))
    return logits.transpose(0, 1)


@torch.inference_mode()
def _hf_logits(folder: Path, tokens_BS: torch.Tensor, head: str, allow_pickle: bool) -> tuple[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # optional package
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loader = AutoModelForSequenceClassification if head == "score" else AutoModelForCausalLM
        model = loader.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32,
                                       use_safetensors=None if allow_pickle else True).eval()
        name = f"transformers' {type(model).__name__}"
        if head == "score":                 # by itself it would say the score of the last token only
            return name, model.score(model.model(tokens_BS)[0]).squeeze(-1)
        return name, model(tokens_BS).logits
    except Exception as error:          # of another package, about somebody's files: there is no end of kinds
        raise CheckpointError(f"transformers does not compute with {folder}: {type(error).__name__}: {error}; "
                              "--skip-check converts without comparing logits") from error


def compare_tensors(source: Source, folder: Path, dtype: torch.dtype, allow_pickle: bool = False, why: str = "",
                    begin: Begin = quiet) -> Checked:
    """Every tensor of a Hugging Face folder against the block of ours that it is."""
    weights = HFWeights(folder, allow_pickle)

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, parts in weights.parts(source.config, read_hf_config(folder)[0]).items():
            ours = source.read(name, dtype)
            for part in parts:
                yield ours[part.box.slices], weights.block(part).to(dtype)

    return compare(pairs(), source, dtype, why, begin)


def compare(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], source: Source, dtype: torch.dtype, why: str,
            begin: Begin) -> Checked:
    """Pairs of tensors that must be equal; together they are all of the model."""
    largest, num_tensors = 0.0, 0
    with begin("comparing", model_bytes(source.config, dtype)) as progress:
        for ours, theirs in pairs:
            largest = max(largest, _difference(ours, theirs))
            num_tensors += 1
            progress.advance(ours.nbytes)
    return Checked(f"{why}all {num_tensors} tensors read back and compared, bit for bit", largest, 0.0)


def model_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Size of all parameters in `dtype`."""
    return sum(prod(shape) for shape in parameter_shapes(config).values()) * dtype.itemsize


def require_finite(tensor: torch.Tensor, name: str, where: object) -> torch.Tensor:
    """The tensor itself.

    Raises:
        CheckpointError: there are values in it that are no numbers, or infinite; no model computes with those.
    """
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        wrong = tensor.isfinite().logical_not_().reshape(-1)
        raise CheckpointError(f"{where}: {int(wrong.sum()):,} of the {wrong.numel():,} values of {name} are no finite "
                              f"numbers, the first at {int(wrong.int().argmax()):,}")
    return tensor


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where one of them is not a number, and zero only for equal values."""
    return 0.0 if torch.equal(a, b) else (a - b).abs().float().nan_to_num(float("inf")).max().item()


def available_bytes() -> int:
    """Memory that a process can still take: what the machine has free, or its control group if that is less."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    limits = [int(found[1]) * 1024] if found else []
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        limits.append(int(limit) - int(used))
    return min(limits, default=0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
