"""Opening a mixture and reading its samples, beside megatron-core's datasets, on the same files.

    python benchmarks/data_reading.py [--tokens 200e6] [--directory D] [--repeats 9] [--json F] [--markdown F]

Four corpora of `--tokens` random tokens in all (u16, documents of 1 to about 10,000 tokens, 500 at the median)
are mixed with weights 0.5, 0.3, 0.15 and 0.05, in sequences of 2,048, one epoch's worth of samples.
megatron-core's `BlendedDataset` over `GPTDataset`s builds its indices when opened for the first time and maps
them from its cache afterwards; both are measured, without attention masks, which its kernels do not need.  Its
sample is a dictionary of tensors: tokens, labels, loss mask, positions. "Tokens only" calls the private method
below that, which is what Octant's sample (inputs and targets in one array) is closest to.  Files are in the
page cache.

The last table opens ten sparse corpora of 10¹² tokens in all, in a process of its own, and reads samples at random
places.  megatron-core is not part of it: its shuffled index alone would hold half a billion entries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch.distributed as dist

from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.config import SourceConfig
from engine.data.indexed import IndexedWriter, write_header
from engine.data.training_data import TrainingData

SEQ_LEN, VOCAB_SIZE, SEED = 2048, 32_000, 1234
WEIGHTS = (0.5, 0.3, 0.15, 0.05)
SAMPLES_PER_RUN = 2000
SPARSE_SOURCES, SPARSE_DOCUMENTS, SPARSE_LENGTH = 10, 100_000_000, 1000


def write_corpora(folder: Path, num_tokens: int) -> list[SourceConfig]:
    """Corpora in the proportion of the weights, so that one epoch uses up all of them together."""
    draw = np.random.default_rng(SEED)
    sources = []
    for index, weight in enumerate(WEIGHTS):
        path = folder / f"corpus{index}"
        with IndexedWriter(path, "u2") as writer:
            while writer.num_tokens < num_tokens * weight:
                lengths = np.minimum(draw.lognormal(np.log(500), 1, 10_000).astype(np.int64) + 1, 100_000)
                writer.add_documents(draw.integers(0, VOCAB_SIZE - 1, int(lengths.sum()), dtype=np.uint16), lengths)
        sources.append(SourceConfig(path=str(path), weight=weight))
    return sources


def open_ours(sources: list[SourceConfig]) -> TrainingData:
    return TrainingData.open(sources, SEQ_LEN, SEED, VOCAB_SIZE)


class Tokenizer:
    """As little of one as `GPTDataset` asks for."""

    vocab_size = VOCAB_SIZE
    eod = VOCAB_SIZE - 1
    pad = VOCAB_SIZE - 1
    unique_identifiers = {"class": "benchmark"}  # noqa: RUF012


def open_theirs(sources: list[SourceConfig], num_samples: int, cache: Path) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LEN,
        blend=([source.path for source in sources], [source.weight for source in sources]),
        split="1",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]


def compare_opening(sources: list[SourceConfig], num_samples: int, folder: Path, repeats: int) -> Comparison:
    cache = folder / "cache"

    def without_cache() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        start = perf_counter()
        open_theirs(sources, num_samples, cache)
        return perf_counter() - start

    return alternating(
        Case("megatron-core, first time", without_cache),
        Case("megatron-core, indices cached", lambda: void(open_theirs(sources, num_samples, cache))),
        Case("octant", lambda: void(open_ours(sources))),
        repeats=repeats,
        title="Opening",
        packages=["numpy", "megatron-core"],
    )


def void(value: object) -> None:
    """Take a value and give nothing back: a case that returns a number would be taken for its time."""


def compare_reading(sources: list[SourceConfig], num_samples: int, folder: Path, repeats: int) -> Comparison:
    """Samples in the order of training, each round the next ones."""
    theirs, ours = open_theirs(sources, num_samples, folder / "cache"), open_ours(sources)

    def tokens_only(index: int) -> object:
        part = theirs.datasets[theirs.dataset_index[index]]
        return part._query_document_sample_shuffle_indices(theirs.dataset_sample_index[index])

    def reader(read: Callable[[int], object]) -> Callable[[], None]:
        position = count()

        def run() -> None:
            for _ in range(SAMPLES_PER_RUN):
                read(next(position) % num_samples)

        return run

    return alternating(
        Case("megatron-core", reader(theirs.__getitem__), SAMPLES_PER_RUN),
        Case("megatron-core, tokens only", reader(tokens_only), SAMPLES_PER_RUN),
        Case("octant", reader(ours.sample), SAMPLES_PER_RUN),
        repeats=repeats,
        unit="samples",
        title=f"Reading {SAMPLES_PER_RUN:,} samples of {SEQ_LEN:,} tokens",
        packages=["numpy", "megatron-core"],
    )


@contextmanager
def sparse_corpora(folder: Path) -> Iterator[list[SourceConfig]]:
    """Ten corpora of 10¹¹ tokens in 10⁸ documents each, zeros that take no room but at the ends of the index."""
    itemsize, marks = 2, 34 + 12 * SPARSE_DOCUMENTS
    for index in range(SPARSE_SOURCES):
        with open(folder / f"sparse{index}.idx", "wb") as file:
            write_header(file, np.dtype("<u2"), SPARSE_DOCUMENTS, SPARSE_DOCUMENTS + 1)
            file.truncate(marks + 8 * (SPARSE_DOCUMENTS + 1))
            for offset, value, dtype in (
                (34 + 4 * (SPARSE_DOCUMENTS - 1), SPARSE_LENGTH, "<i4"),
                (marks - 8, itemsize * SPARSE_LENGTH * (SPARSE_DOCUMENTS - 1), "<i8"),
                (marks + 8 * SPARSE_DOCUMENTS, SPARSE_DOCUMENTS, "<i8"),
            ):
                os.pwrite(file.fileno(), np.array([value], dtype).tobytes(), offset)
        (folder / f"sparse{index}.bin").touch()
        os.truncate(folder / f"sparse{index}.bin", itemsize * SPARSE_DOCUMENTS * SPARSE_LENGTH)
    yield [SourceConfig(path=str(folder / f"sparse{i}"), weight=0.05 + 0.01 * i) for i in range(SPARSE_SOURCES)]


def measure_sparse(sources: list[SourceConfig]) -> dict[str, float]:
    """Opening (ms), memory it takes (MiB), finding and reading a random sample (µs, medians of 5 runs)."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, perf_counter()
    data = open_ours(sources)
    found = {"open_ms": 1e3 * (perf_counter() - start)}
    found["memory_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    num_samples = sum(source.num_windows for source in data.sources)
    draw = random.Random(SEED)
    places = [draw.randrange(num_samples) for _ in range(SAMPLES_PER_RUN)]
    for index in places:  # warm-up: afterwards these places are in the page cache
        data.sample(index)
    for name, read in (("locate_us", data.locate), ("sample_us", data.sample)):
        runs = []
        for _ in range(5):
            start = perf_counter()
            for index in places:
                read(index)
            runs.append(1e6 * (perf_counter() - start) / SAMPLES_PER_RUN)
        found[name] = statistics.median(runs)
    return found


def sparse_section(folder: Path) -> str:
    """The measurement in a fresh process, as Markdown."""
    with sparse_corpora(folder):
        done = subprocess.run(
            [sys.executable, __file__, "--sparse", "--directory", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
    found = json.loads(done.stdout)
    return (
        "## Ten corpora, 10¹² tokens, 10⁹ documents (sparse files)\n\n"
        "| opening | memory | finding a random sample | reading one |\n|---:|---:|---:|---:|\n"
        f"| {found['open_ms']:.1f} ms | {found['memory_mib']:.1f} MiB | {found['locate_us']:.1f} µs | "
        f"{found['sample_us']:.1f} µs |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=200e6, help="in the corpora (default: %(default).0f)")
    parser.add_argument("--directory", type=Path, help="for the corpora (default: the temporary one)")
    parser.add_argument("--sparse", action="store_true", help=argparse.SUPPRESS)  # the process of `sparse_section`
    add_options(parser)
    args = parser.parse_args()
    if args.sparse:
        weights = [0.05 + 0.01 * i for i in range(SPARSE_SOURCES)]
        sources = [SourceConfig(path=str(args.directory / f"sparse{i}"), weight=w) for i, w in enumerate(weights)]
        print(json.dumps(measure_sparse(sources)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        section = sparse_section(folder)
        sources = write_corpora(folder, int(args.tokens))
        num_samples = int(0.95 * sum(source.num_windows for source in open_ours(sources).sources))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # megatron-core wants one
        results = [
            compare_opening(sources, num_samples, folder, args.repeats),
            compare_reading(sources, num_samples, folder, args.repeats),
        ]
    print(section)
    if args.markdown is not None:
        with args.markdown.open("a", encoding="utf-8") as file:
            file.write(section + "\n")
    publish(results, args)


if __name__ == "__main__":
    main()
