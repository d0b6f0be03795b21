"""Grouped-query attention: causal, masked, one query over a cache, and documents packed into a sequence."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import ATTENTION, attention, attention_reference
from engine.kernels.documents import Documents
from engine.kernels.operation import Place, Unavailable
from tests.kit.compare import DTYPES, TOLERANCE, assert_equal, random, relative_error

HEADS = [(4, 1), (2, 3), (1, 4)]      # key-value groups, queries per group


def inputs(length: int, keys: int, groups: int, queries: int, batch: int = 2, dim: int = 8) -> list[Tensor]:
    return [2 * random(length, batch, groups, queries, dim, seed=1), 2 * random(keys, batch, groups, dim, seed=2),
            random(keys, batch, groups, dim, seed=3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "queries"), HEADS)
@pytest.mark.parametrize("length", [1, 17, 70])
def test_causal(length: int, groups: int, queries: int, dtype: torch.dtype) -> None:
    assert_equal(attention, attention_reference, inputs(length, length, groups, queries), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "queries"), HEADS)
@pytest.mark.parametrize("mask_batch", [1, 2])
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (1, 12), (5, 12)], ids=["square", "one-query", "over-a-cache"])
def test_masks(length: int, keys: int, mask_batch: int, groups: int, queries: int, dtype: torch.dtype) -> None:
    mask = torch.rand(mask_batch, 1, length, keys, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[..., 0] = True
    assert_equal(lambda q, k, v: attention(q, k, v, mask), lambda q, k, v: attention_reference(q, k, v, mask),
                 inputs(length, keys, groups, queries), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 5, 17, 34, 69, 70, 99])
def test_windows(window: int, dtype: torch.dtype) -> None:
    """A query sees its own key and the window - 1 before it: of the text, of a document, of those in a cache."""
    length = 70
    near = torch.arange(length)[:, None] - torch.arange(length)
    band = ((near >= 0) & (near < window))[None, None]
    assert_equal(lambda q, k, v: attention(q, k, v, window=window), lambda q, k, v: attention_reference(q, k, v, band),
                 inputs(length, length, 2, 3), dtype)
    documents = Documents.of(torch.tensor([[0] * 33 + [1] * 37, [5] + [6] * 69]))
    within = documents.mask() & band
    assert_equal(lambda q, k, v: attention(q, k, v, None, documents, window),
                 lambda q, k, v: attention_reference(q, k, v, within), inputs(length, length, 2, 3), dtype)
    seen = torch.arange(12) < torch.tensor([12, 4])[:, None]                 # of texts of 12 and 4 tokens
    latest = seen & (torch.arange(12) >= torch.tensor([12, 4])[:, None] - window)
    cached = inputs(1, 12, 2, 3)
    assert_equal(lambda q, k, v: attention(q, k, v, seen[:, None, None], window=window),
                 lambda q, k, v: attention_reference(q, k, v, latest[:, None, None]), cached, dtype)
    newest = (12 - torch.arange(12) <= window)[None, None, None]             # of a text that is alone: no mask
    for softcap in (None, 2.0):
        assert_equal(partial(attention, window=window, softcap=softcap),
                     partial(attention_reference, mask=newest, softcap=softcap), cached, dtype)
        assert_equal(partial(attention_reference, window=window, softcap=softcap),
                     partial(attention_reference, mask=newest, softcap=softcap), cached, dtype)


@pytest.mark.parametrize("window", [None, 7])
def test_scores_within_a_cap_or_falling_with_distance(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time, in texts, documents and over a cache."""
    monkeypatch.setattr("engine.kernels.attention.QUERIES", 16)
    documents = Documents.of(torch.tensor([[0] * 33 + [1] * 37, [5] + [6] * 69]))
    seen = (torch.arange(12) < torch.tensor([12, 4])[:, None])[:, None, None]
    for mask, its, values in ((None, None, inputs(70, 70, 2, 3)), (None, documents, inputs(70, 70, 2, 3)),
                              (seen, None, inputs(1, 12, 2, 3))):
        for extra in ({"softcap": 0.8}, {"slopes": torch.linspace(0.1, 0.6, 6)}):
            options = {"mask": mask, "documents": its, "window": window, **extra}
            assert_equal(lambda q, k, v, o=options: attention(q, k, v, **o),
                         lambda q, k, v, o=options: attention_reference(q, k, v, **o), values, torch.float32)
    q, k, v = inputs(4, 4, 1, 1, batch=1)
    scores = torch.einsum("sbgqd,tbgd->bgqst", q, k) / 8**0.5
    expected = (0.8 * (scores / 0.8).tanh()).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(attention_reference(q, k, v, softcap=0.8),
                               torch.einsum("bgqst,tbgd->sbgqd", expected, v).flatten(2))


def test_the_reference_knows_windows() -> None:
    q, k, v = inputs(20, 20, 2, 3)
    assert_equal(lambda q, k, v: attention(q, k, v, window=6), lambda q, k, v: attention_reference(q, k, v, window=6),
                 [q, k, v], torch.float64)


@pytest.mark.parametrize(("groups", "queries"), HEADS)
def test_the_reference_is_the_textbook(groups: int, queries: int) -> None:
    """One query head at a time, in loops."""
    q, k, v = inputs(5, 5, groups, queries, batch=1)
    out = attention_reference(q, k, v).view(5, groups, queries, -1)
    for group in range(groups):
        for query in range(queries):
            for position in range(5):
                scores = k[: position + 1, 0, group] @ q[position, 0, group, query] / 8**0.5
                assert torch.allclose(out[position, group, query], scores.softmax(0) @ v[: position + 1, 0, group])


def document_ids() -> Tensor:
    """Two sequences: documents of 5, 1 and 6 tokens; one of 4 and, under ids that return, two of 4."""
    return torch.tensor([[0] * 5 + [1] + [2] * 6, [7] * 4 + [8] * 4 + [9] * 4])


def test_positions_start_again_in_every_document() -> None:
    assert Documents.of(document_ids()).positions().T.tolist() == [[*range(5), 0, *range(6)], [*range(4)] * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    """The output of a packed sequence is that of its documents, each run alone."""
    ids = document_ids()
    q, k, v = (x.to(dtype) for x in inputs(12, 12, 2, 2))
    packed = attention(q, k, v, documents=Documents.of(ids))
    for row, document in ((0, 0), (0, 1), (0, 2), (1, 7), (1, 8), (1, 9)):
        here = (ids[row] == document).nonzero().flatten()
        alone = attention(*(x[here, row : row + 1] for x in (q, k, v)))
        assert relative_error(packed[here, row : row + 1], alone) < TOLERANCE[dtype]


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool,
                    window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """Stands for the package's: [B, S, H, D], fewer heads in k and v, the same arithmetic."""
    assert causal and deterministic and q.shape[2] % k.shape[2] == 0
    grouped = q.unflatten(2, (k.shape[2], -1)).transpose(0, 1)
    out = attention_reference(grouped, k.transpose(0, 1), v.transpose(0, 1),
                              window=None if window_size[0] < 0 else window_size[0] + 1)
    return out.unflatten(-1, (q.shape[2], -1)).transpose(0, 1)


def tokens_of_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, other: Tensor, *longest: int,
                        **options: Any) -> Tensor:
    """Stands for kernels that take boundaries: [tokens, heads, D], every document by itself."""
    lengths = bounds.diff().tolist()
    assert bounds is other and max(lengths) == longest[0] == longest[1]
    before, behind = options.pop("window_size", (-1, 0))
    assert behind == 0 and options in ({"causal": True, "deterministic": False}, {"enable_gqa": True})
    window = None if before == -1 else before + 1
    groups = k.shape[1]
    return torch.cat([attention_reference(a.unflatten(1, (groups, -1)).unsqueeze(1), b.unsqueeze(1), c.unsqueeze(1),
                                          window=window).squeeze(1).unflatten(-1, (q.shape[1], -1))
                      for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])


@pytest.mark.parametrize(("groups", "queries"), HEADS)
@pytest.mark.parametrize("name", ["varlen", "flash-attn"])
def test_kernels_that_take_boundaries_get_what_they_want(name: str, groups: int, queries: int, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, longest: int, other: int, *,
                    window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        return tokens_of_documents(q, k, v, first, second, longest, other, window_size=window_size,
                                   enable_gqa=enable_gqa)

    (tmp_path / "flash_attn.py").write_text("def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr("flash_attn.flash_attn_varlen_func", tokens_of_documents)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    entry = next(entry for entry in ATTENTION.implementations if entry.name == name)
    found = entry.find(Place(torch.device("cuda"), torch.bfloat16))
    documents = Documents.of(document_ids())
    for window in (None, 1, 3):
        assert_equal(lambda q, k, v, w=window: found(q, k, v, documents=documents, window=w),
                     lambda q, k, v, w=window: attention_reference(q, k, v, documents=documents, window=w),
                     inputs(12, 12, groups, queries), torch.float64)
    sys.modules.pop("flash_attn")


def test_rows_of_a_batch_keep_their_documents() -> None:
    documents = Documents.of(document_ids())
    second = documents.rows(1, 1)
    assert second.bounds == ((0, 4, 8, 12),) and second.cu_seqlens.tolist() == [0, 4, 8, 12] and second.longest == 4
    assert torch.equal(documents.mask()[1:], second.mask()) and documents.rows(0, 2).bounds == documents.bounds


@pytest.mark.parametrize(("groups", "queries"), HEADS)
@pytest.mark.parametrize("masked", [False, True])
def test_flash_attn_gets_what_it_wants(groups: int, queries: int, masked: bool,
                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package's layout, and torch's kernel where there is a mask."""
    (tmp_path / "flash_attn.py").write_text("def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr("flash_attn.flash_attn_func", flash_attn_func)
    entry = next(entry for entry in ATTENTION.implementations if entry.name == "flash-attn")
    with pytest.raises(Unavailable, match="for bf16 and fp16 only"):
        entry.find(Place(torch.device("cuda"), torch.float32))
    flash = entry.find(Place(torch.device("cuda"), torch.bfloat16, deterministic=True))
    mask = torch.ones(17, 17, dtype=torch.bool).tril()[None, None] if masked else None
    assert_equal(lambda q, k, v: flash(q, k, v, mask), attention_reference, inputs(17, 17, groups, queries),
                 torch.float64)
    sys.modules.pop("flash_attn")
