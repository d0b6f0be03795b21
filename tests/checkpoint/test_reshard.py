"""Any layout into any layout: bit-equal state, through the files on disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.reshard import reshard
from engine.checkpoint.resume import find_latest
from engine.checkpoint.stream import write_checkpoint
from engine.checkpoint.write import save
from engine.distributed.boxes import Box, contiguous_in, flat_position, subtract
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError
from tests.kit.distributed import run_distributed
from tests.kit.pieces import Layout, assert_loaded, fetch, files_of, pieces_of, value

LAYOUTS = (Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(pipeline=2, virtual=2), Layout(data=3),
           Layout(tensor=2, pipeline=2, data=2), Layout(tensor=4, data=2, zero=0), Layout(tensor=3, pipeline=4, data=5),
           Layout(data=4, zero=2), Layout(tensor=2, pipeline=2, data=3, zero=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], CheckpointReader]:
    """A checkpoint per layout, made once."""
    folder, readers = tmp_path_factory.mktemp("layouts"), dict[Layout, CheckpointReader]()

    def get(layout: Layout) -> CheckpointReader:
        if layout not in readers:
            path = write_checkpoint(folder / str(layout), 7, {}, files_of(layout), fetch)
            readers[layout] = CheckpointReader(path)
            assert readers[layout].verify() == []
        return readers[layout]

    return get


@pytest.mark.parametrize(("source", "target"), list(permutations(LAYOUTS, 2)), ids=str)
def test_every_pair_of_layouts(saved: Callable[[Layout], CheckpointReader], source: Layout, target: Layout) -> None:
    reader = saved(source)
    for rank in range(target.world_size):
        pieces = pieces_of(target, rank, empty=True)
        reader.load_into(pieces)
        assert_loaded(pieces)


@pytest.mark.parametrize("num_files", (1, 3, 16))
def test_offline_reshard(saved: Callable[[Layout], CheckpointReader], tmp_path: Path, num_files: int) -> None:
    source = saved(Layout(tensor=2, pipeline=2, data=2))
    result = CheckpointReader(reshard(source, tmp_path / "out", num_files))
    assert (result.step, len(result.manifest.files)) == (7, num_files)
    assert result.verify() == []
    sizes = [file.num_bytes for file in result.manifest.files]
    assert max(sizes) < 1.5 * min(sizes)
    for key in source.keys():
        assert torch.equal(result.read(key), value(key, source.global_shape(key)))
    with pytest.raises(CheckpointError, match="is there already"):
        reshard(source, tmp_path / "out", 2)


def _save_and_load(directory: str, layout: Layout) -> tuple[int, list[str]]:
    """On every rank of a real group."""
    rank, group = dist.get_rank(), dist.group.WORLD
    save(Path(directory), 3, pieces_of(layout, rank), {"layout": str(layout)}, group=group, keep=2)
    reader, skipped = find_latest(Path(directory), group)
    assert reader is not None and not skipped and reader.metadata == {"layout": str(layout)}
    pieces = pieces_of(layout, rank, empty=True)
    reader.load_into(pieces)
    assert_loaded(pieces)
    return reader.step, [file.name for file in reader.manifest.files]


def _load(directory: str, layout: Layout) -> None:
    reader, _ = find_latest(Path(directory), dist.group.WORLD)
    assert reader is not None
    pieces = pieces_of(layout, dist.get_rank(), empty=True)
    reader.load_into(pieces)
    assert_loaded(pieces)


@pytest.mark.parametrize("layout", (Layout(tensor=2, pipeline=2), Layout(pipeline=2, virtual=2, data=2),
                                    Layout(data=4), Layout(tensor=2, data=2, zero=0),
                                    Layout(tensor=2, data=2, zero=2)), ids=str)
def test_real_processes(tmp_path: Path, layout: Layout) -> None:
    results = run_distributed(_save_and_load, 4, str(tmp_path), layout)
    assert {step for step, _ in results} == {3}
    assert results[0][1] == [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    run_distributed(_load, 2, str(tmp_path), Layout(tensor=2))
    reader, _ = find_latest(tmp_path)
    assert reader is not None
    alone = pieces_of(Layout(), 0, empty=True)
    reader.load_into(alone)
    assert_loaded(alone)
    stored = sum(box.num_elements for key in reader.keys() for box in reader.boxes(key))
    assert stored == sum(piece.tensor.numel() for piece in alone)       # replicas are written once


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8,
          torch.bool)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], Box]:
    """A shape, boxes that tile it, and a box to read."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.size[dim]))
        boxes += [part for part in (box.narrow(dim, 0, cut), box.narrow(dim, cut, box.size[dim] - cut))
                  if part.num_elements]
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return shape, boxes, Box(offset, size)


@settings(max_examples=120, deadline=None)
@given(tiling=tilings(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_box_of_any_tiling(tmp_path_factory: pytest.TempPathFactory, tiling: Any, dtype: torch.dtype,
                               data: st.DataObject) -> None:
    shape, boxes, wanted = tiling
    whole = torch.randint(0, 2, shape) if dtype is torch.bool else torch.randn(shape) * 30
    whole = whole.to(dtype)
    pieces = [Piece("x", shape, box, whole[box.slices]) for box in boxes]
    pieces.append(data.draw(st.sampled_from(pieces)))                                   # a replica
    reader = CheckpointReader(save(tmp_path_factory.mktemp("tiling"), 1, pieces, {}, keep=None))
    assert _same_bits(reader.read("x"), whole)
    assert _same_bits(reader.read("x", wanted), whole[wanted.slices])
    transposed = torch.empty(tuple(reversed(wanted.size)), dtype=dtype).permute(tuple(reversed(range(len(shape)))))
    reader.load_into([Piece("x", shape, wanted, transposed)])                           # into strided memory
    assert _same_bits(transposed, whole[wanted.slices])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(raw), b.contiguous().view(raw))


@settings(max_examples=200, deadline=None)
@given(tilings())
def test_box_arithmetic(tiling: Any) -> None:
    shape, _, inner = tiling
    outer = Box.whole(shape)
    count = torch.zeros(shape, dtype=torch.int64)
    for part in [inner, *subtract(outer, inner)]:
        count[part.slices] += 1
    assert torch.equal(count, torch.ones_like(count))
    positions = torch.arange(outer.num_elements).view(shape)[inner.slices].reshape(-1)
    start = flat_position(inner, outer)
    assert positions[0] == start
    stretch = torch.equal(positions, torch.arange(start, start + inner.num_elements))
    assert contiguous_in(inner, outer) == stretch
