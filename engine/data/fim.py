"""Fill-in-the-middle: documents rearranged so that a model that reads left to right learns to fill a gap.

A document is cut at two random places and its parts written in another order, each behind a token of its own (Bavarian
et al. 2022, arXiv:2207.14255, section 3); what is learned stays the next token:

    PSM   <prefix> A <suffix> C <middle> B
    SPM   <prefix> <suffix> C <middle> A B

It is done to a window's tokens, document by document (the paper's context level), at places between tokens, with
probability `rate` each.  The window's length is its own: a document gives up its last three tokens for the three new
ones, and its end of document stays where it is.  So masks and document numbers need not know.

Whether and where follows from (seed, source, window, place in the window) and nothing else, so that layouts, batches
and resuming change no sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.data.permutation import derive_key
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError

# As tokenizers name the tokens before prefix, suffix and middle: StarCoder, Qwen2.5-Coder, SantaCoder, Code Llama.
NAMES = (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
         ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), ("▁<PRE>", "▁<SUF>", "▁<MID>"))
ADDED = 3


@dataclass(frozen=True)
class FillInMiddle:
    """
    Attributes:
        rate: probability that a document is rearranged.
        spm: of those, the share in the order SPM.
        sentinels: ids of the tokens before prefix, suffix and middle.
        end: id that ends a document; None: none does.
        seed: of the run.
    """

    rate: float
    spm: float
    sentinels: tuple[int, int, int]
    end: int | None
    seed: int

    def applied(self, tokens: np.ndarray, starts: Sequence[int], source: int, window: int) -> np.ndarray:
        """A window's tokens, int64 [n], rearranged; `starts`: the places in it where documents begin, ascending."""
        out = tokens.copy()
        for number, (start, stop) in enumerate(pairwise([0, *starts, len(tokens)])):
            if stop > start and out[stop - 1] == self.end:
                stop -= 1
            if stop - start > ADDED:
                key = derive_key(self.seed, "fim", source, window, number)
                out[start:stop] = self._document(out[start:stop], key)
        return out

    def _document(self, tokens: np.ndarray, key: bytes) -> np.ndarray:
        """The same number of tokens."""
        chance, order, one, other = (int.from_bytes(key[8 * i : 8 * i + 8], "little") / 2**64 for i in range(4))
        if chance >= self.rate:
            return tokens
        kept = tokens[:-ADDED]
        first, second = sorted((int(one * (len(kept) + 1)), int(other * (len(kept) + 1))))
        before, middle, after = kept[:first], kept[first:second], kept[second:]
        pre, suf, mid = ([token] for token in self.sentinels)
        parts = (pre, suf, after, mid, before, middle) if order < self.spm else (pre, before, suf, after, mid, middle)
        return np.concatenate(parts)


def sentinels_of(named: Sequence[int | str] | None, tokenizer: Tokenizer | None,
                 vocab_size: int) -> tuple[int, int, int]:
    """Ids of the tokens before prefix, suffix and middle.

    Args:
        named: their ids or texts; None: by the names that tokenizers have for them.

    Raises:
        DataError: they are not to be found, or no three ids of the vocabulary.
    """
    known = {} if tokenizer is None else tokenizer.specials
    if named is None:
        named = next((names for names in NAMES if all(name in known for name in names)), ())
        if not named:
            raise DataError("data.fim needs three tokens, before prefix, suffix and middle, and the tokenizer has none "
                            f"of the names that are known, such as {', '.join(NAMES[0])}: name them in "
                            "data.fim_tokens, as texts or ids")
    if missing := [name for name in named if isinstance(name, str) and name not in known]:
        raise DataError(f"data.fim_tokens names {missing[0]}, which is no special token of the tokenizer")
    first, second, third = (known[name] if isinstance(name, str) else name for name in named)
    if len({first, second, third}) < 3 or not all(0 <= token < vocab_size for token in (first, second, third)):
        raise DataError(f"data.fim_tokens are {first}, {second} and {third}: they must be three different ids below "
                        f"the model's vocabulary of {vocab_size:,}")
    return first, second, third
