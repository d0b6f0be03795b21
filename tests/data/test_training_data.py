"""The order of training: once per epoch, a function of the sample's number alone, and no wrong token in silence."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.indexed import IndexedDataset
from engine.data.sidecar import make_sidecar
from engine.data.skipping import merge_ranges, num_left, require_same_past, stream_index
from engine.data.tokenizer_identity import TokenizerInfo
from engine.data.training_data import TrainingData
from engine.errors import DataError
from tests.kit.made import Made, numbered_corpus, random_documents, sparse_corpus, write_corpus

in_a_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_data(
    *sources: Made, seq_len: int = 8, seed: int = 1, vocab_size: int = 2**16, **options: object
) -> TrainingData:
    return TrainingData.open(sources, seq_len, seed, vocab_size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "num_windows"), [(1000, 8, 124), (1001, 8, 125), (9, 8, 1), (1009, 100, 10)]
)
def test_an_epoch_is_every_window_exactly_once(tmp_path: Path, num_tokens: int, seq_len: int, num_windows: int) -> None:
    data = open_data(Made(str(numbered_corpus(tmp_path / "c", num_tokens))), seq_len=seq_len)
    for epoch in range(3):
        samples = [data.sample(i) for i in range(epoch * num_windows, (epoch + 1) * num_windows)]
        assert sorted(sample.window for sample in samples) == list(range(num_windows))
        for sample in samples:
            assert sample.tokens.dtype == np.int64
            assert np.array_equal(sample.tokens, sample.window * seq_len + np.arange(seq_len + 1))
            assert sample.loss_mask is None and sample.document_ids is None


def order(data: TrainingData, start: int, stop: int) -> list[tuple[int, int]]:
    return [data.locate(i) for i in range(start, stop)]


def test_epochs_and_seeds_and_sources_have_orders_of_their_own(tmp_path: Path) -> None:
    path = str(numbered_corpus(tmp_path / "c", 801))
    one, other = open_data(Made(path)), open_data(Made(path), seed=2)
    epochs = {tuple(order(one, e * 100, e * 100 + 100)) for e in range(5)} | {tuple(order(other, 0, 100))}
    assert len(epochs) == 6
    twice = open_data(Made(path), Made(path))
    windows = [[window for source, window in order(twice, 0, 200) if source == s] for s in (0, 1)]
    assert sorted(windows[0]) == sorted(windows[1]) == list(range(100)) and windows[0] != windows[1]


@in_a_folder
@given(
    data_parallel=st.sampled_from([1, 2, 3, 4, 6]),
    micro=st.integers(1, 3),
    resumed_at=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_any_data_parallel_size_resumed_at_any_step_reads_the_same(
    tmp_path: Path, data_parallel: int, micro: int, resumed_at: int, seed: int
) -> None:
    """Ranks of two layouts, each with data opened anew, against one process that reads in order."""
    if not (tmp_path / "a.idx").exists():
        numbered_corpus(tmp_path / "a", 400)
        numbered_corpus(tmp_path / "b", 900)
    sources = (Made(str(tmp_path / "a"), 0.3), Made(str(tmp_path / "b"), 0.7))
    global_batch = 36
    expected = order(open_data(*sources, seed=seed), 0, 10 * global_batch)
    consumed: list[tuple[int, int]] = []
    for step in range(10):
        layout = data_parallel if step < resumed_at else 1
        if step in (0, resumed_at):
            ranks = [open_data(*sources, seed=seed) for _ in range(layout)]
        batch: dict[int, tuple[int, int]] = {}
        size = micro if layout == data_parallel else 1
        for rank, data in enumerate(ranks):
            for start in range(rank * size, global_batch, layout * size):
                for i in range(start, min(start + size, global_batch)):
                    batch[i] = data.locate(step * global_batch + i)
        consumed += [batch[i] for i in range(global_batch)]
    assert consumed == expected


def test_the_order_is_the_same_in_another_process_and_after_pickling(tmp_path: Path) -> None:
    path = str(numbered_corpus(tmp_path / "c", 5000))
    data = open_data(Made(path))
    code = (
        "from tests.kit.made import Made; from engine.data.training_data import TrainingData\n"
        f"d = TrainingData.open([Made({path!r})], 8, 1, 65536); print([d.locate(i) for i in range(50)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
    )
    assert there.stdout.strip() == str(order(data, 0, 50))
    again = pickle.loads(pickle.dumps(data))
    assert order(again, 0, 50) == order(data, 0, 50)
    assert np.array_equal(again.sample(3).tokens, data.sample(3).tokens)


def test_the_order_never_changes_between_versions(tmp_path: Path) -> None:
    """A run resumed with a newer Octant must go on in the order it began: these numbers are for ever."""
    numbered_corpus(tmp_path / "a", 8001)
    numbered_corpus(tmp_path / "b", 4001)
    data = open_data(Made(str(tmp_path / "a"), 0.7), Made(str(tmp_path / "b"), 0.3), seed=1234)
    assert order(data, 0, 8) == PINNED


PINNED = [(0, 664), (0, 171), (1, 275), (0, 272), (0, 145), (1, 40), (0, 629), (0, 481)]


def test_validation_keeps_the_order_of_the_files(tmp_path: Path) -> None:
    data = open_data(Made(str(numbered_corpus(tmp_path / "c", 801))), shuffle=False)
    assert order(data, 0, 200) == [(0, window) for window in [*range(100), *range(100)]]


def test_target_epochs_are_reached_together(tmp_path: Path) -> None:
    numbered_corpus(tmp_path / "small", 801)
    numbered_corpus(tmp_path / "large", 8001)
    data = open_data(Made(str(tmp_path / "small"), epochs=3), Made(str(tmp_path / "large"), epochs=0.5))
    rows = data.report(800)
    assert [row.epochs for row in rows] == [3.0, 0.5] and [row.samples for row in rows] == [300, 500]
    assert [row.tokens for row in rows] == [2400, 4000] and [row.share for row in rows] == [0.375, 0.625]
    with pytest.raises(DataError, match=r"large: has a weight, but other sources.*epochs"):
        open_data(Made(str(tmp_path / "small"), epochs=3), Made(str(tmp_path / "large")))


def test_max_epochs_ends_a_source_and_at_last_the_data(tmp_path: Path) -> None:
    numbered_corpus(tmp_path / "small", 81)
    numbered_corpus(tmp_path / "large", 801)
    data = open_data(
        Made(str(tmp_path / "small"), 0.5, max_epochs=2), Made(str(tmp_path / "large"), 0.5, max_epochs=1.5)
    )
    assert data.num_samples == 20 + 150
    seen = order(data, 0, 170)
    assert [seen.count((0, window)) for window in range(10)] == [2] * 10
    assert sorted(seen.count((1, window)) for window in range(100)) == [1] * 50 + [2] * 50
    with pytest.raises(DataError, match=r"Sample 170.*ends after 170 samples"):
        data.sample(170)
    assert open_data(Made(str(tmp_path / "small"))).num_samples is None


@in_a_folder
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    seq_len=st.integers(1, 20),
)
def test_document_masks_against_counting(tmp_path: Path, lengths: list[int], seq_len: int) -> None:
    """Documents may be empty, shorter than a window, or as long as several."""
    owner = [document for document, length in enumerate(lengths) for _ in range(length)]
    if len(owner) <= seq_len:
        return
    prefix = write_corpus(tmp_path / "c", [[7] * length for length in lengths])
    data = open_data(Made(str(prefix)), seq_len=seq_len, document_mask=True, shuffle=False)
    for window in range((len(owner) - 1) // seq_len):
        sample = data.sample(window)
        inside = owner[window * seq_len : window * seq_len + seq_len + 1]
        numbers = {document: number for number, document in enumerate(dict.fromkeys(inside))}
        assert sample.document_ids is not None and sample.loss_mask is not None
        assert sample.document_ids.dtype == np.int32 and sample.loss_mask.dtype == bool
        assert sample.document_ids.tolist() == [numbers[document] for document in inside[:-1]]
        assert sample.loss_mask.tolist() == [a == b for a, b in itertools.pairwise(inside)]


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


@given(skip=ranges)
def test_skipping_takes_ranges_out_of_the_stream(skip: list[tuple[int, int]]) -> None:
    merged = merge_ranges(skip)
    left = [i for i in range(100) if not any(start <= i < stop for start, stop in skip)]
    assert [stream_index(merged, i) for i in range(len(left))] == left
    assert num_left(merged, 100) == len(left)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


@given(skip=ranges, more=ranges, consumed=st.integers(0, 60))
def test_what_was_skipped_may_only_change_ahead(
    skip: list[tuple[int, int]], more: list[tuple[int, int]], consumed: int
) -> None:
    """The two lists agree on every sample up to the last one consumed, or the change is refused."""
    before, after = merge_ranges(skip), merge_ranges([*skip, *more])
    same = [stream_index(before, i) for i in range(consumed)] == [stream_index(after, i) for i in range(consumed)]
    if same:
        require_same_past(skip, after, consumed)
    else:
        with pytest.raises(DataError, match=f"{consumed} samples already consumed"):
            require_same_past(skip, after, consumed)


def test_skipped_samples_are_left_out_of_order_and_report(tmp_path: Path) -> None:
    numbered_corpus(tmp_path / "a", 401)
    numbered_corpus(tmp_path / "b", 801)
    sources = (Made(str(tmp_path / "a"), 0.25, max_epochs=1), Made(str(tmp_path / "b"), 0.75, max_epochs=1))
    whole, cut = open_data(*sources), open_data(*sources, skip=[(30, 40), (5, 10), (35, 42), (148, 999)])
    everything = order(whole, 0, 150)
    expected = everything[:5] + everything[10:30] + everything[42:148]
    assert order(cut, 0, 131) == expected and cut.num_samples == 131
    for num_samples in (0, 3, 6, 28, 131):
        taken = [source for source, _ in expected[:num_samples]]
        assert [row.samples for row in cut.report(num_samples)] == [taken.count(0), taken.count(1)]
    with pytest.raises(DataError, match=r"data.skip: \[9, 3\]"):
        open_data(*sources, skip=[(9, 3)])


def tokenizer_info(sha256: str, vocab_size: int = 1000, eod_id: int = 0) -> TokenizerInfo:
    return TokenizerInfo("hf", "mine", sha256, vocab_size, eod_id)


def sidecar_for(prefix: Path, sha256: str = "a" * 64, vocab_size: int = 1000) -> None:
    dataset = IndexedDataset(prefix)
    info = tokenizer_info(sha256, vocab_size)
    make_sidecar(prefix, info, dataset.num_documents, dataset.num_tokens, dataset.dtype.name).write(prefix)


def test_data_that_does_not_fit_the_run_is_refused_when_opened(tmp_path: Path) -> None:
    good = Made(str(write_corpus(tmp_path / "good", random_documents(50))))

    def refused(match: str, *sources: Made, **options: object) -> None:
        with pytest.raises(DataError, match=match):
            open_data(*sources, **options)  # type: ignore[arg-type]

    refused("No corpus is given")
    refused(r"nowhere\.idx: no such file", good, Made(str(tmp_path / "nowhere")))
    refused(r"short\.bin: 8 tokens, fewer than the 9", good, Made(str(numbered_corpus(tmp_path / "short", 8))))
    refused(r"empty\.bin: 0 tokens, fewer than the 9", good, Made(str(write_corpus(tmp_path / "empty", []))))
    refused("positive weights", good, Made(good.path, weight=0))
    refused(r"good\.bin: token \d+ is \d+, outside the model's vocabulary of 10 ", good, vocab_size=10)
    write_corpus(tmp_path / "cut", random_documents(50))
    os.truncate(tmp_path / "cut.bin", 100)
    refused(r"cut\.bin: 100 bytes, but its index ends at \d+", good, Made(str(tmp_path / "cut")))


def test_a_side_file_guards_against_another_tokenizer(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(50))
    source = Made(str(prefix))
    open_data(source, tokenizer=tokenizer_info("b" * 64))  # nothing says what made it
    sidecar_for(prefix)
    open_data(source, tokenizer=tokenizer_info("a" * 64), vocab_size=1000)
    with pytest.raises(
        DataError, match=r"c\.json: the corpus was made with another tokenizer.*aaaaaaaaaaaa.*bbbbbbbbbbbb"
    ):
        open_data(source, tokenizer=tokenizer_info("b" * 64))
    with pytest.raises(DataError, match=r"eos_token in tokenizer_config\.json is 0 in one and 1 in the other"):
        open_data(source, tokenizer=tokenizer_info("a" * 64, eod_id=1))
    with pytest.raises(DataError, match=r"c\.json: tokenizer mine has 1000 ids, the model's vocabulary 999"):
        open_data(source, vocab_size=999)
    write_corpus(tmp_path / "c", random_documents(49))
    with pytest.raises(DataError, match=r"c\.json: tokens \d+, the corpus has \d+"):
        open_data(source)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match=r"c\.json: not a corpus's side file"):
        open_data(source)


@pytest.mark.parametrize(("dtype", "token"), [("u2", 500), ("i4", 500), ("i4", -1)])
def test_a_wrong_token_is_never_returned(tmp_path: Path, dtype: str, token: int) -> None:
    """Every window that holds it is refused, with its place; all the others are read."""
    prefix, place = write_corpus(tmp_path / "c", [[1] * 801], dtype), 403
    width = np.dtype(dtype).itemsize
    with open(f"{prefix}.bin", "r+b") as file:
        os.pwrite(file.fileno(), np.array([token], dtype).tobytes(), place * width)
    data = open_data(Made(str(prefix)), vocab_size=500, shuffle=False)
    for window in range(100):
        if window * 8 <= place <= window * 8 + 8:
            with pytest.raises(DataError, match=rf"c\.bin: token 403 is {token}, outside.*500 \(0 to 499\)"):
                data.sample(window)
        else:
            assert data.sample(window).tokens.tolist() == [1] * 9


def test_the_fingerprint_tells_what_the_order_depends_on(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(50))
    sidecar_for(prefix)
    base = open_data(Made(str(prefix))).fingerprint()
    assert base["tokenizer"] == "a" * 64 and len(base["sources"][0]["sha256"]) == 64
    assert base["sources"][0]["name"] == "c" and str(tmp_path) not in str(base)
    others = [
        open_data(Made(str(prefix), weight=2)),
        open_data(Made(str(prefix)), seed=2),
        open_data(Made(str(prefix)), seq_len=9),
        open_data(Made(str(prefix)), shuffle=False),
        open_data(Made(str(prefix)), skip=[(1, 2)]),
        open_data(Made(str(prefix)), document_mask=True),
        open_data(Made(str(prefix), max_epochs=2)),
    ]
    assert all(other.fingerprint() != base for other in others)
    assert open_data(Made(str(prefix))).fingerprint() == base


def test_ten_sources_and_a_trillion_tokens(tmp_path: Path) -> None:
    """Sparse files.  A list of all 4.9e8 samples of an epoch would not fit the test."""
    sources = [Made(str(sparse_corpus(tmp_path / f"s{s}", [10**9] * 100)), weight=0.05 + 0.01 * s) for s in range(10)]
    data = open_data(*sources, seq_len=2048, document_mask=True)
    assert sum(s.dataset.num_tokens for s in data.sources) == 10**12
    seen = {data.locate(i) for start in (0, 10**8, 10**9) for i in range(start, start + 1000)}
    assert len(seen) == 3000
    assert data.sample(4 * 10**8).tokens.tolist() == [0] * 2049
    counts = data.counts(10**8)
    assert sum(counts) == 10**8
    assert (
        max(abs(count - 10**8 * float(s.weight) / 0.95) for count, s in zip(counts, data.sources, strict=True)) <= 1.001
    )


def test_sample_numbers_of_any_integer_type(tmp_path: Path) -> None:
    data = open_data(Made(str(numbered_corpus(tmp_path / "a", 401)), 0.123456789), Made(str(tmp_path / "a"), 0.9))
    assert data.locate(np.int64(2**40 + 1)) == data.locate(2**40 + 1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Sample -1 was asked for; samples are numbered from 0"):
        data.sample(-1)
