"""Tokenizing a corpus, beside megatron-core's way, on the same file, tokenizer and cores.

    python benchmarks/prepare.py [FILE.jsonl] [--megabytes 100] [--workers N] [--repeats 5] [--markdown F] [--json F]

Without a file the corpus is text already on the machine: sources and documentation of the installed Python packages,
one document per file, no copies.  megatron-core's way is the loop of Megatron-LM's `tools/preprocess_data.py`: a pool
of processes maps `json.loads` and the tokenizer over lines, the parent adds each document to an
`IndexedDatasetBuilder`.  Both start their processes within the measured time.  Octant also hashes what it wrote; both
`.bin` must be equal.

Two tokenizers of 32,000 pieces are trained on a tenth of the corpus: SentencePiece BPE as LLaMA's, and a byte-level
BPE of the `tokenizers` library as Llama 3's.  `reference` is those libraries themselves, `gigatoken` the optional
backend.  The second table compares with the tokenizer's own speed: one process, texts in memory, `encode_array` and
nothing else, taking turns with the whole command on all cores.

On a machine that others use, wall-clock time measures them.  With `--cpu` every case counts the processor seconds of
all its processes, divided by the workers: the wall-clock time it would take on cores of its own, if none of them
idled.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import hashlib
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from corpus_tools.prepare import prepare
from corpus_tools.readers import read_texts
from corpus_tools.tokenizers.fast_backend import accelerated
from corpus_tools.tokenizers.training import train_tokenizer
from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.data.tokenizer import load_tokenizer
from engine.distributed.environment import available_cores

VOCAB_SIZE = 32_000
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def package_texts(num_bytes: int) -> Iterator[str]:
    """Distinct text files of the installed packages, up to so many bytes in all."""
    seen: set[bytes] = set()
    for root in dict.fromkeys((sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            data = path.read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            if text and digest not in seen:
                seen.add(digest)
                num_bytes -= len(data)
                yield text
            if num_bytes < 0:
                return


def write_corpus(path: Path, num_bytes: int) -> Path:
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in package_texts(num_bytes))
    return path


def train_byte_level(texts: list[str], folder: Path) -> Path:
    """A byte-level BPE with Llama 3's word pattern."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|end_of_text|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


class MegatronEncoder:
    """`Encoder` of Megatron-LM's tool: the tokenizer is a class attribute, made once per process."""

    tokenizer: Any = None
    eod = 0

    @classmethod
    def start(cls, spec: str) -> None:
        if spec.endswith(".model"):
            processor = sentencepiece.SentencePieceProcessor(model_file=spec)
            cls.tokenizer, cls.eod = processor.encode, processor.eos_id()
        else:
            backend = tokenizers.Tokenizer.from_file(f"{spec}/tokenizer.json")
            backend.encode_special_tokens = True
            cls.eod = backend.token_to_id("<|end_of_text|>")
            cls.tokenizer = lambda text: backend.encode(text, add_special_tokens=False).ids

    @classmethod
    def encode(cls, line: str) -> tuple[list[int], list[int], int]:
        ids = cls.tokenizer(json.loads(line)["text"])
        if ids:
            ids.append(cls.eod)
        return ids, [len(ids)], len(line)


def megatron(corpus: Path, spec: str, output: Path, workers: int) -> None:
    with open(corpus, encoding="utf-8") as lines:
        with multiprocessing.Pool(workers, initializer=MegatronEncoder.start, initargs=(spec,)) as pool:
            builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
            for ids, lengths, _ in pool.imap(MegatronEncoder.encode, lines, 32):
                builder.add_document(ids, lengths)
            builder.finalize(f"{output}.idx")
            pool.close()
            pool.join()


def own_speed(spec: str, backend: str, texts: list[str], cpu: bool) -> float:
    """Seconds the tokenizer alone takes in one process; loading it isn't counted, learning its words is."""
    tokenizer = load_tokenizer(spec)
    tokenizer = accelerated(tokenizer) if backend == "gigatoken" else tokenizer
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    for text in texts:
        tokenizer.encode_array(text)
    return clock() - start


def processor_seconds(run: Callable[[], None], workers: int) -> float:
    """Of this process and the children it waited for, per worker."""
    before = os.times()
    run()
    after = os.times()
    return sum(b - a for a, b in zip(before[:4], after[:4], strict=True)) / workers


def ours(corpus: Path, spec: str, output: Path, workers: int, backend: str) -> None:
    name = "auto" if backend == "gigatoken" else backend
    prepare([corpus], spec, output, workers=workers, backend=name, overwrite=True, say=lambda _: None)


def compare(kind: str, spec: str, corpus: Path, folder: Path, args: argparse.Namespace) -> list[Comparison]:
    """The two tables for one tokenizer."""
    texts = list(read_texts([corpus]))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    backends = ["reference", *(["gigatoken"] if find_spec("gigatoken") else [])]
    packages = ["sentencepiece", "tokenizers", "gigatoken", "megatron-core"]

    def timed(run: Callable[[], None]) -> Callable[[], float | None]:
        return functools.partial(processor_seconds, run, args.workers) if args.cpu else run

    def case(backend: str) -> Callable[[], float | None]:
        return timed(functools.partial(ours, corpus, spec, folder / backend, args.workers, backend))

    theirs = timed(functools.partial(megatron, corpus, spec, folder / "megatron", args.workers))
    whole = alternating(
        Case("megatron-core", theirs, megabytes),
        *(Case(f"octant, {backend}", case(backend), megabytes) for backend in backends),
        repeats=args.repeats,
        warmup=1,
        unit="MB",
        title=f"{kind}: {megabytes:.0f} MB of text, {len(texts):,} documents, {args.workers} workers",
        packages=packages,
    )
    for backend in backends:
        for suffix in (".bin", ".idx"):
            same = filecmp.cmp(folder / f"megatron{suffix}", folder / f"{backend}{suffix}", shallow=False)
            print(f"{kind}, {backend}: {suffix} equal to megatron-core's: {same}")
    shares = [
        alternating(
            Case(
                f"{backend} alone, one process × {args.workers}",
                functools.partial(own_speed, spec, backend, texts, args.cpu),
                megabytes * args.workers,
            ),
            Case(f"octant, {backend}, {args.workers} workers", case(backend), megabytes),
            repeats=args.repeats,
            warmup=1,
            unit="MB",
            title=f"{kind}: share of workers × the tokenizer's own speed, {backend}",
            packages=packages,
        )
        for backend in backends
    ]
    return [whole, *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="JSON lines with a field `text`")
    parser.add_argument("--megabytes", type=float, default=100, help="of the corpus it makes (default: %(default)g)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="(default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="count processor seconds instead of wall-clock time")
    add_options(parser, repeats=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = args.file or write_corpus(folder / "corpus.jsonl", int(args.megabytes * 1e6))
        sample = list(read_texts([corpus]))[::10]
        specs = {
            "SentencePiece": str(train_tokenizer(sample, VOCAB_SIZE, folder / "sp")),
            "Hugging Face byte-level BPE": str(train_byte_level(sample, folder / "hf")),
        }
        results = [r for kind, spec in specs.items() for r in compare(kind, spec, corpus, folder, args)]
    publish(results, args)


if __name__ == "__main__":
    main()
