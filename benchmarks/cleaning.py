"""How well `octant data clean` finds what is planted, what MinHash does around its threshold, and how fast it is.

    python benchmarks/cleaning.py [FILE.jsonl …] [--seeds 5] [--markdown F]

The planted corpus (`tests/data/planted.py`) has twenty cases of each rule per seed, among clean documents and decoys
that look like cases.  It was written together with the rules, so its figures say that the rules do what they claim,
not how they do on the web; for that read `report.md` of a run on your own data.

Near duplicates: pairs of texts of 300 words whose true Jaccard similarity of shingles is known, and the share of pairs
that were called duplicates at a threshold of 0.8.

Speed: processor seconds of all processes per megabyte, the rules as built in, on the FILEs or on the planted corpus.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path

from engine.data.cleaning.characters import tokens
from engine.data.cleaning.duplicates import Deduplicator, fingerprint
from engine.data.cleaning.pipeline import clean
from engine.data.cleaning.rules import Duplicates, load_rules
from engine.metrics.benchmark import describe_environment
from tests.data.planted import Score, Writer, planted_corpus, score, table

WORDS_PER_TEXT, PAIRS = 300, 200


def planted_scores(seeds: int, folder: Path) -> list[Score]:
    """The scores of all seeds added up."""
    total: dict[str, Score] = {}
    for seed in range(seeds):
        planted = planted_corpus(seed)
        (folder / str(seed)).mkdir()
        corpus, evaluation = planted.write(folder / str(seed))
        out = folder / str(seed) / "out"
        report = clean([corpus], out, load_rules(), evaluation_files=[evaluation], num_examples=1 << 30)
        for s in score(planted, report):
            t = total.get(s.label, Score(s.label, 0, 0, 0))
            total[s.label] = Score(s.label, t.planted + s.planted, t.removed + s.removed, t.right + s.right)
    return [total[label] for label in sorted(total)]


def shingles(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def near_duplicate_curve() -> list[str]:
    """Share of pairs called duplicates, by true similarity, as rows of a table."""
    rules, draw, writer = Duplicates(near=0.8), random.Random(0), Writer(0)
    found: dict[float, list[bool]] = {}
    for num_edits in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30):
        for pair in range(PAIRS):
            words = tokens(" ".join(writer.english() for _ in range(40)))[:WORDS_PER_TEXT]
            edited = list(words)
            for place in draw.sample(range(len(words)), num_edits):
                edited[place] = f"edit{pair}x{place}"
            one, other = shingles(words, rules.shingle), shingles(edited, rules.shingle)
            bucket = round(20 * len(one & other) / len(one | other)) / 20
            known = Deduplicator(rules)
            known.seen(fingerprint("", words, rules), "first")
            copy = known.seen(fingerprint("", edited, rules), "second")
            found.setdefault(bucket, []).append(copy is not None)
    rows = ["| true similarity (± 0.025) | pairs | called duplicates |", "|--:|--:|--:|"]
    for bucket, called in sorted(found.items(), reverse=True):
        rows.append(f"| {bucket:.2f} | {len(called):,} | {100 * sum(called) / len(called):.1f} % |")
    return rows


def speed(files: list[Path], folder: Path) -> str:
    before = os.times()
    report = clean(files, folder / "speed", load_rules(), on_error="skip")
    seconds = sum(b - a for a, b in zip(before[:4], os.times()[:4], strict=True))
    megabytes = report.bytes_in / 1e6
    return f"{megabytes:,.1f} MB in {seconds:.1f} processor seconds: {megabytes / seconds:.2f} MB/s per core."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines with a field `text`, to measure the speed on")
    parser.add_argument("--seeds", type=int, default=5, help="of the planted corpus (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = planted_scores(args.seeds, folder)
        files = args.files or [folder / str(seed) / "corpus.jsonl" for seed in range(args.seeds)]
        lines = ["# Cleaning", "", "Made by `benchmarks/cleaning.py`; its docstring says what is measured.", ""]
        lines += [f"## Planted cases and decoys, {args.seeds} seeds", "", *table(scores), ""]
        lines += ["## Near duplicates around the threshold of 0.8", "", *near_duplicate_curve(), ""]
        lines += ["## Speed", "", speed(files, folder), ""]
    facts = describe_environment(["rensa"])
    lines += [f"- {name}: " + (f"`{value}`" if name == "command" else value) for name, value in facts.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
