"""What every conversion shares: the table of names, results that appear whole or not at all."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.megatron import convert_from_megatron, convert_to_megatron
from checkpoints_tools.names import TABLE, hf_parts, megatron_parts, parameter_shapes
from checkpoints_tools.output import divide
from checkpoints_tools.to_hf import convert_to_hf
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from tests.kit.checkpoints import KINDS, model, write_random

NORMS = {"norm": "layernorm", "norm_place": "both", "embedding_norm": True}


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_parameter_cover_it_once(kind: str) -> None:
    config = model(**KINDS[kind])
    for name, shape in parameter_shapes(config).items():
        boxes = [part.box for part in hf_parts(config)[name]]
        assert sum(box.num_elements for box in boxes) == Box.whole(shape).num_elements
        assert not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert megatron_parts(config)[name].box == Box.whole(shape)


def test_names_are_unambiguous() -> None:
    for names in ([row.ours for row in TABLE], [row.megatron for row in TABLE if row.megatron],
                  *([(part.name, part.layer, part.first) for parts in hf_parts(model(**changes)).values()
                     for part in parts] for changes in KINDS.values())):
        assert len(set(names)) == len(names)


def test_every_row_of_the_table_is_used_by_some_model() -> None:
    used = {name.split(".", 2)[-1] if name.startswith("layers.") else name
            for changes in (*KINDS.values(), {"head": "score"}, NORMS) for name in parameter_shapes(model(**changes))}
    assert used == {row.ours.removeprefix("layers.{i}.") for row in TABLE}


@pytest.mark.parametrize(("sizes", "most", "groups"), [
    ([3, 3, 3], 6, [[3, 3], [3]]), ([9, 1, 1], 6, [[9], [1, 1]]), ([1, 9, 1], 6, [[1], [9], [1]]), ([], 6, []),
    ([2, 2, 2], 6, [[2, 2, 2]]),
])
def test_divide(sizes: list[int], most: int, groups: list[list[int]]) -> None:
    assert divide(sizes, lambda size: size, most) == groups


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk that is full: writing beyond this size of a file fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_and_says_what_is_needed(tmp_path: Path) -> None:
    config = model()
    reader = write_random(tmp_path / "ours", config)
    convert_to_hf(reader, tmp_path / "hf", check=False)
    convert_to_megatron(reader, tmp_path / "theirs", check=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    actions: dict[str, Callable[[], object]] = {
        "to-hf": lambda: convert_to_hf(reader, out), "from-hf": lambda: convert_from_hf(tmp_path / "hf", out),
        "to-megatron": lambda: convert_to_megatron(reader, out),
        "from-megatron": lambda: convert_from_megatron(tmp_path / "theirs", out, config)}
    for name, action in actions.items():
        with files_of_at_most(100_000), pytest.raises(CheckpointError, match=r"out.* was not written.* it needs"):
            action()
        assert sorted(path.name for path in tmp_path.iterdir()) == before, name
