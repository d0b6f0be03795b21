"""Fill-in-the-middle: what comes out is the document again, and the same whoever reads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError

from engine.config import Config
from engine.data.fim import FillInMiddle, sentinels_of
from engine.data.indexed import IndexedWriter
from engine.errors import DataError
from engine.train.corpora import Corpora
from tests.kit.runs import run_config, tensors, train, trained, write_corpus

PRE, SUF, MID, END = 90, 91, 92, 89
DOCUMENTS = [list(range(10, 30)), [1, 2], list(range(40, 47)), list(range(50, 80))]


def undone(tokens: list[int]) -> tuple[list[int], str]:
    """The document that was rearranged, found by the sentinels, and in which order it was."""
    if PRE not in tokens:
        return tokens, "as it was"
    end = tokens[-1:] if tokens[-1] == END else []
    body = tokens[: len(tokens) - len(end)]
    suf, mid = body.index(SUF), body.index(MID)
    assert body[0] == PRE
    before, after, middle = body[1:suf], body[suf + 1 : mid], body[mid + 1 :]
    return before + middle + after + end, "suffix first" if suf == 1 else "prefix first"


def test_the_parts_are_the_document_without_its_last_three_tokens() -> None:
    tokens = np.array([token for document in DOCUMENTS for token in [*document, END]])
    edges = np.cumsum([0, *(len(document) + 1 for document in DOCUMENTS)]).tolist()
    seen: dict[str, int] = {}
    for window in range(300):
        fim = FillInMiddle(0.5, 0.5, (PRE, SUF, MID), END, seed=3)
        out = fim.applied(tokens, edges[1:-1], 0, window)
        assert len(out) == len(tokens) and np.array_equal(out, fim.applied(tokens, edges[1:-1], 0, window))
        for document, start, stop in zip(DOCUMENTS, edges, edges[1:], strict=False):
            found, order = undone(out[start:stop].tolist())
            assert found == [*(document if order == "as it was" else document[:-3]), END]
            seen[order] = seen.get(order, 0) + (len(document) > 3)
    share = {order: count / 900 for order, count in seen.items()}
    assert abs(share["as it was"] - 0.5) < 0.06 and abs(share["suffix first"] - 0.25) < 0.06, share


def test_the_tokens_are_named_or_found_or_refused() -> None:
    known = cast(Any, SimpleNamespace(specials={"<|fim_prefix|>": 5, "<|fim_middle|>": 6, "<|fim_suffix|>": 7}))
    assert sentinels_of(None, known, 10) == (5, 7, 6)
    assert sentinels_of(("<|fim_middle|>", 1, 2), known, 10) == (6, 1, 2)
    assert sentinels_of((1, 2, 3), None, 10) == (1, 2, 3)
    for named, tokenizer, message in [(None, None, "data.fim needs three"), (("x", 1, 2), known, "names x, which"),
                                      ((1, 1, 2), None, "three different ids"), ((1, 2, 10), None, "below the")]:
        with pytest.raises(DataError, match=message):
            sentinels_of(named, tokenizer, 10)


def fim_config(folder: Path, name: str, **sections: Any) -> Config:
    if not (folder / "train.idx").exists():
        with IndexedWriter(folder / "train", np.uint16) as writer:
            for seed in range(40):
                writer.add_document((np.arange(20 + seed) * (seed + 1)) % 60)
        write_corpus(folder / "valid", seed=5)
    probe = run_config(folder, name, **sections)
    return probe.with_changes(data={"fim": 0.7, "fim_tokens": [61, 62, 63]})


def test_two_data_parallel_sizes_and_a_resume_see_the_same(tmp_path: Path) -> None:
    one = fim_config(tmp_path, "one", steps=4)
    data = Corpora.open(one)
    samples = [data.train.sample(index).tokens for index in range(16)]
    assert sum(61 in sample for sample in samples) > 8
    assert data.valid is not None and not any(61 in data.valid.sample(index).tokens for index in range(4))
    train(one)
    two = fim_config(tmp_path, "two", steps=4, parallel={"data": 2})
    train(two)
    for (_, *ours), (_, *theirs) in zip(trained(one), trained(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    cut = fim_config(tmp_path, "cut", steps=4)
    train(cut, crash_after=2)
    train(cut)
    assert trained(cut) == trained(one)
    assert all((value == tensors(cut, 4)[key]).all() for key, value in tensors(one, 4).items())


def test_conversations_are_not_rearranged(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run").to_dict()
    config["run"]["objective"], config["data"]["fim"] = "sft", 0.5
    with pytest.raises(ValidationError, match=r"data.fim rearranges texts"):
        Config.model_validate(config)
