"""Microbatches: the same samples however they are read, on the device only while they are needed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import Config
from engine.data.indexed import IndexedWriter
from engine.data.training_data import Sample, TrainingData
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.errors import DataError
from engine.kernels.documents import Documents
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN
from engine.train.batches import HostBatch, Loader, Microbatches, Samples, collate, up_to
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config
from tests.kit.runs import VOCAB_SIZE, run_config


def documents_config(folder: Path, steps: int = 3) -> Config:
    """A run with a document mask over documents of 1 to 24 tokens."""
    numbers = np.random.default_rng(3)
    with IndexedWriter(folder / "documents", np.uint16) as writer:
        for _ in range(200):
            writer.add_document(numbers.integers(0, VOCAB_SIZE, numbers.integers(1, 25)))
    return run_config(folder, "run", steps=steps, data={"document_mask": True, "valid": [],
                                                        "train": [{"path": str(folder / "documents")}]})


def same(a: Batch, b: Batch) -> bool:
    names = ("tokens_SB", "positions_SB", "labels_SB", "loss_mask_SB")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    bounds = [each.documents and each.documents.bounds for each in (a, b)]
    return bounds[0] == bounds[1] and all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("masked", [False, True])
def test_reading_ahead_changes_nothing(tmp_path: Path, masked: bool) -> None:
    config = documents_config(tmp_path) if masked else run_config(tmp_path, "run", steps=3)
    data, threads = Corpora.open(config).train, set()

    def sample(index: int) -> Sample:
        threads.add(threading.current_thread().name)
        return data.sample(index)

    ahead = Loader(sample, config, single_mesh(), NEXT_TOKEN, ahead=True)
    for first in (0, 4, 8):
        step, plain = ahead.step(first), Loader(data.sample, config, single_mesh(), NEXT_TOKEN).step(first)
        assert float(step.divisor) == float(plain.divisor) <= 64
        assert len(step.microbatches) == 4
        for m, (got, want) in enumerate(zip(step.microbatches, plain.microbatches, strict=True)):
            assert same(got, want)
            assert got.tokens_SB[:, 0].tolist() == data.sample(first + m).tokens[:-1].tolist()
    ahead.close()
    assert threads == {"MainThread", "read-ahead_0"}


def test_another_place_may_be_asked_for_than_was_read_ahead(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=9)
    data = Corpora.open(config).train
    loader = Loader(data.sample, config, single_mesh(), NEXT_TOKEN, ahead=True)
    for first in (0, 20, 4):
        [batch, *_] = loader.step(first).microbatches
        assert batch.tokens_SB[:, 0].tolist() == data.sample(first).tokens[:-1].tolist()
    loader.close()


def test_nothing_is_read_behind_the_last_step(tmp_path: Path) -> None:
    config, asked = run_config(tmp_path, "run", steps=2), []
    data = Corpora.open(config).train

    def sample(index: int) -> Sample:
        asked.append(index)
        return data.sample(index)

    loader = Loader(sample, config, single_mesh(), NEXT_TOKEN, ahead=True)
    for first in (0, 4):
        loader.step(first)
    loader.close()
    assert asked == list(range(8))


def test_what_cannot_be_read_is_refused_in_its_own_step(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=9)
    data = Corpora.open(config).train

    def sample(index: int) -> Sample:
        if index == 5:
            raise DataError("sample 5 is damaged")
        return data.sample(index)

    loader = Loader(sample, config, single_mesh(), NEXT_TOKEN, ahead=True)
    loader.step(0)
    with pytest.raises(DataError, match="sample 5 is damaged"):
        loader.step(4)
    loader.close()


def test_documents_become_positions_and_masks(tmp_path: Path) -> None:
    config = documents_config(tmp_path)
    data = Corpora.open(config).train
    for m, batch in enumerate(Loader(data.sample, config, single_mesh(), NEXT_TOKEN).step(0).microbatches):
        want = data.sample(m)
        assert want.document_ids is not None and want.loss_mask is not None and batch.loss_mask_SB is not None
        documents = Documents.of(torch.from_numpy(want.document_ids).unsqueeze(0))
        assert torch.equal(batch.positions_SB, documents.positions())
        assert batch.documents is not None and batch.documents.bounds == documents.bounds
        assert torch.equal(batch.documents.cu_seqlens, documents.cu_seqlens)
        assert batch.loss_mask_SB[:, 0].tolist() == want.loss_mask.tolist()


@pytest.mark.parametrize("uses", [1, 2])
def test_a_microbatch_is_on_the_device_from_its_first_use_to_its_last(uses: int) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    class Counted(HostBatch):
        def part(self, mesh: object) -> Batch:
            batch = Batch(self.batch.tokens_SB.clone(), self.batch.positions_SB)
            made.append(weakref.ref(batch.tokens_SB))
            return batch

    host = [Counted(Batch(torch.full((2, 1), m), torch.zeros(2, 1))) for m in range(6)]
    batches = Microbatches(host, single_mesh(), uses)

    def alive() -> int:
        gc.collect()
        return sum(reference() is not None for reference in made)

    assert len(batches) == 6 and not made
    for use in range(uses):                                  # one chunk after the other, as in an interleaved schedule
        for m in range(6):
            assert batches[m].tokens_SB[0] == m
            assert alive() == (m + 1 if use + 1 < uses else 6 - m - 1 if uses > 1 else 0)
    assert len(made) == 6


def test_a_step_never_holds_more_microbatches_than_are_in_flight(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """1f1b on one stage: one microbatch at a time, however many a step has."""
    config = documents_config(tmp_path, steps=2)
    there: list[weakref.ref[Batch]] = []
    part, most = HostBatch.part, [0]

    def counted(self: HostBatch, mesh: object) -> Batch:
        gc.collect()
        batch = part(self, mesh)                                                      # type: ignore[arg-type]
        there.append(weakref.ref(batch))
        most[0] = max(most[0], sum(each() is not None for each in there))
        return batch

    monkeypatch.setattr(HostBatch, "part", counted)
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    trainer.run()
    trainer.close()
    assert len(there) == 8 and most[0] <= 2                  # the one before is let go when its backward pass has ended


def test_samples_that_fill_a_step_count_nothing(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run")
    data: TrainingData = Corpora.open(config).train
    samples = up_to(data.sample, 6)
    step = Loader(samples, config, single_mesh(), NEXT_TOKEN).step(4)
    assert float(step.divisor) == 2 * 16
    masks = [batch.loss_mask_SB for batch in step.microbatches]
    assert [mask is not None and int(mask.sum()) for mask in masks] == [16, 16, 0, 0]


def partly_masked(masked: Callable[[int], bool]) -> Samples:
    """Samples of 16 labels, of which half count where there is a mask."""
    return lambda index: Sample(np.arange(17), np.arange(16) % 2 == 0 if masked(index) else None, None, 0, index)


def divisors_of_mixed_ranks() -> list[float]:
    config = tiny_config(parallel={"data": 2}, batch={"global": 4})
    loader = Loader(partly_masked(lambda index: index % 2 == 1), config, mesh_for(Topology.of(config)), NEXT_TOKEN)
    return [float(loader.step(first).divisor) for first in (0, 4)]


def test_ranks_with_and_without_masks_count_together() -> None:
    """All samples of one data rank have masks, none of the other: neither waits for what the other does not begin."""
    assert run_distributed(divisors_of_mixed_ranks, 2) == [[2 * 16 + 2 * 8] * 2] * 2


@pytest.mark.parametrize(("masked", "divisor"), [(lambda index: index == 1, 56), (lambda index: index < 4, 32)])
def test_samples_with_and_without_masks_on_one_rank(masked: Callable[[int], bool], divisor: int) -> None:
    config = tiny_config(batch={"global": 4})
    loader = Loader(partly_masked(masked), config, single_mesh(), NEXT_TOKEN)
    assert float(loader.step(0).divisor) == divisor and float(loader.step(4).divisor) == 64


def test_masks_that_come_later_are_refused() -> None:
    """The other ranks would not add up with this one."""
    config = tiny_config(batch={"global": 4})
    loader = Loader(partly_masked(lambda index: index == 5), config, single_mesh(), NEXT_TOKEN)
    assert loader.step(0).divisor == 64
    with pytest.raises(DataError, match="rank 0: a sample says which of its labels count, and none did in the first"):
        loader.step(4)


def test_boundaries_of_long_sequences_are_kilobytes() -> None:
    """16 microbatches of 32,768 tokens; as masks they were 16 GiB."""
    length = 32768
    lengths = np.random.default_rng(7).integers(1, 2000, 400)
    ids = np.repeat(np.arange(400), lengths).astype(np.int32)
    step = [collate([Sample(np.zeros(length + 1, np.int64), None, ids[m * 500 : m * 500 + length], 0, 0)])
            for m in range(16)]
    documents = [each.batch.documents for each in step]
    assert all(each is not None and len(each.bounds[0]) > 20 for each in documents)
    nbytes = sum(each.cu_seqlens.nbytes for each in documents if each is not None)
    print(f"{nbytes / 1024:.1f} KiB in 16 microbatches, where masks had {16 * length**2 / 2**30:.0f} GiB")
    assert nbytes < 4096
    whole = sum(x.nbytes for x in (step[0].batch.tokens_SB, step[0].batch.positions_SB, step[0].batch.labels_SB))
    assert whole <= 3 * 8 * length, "and what else follows from documents grows with the sequence, not with its square"
