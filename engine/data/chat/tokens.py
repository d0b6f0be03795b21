"""From conversations to token ids, and which of them are learned.

The whole text is cut in tokens once.  A token is learned where it covers a character of an answer, or of what ends one;
so the mask never depends on how a part of the text would have been cut by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.chat.conversation import ASSISTANT, Learn, Turns
from engine.data.chat.spans import Renderer
from engine.data.chat.templates import open_template
from engine.data.tokenizer_base import Cut, Span, Tokenizer
from engine.errors import DataError


@dataclass(frozen=True)
class Text:
    """A conversation in tokens.

    Attributes:
        tokens: int32 [n].
        learned: bool [n], of each token whether it is to be learned, as a label.
        last_answer: the first token of the last answer; what comes before is the prompt.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    last_answer: int


class ChatEncoder:
    """A tokenizer and a template.

    Args:
        template: see `open_template`.

    Raises:
        DataError: there is no such template, or it is none.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(open_template(template, tokenizer), tokenizer)

    def encode(self, turns: Turns, learn: Learn = "all", tools: Sequence[Mapping[str, Any]] = ()) -> Text:
        """
        Raises:
            DataError: the template refuses the conversation, its answers cannot be found, or it cannot be cut.
        """
        rendered = self.renderer.render(turns, tools)
        try:
            cut = self.tokenizer.encode_marked(rendered.text, rendered.plain)
        except UnicodeEncodeError:
            raise DataError("it holds half of a surrogate pair (a broken \\u escape)") from None
        said = [turn for turn in turns if turn.role == ASSISTANT]
        wanted = [span for span, turn in zip(rendered.answers, said, strict=True) if turn.learned]
        last = rendered.answers[-1:]
        covered = covering(cut, wanted if learn == "all" else last)
        places = np.flatnonzero(covering(cut, last))
        return Text(cut.ids, covered, int(places[0]) if len(places) else len(cut.ids))

    def prompt(self, turns: Turns, tools: Sequence[Mapping[str, Any]] = ()) -> npt.NDArray[np.int32]:
        """Ids up to where an answer begins, for generation.

        Raises:
            DataError: as of `encode`.
        """
        rendered = self.renderer.prompt(turns, tools)
        return self.tokenizer.encode_marked(rendered.text, rendered.plain).ids


def covering(cut: Cut, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens cover a character of a range; one that covers none goes with the token before it."""
    if not len(cut.ids):
        return np.zeros(0, bool)
    inside = np.zeros(int(cut.ends[-1]) + 1, np.int64)
    for start, stop in spans:
        inside[start + 1 : stop + 1] = 1
    before = np.cumsum(inside)                                   # [i]: how many of the first i characters
    starts = np.concatenate([[0], cut.ends[:-1]])
    covers = before[cut.ends] > before[starts]
    own = np.maximum.accumulate(np.where(cut.ends > starts, np.arange(len(covers)), 0))
    result: npt.NDArray[np.bool_] = covers[own]
    return result
