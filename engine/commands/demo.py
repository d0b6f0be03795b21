"""`octant demo`: the main job, start to end, on the CPU, from text that is already on the machine.

Every stage is a command that the user could have typed, and is shown as such: tokenizer, corpus, a tensor 2 × pipeline
2 training run, an exact resume, the export to Hugging Face with its logits check, a sample, the report.  Nothing is
downloaded and nothing outside the folder of the demo is written.  `octant demo align` (`engine.commands._demo_align`)
goes on where this ends.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

from corpus_tools.example import as_json_lines, standard_library
from engine.commands import _demo_align
from engine.commands._stages import LAYOUTS, MARK, make_room, octant
from engine.errors import OctantError
from engine.hints import hint
from engine.report.runs import read_run

CORPUS_BYTES = 3_000_000              # of the standard library's sources
HELD_OUT_EVERY = 20                   # one module in so many is kept for validation
VOCAB_SIZE = 2048
STEPS, SAVED_STEP = 160, 120          # the run, and the checkpoint from which its end is trained a second time
PROMPT = "def main():\n"

OURS = {"demo.yaml", "tokenizer.model", "tokenizer.vocab", "run", "resumed", "hf",
        *(f"{part}{suffix}" for part in ("train", "valid") for suffix in (".jsonl", ".bin", ".idx", ".json", ".parts"))}
CONFIG = MARK + """
run: {{dir: {directory}/run}}
model: {{num_layers: 4, hidden_size: 192, num_heads: 6, num_kv_heads: 2, ffn_hidden_size: 512, max_seq_len: 256}}
parallel: {{tensor: {tensor}, pipeline: {pipeline}}}
precision: {{compute: fp32}}
data:
  tokenizer: {directory}/tokenizer.model
  seq_len: 128
  train: [{{path: {directory}/train}}]
  valid: [{{path: {directory}/valid}}]
batch: {{micro: 4, global: 16}}
steps: {steps}
optim: {{lr: 3e-3, warmup_steps: 20}}
checkpoint: {{every: {saved_step}, keep: 0}}
eval: {{every: 40, batches: 2}}
log: {{every: 1}}
"""


def run(args: argparse.Namespace) -> int:
    """Run all stages; stops at the first that fails."""
    if args.what == "align":
        return _demo_align.run(Path(args.dir or "runs/demo-align"), args.processes or 1)
    directory, processes, started = Path(args.dir or "runs/demo"), args.processes or 4, time.monotonic()
    config = directory / "demo.yaml"
    make_room(config, OURS)
    num_bytes = write_texts(directory)
    print(f"text: {num_bytes / 1e6:.1f} MB of the Python standard library's sources in {directory}")
    config.write_text(CONFIG.format(directory=directory, steps=STEPS, saved_step=SAVED_STEP, **LAYOUTS[processes]),
                      encoding="utf-8")
    _prepare(directory)
    octant("train", str(config))
    losses = [record["loss"] for record in read_run(directory / "run").records]
    _resume(directory, config)
    _export(directory)
    octant("generate", f"{directory}/run", "--prompt", PROMPT, "--max-new-tokens", "60", "--temperature", "0.7")
    octant("report", f"{directory}/run")
    layout = " × ".join(f"{axis} {degree}" for axis, degree in LAYOUTS[processes].items())
    print(f"\ndemo: {layout}, loss {losses[0]:.2f} → {losses[-1]:.2f} in {STEPS} steps, "
          f"everything in {time.monotonic() - started:.0f} s")
    print(hint("train", config, f"steps={2 * STEPS}", why="goes on from the last checkpoint"))
    return 0


def write_texts(directory: Path) -> int:
    """The standard library's modules as `train.jsonl` and `valid.jsonl`; returns the bytes of text."""
    texts = list(standard_library(CORPUS_BYTES))
    held_out = texts[::HELD_OUT_EVERY]
    learned = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    (directory / "train.jsonl").write_text(as_json_lines(iter(learned)), encoding="utf-8")
    (directory / "valid.jsonl").write_text(as_json_lines(iter(held_out)), encoding="utf-8")
    return sum(len(text.encode()) for text in texts)


def _prepare(directory: Path) -> None:
    octant("tokenizer", "train", f"{directory}/train.jsonl", "--vocab-size", str(VOCAB_SIZE),
           "--output", f"{directory}/tokenizer.model")
    for part in ("train", "valid"):
        octant("prepare", f"{directory}/{part}.jsonl", "--tokenizer", f"{directory}/tokenizer.model",
               "--output", f"{directory}/{part}")


def _resume(directory: Path, config: Path) -> None:
    """Trains the end of the run again from its checkpoint, and compares every number of every step."""
    octant("train", str(config), f"run.dir={directory}/resumed", "eval.every=0",
           f"checkpoint.resume={directory}/run/checkpoints/step-{SAVED_STEP:08d}")
    first, second = ({record["step"]: (record["loss"], record["grad_norm"], record["lr"])
                      for record in read_run(directory / name).records} for name in ("run", "resumed"))
    different = [step for step in second if second[step] != first[step]]
    if different or len(second) != STEPS - SAVED_STEP:
        raise OctantError(f"resuming is not exact: {len(different)} of {len(second)} steps differ: {different[:3]}")
    print(f"resumed from step {SAVED_STEP}: loss and gradient norm of {len(second)} steps equal the run's, bit for bit")


def _export(directory: Path) -> None:
    skip = [] if find_spec("transformers") else ["--skip-check"]
    if skip:
        print('transformers is not installed, so the export is not compared with it: pip install "octant[hf]"')
    octant("convert", "to-hf", f"{directory}/run", f"{directory}/hf", *skip)
