"""What breaks when PPO is wrong: mistakes that engines have shipped, made on purpose, and the tests that notice.

Each row changes a few characters of a copy of the repository and runs the tests that should fail.  A mistake that no
test notices ends the program with 1.

    python benchmarks/rl/mutations.py [--only WORD]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("engine", "kernels", "tests", "benchmarks", "configs", "launch", "corpus_tools", "checkpoints_tools",
          "pyproject.toml")
NUMBERS, OBJECTIVES, RESUME, BAD = (f"tests/rl/test_{name}.py" for name in ("numbers", "objectives", "resume",
                                                                            "bad_input"))
APART = "tests/rl/test_placements.py::test_every_placement_is_the_same_mathematics[texts on ranks of their own]"
TENSOR = "tests/rl/test_placements.py::test_every_placement_is_the_same_mathematics[tensor]"
OFFLOAD, AHEAD = "tests/rl/test_offload.py::test_it_is_the_same_run[zero 3]", "tests/rl/test_async.py"


@dataclass(frozen=True)
class Mutation:
    """A mistake: in a file, what is there and what should not be, and where it shows."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    also: tuple[str, str] = ("", "")


MUTATIONS = (
    Mutation("KL sign", "engine/rl/advantages.py", "-coef * kl_BT * mask_BT", "coef * kl_BT * mask_BT",
             (NUMBERS, OBJECTIVES)),
    Mutation("KL on padding", "engine/rl/advantages.py", "-coef * kl_BT * mask_BT", "-coef * kl_BT", (NUMBERS,)),
    Mutation("KL counted twice", "engine/rl/objectives.py",
             "config.kl_coef if isinstance(config, GRPOConfig) else 0.0", "config.kl_coef", (OBJECTIVES,)),
    Mutation("another temperature for old log-probabilities", "engine/rl/objectives.py",
             "batch.labels_SB, temperature, num_ids)[:1]", "batch.labels_SB, 1.0, num_ids)[:1]", (TENSOR,)),
    Mutation("another temperature in the loss", "engine/rl/objectives.py", "batch.labels_SB, self.temperature,",
             "batch.labels_SB, 1.0,", (OBJECTIVES,)),
    Mutation("ids outside the tokenizer in the softmax", "engine/rl/cast.py", "rollout.temperature, num_ids),",
             "rollout.temperature),", (OBJECTIVES,)),
    Mutation("returns after whitening", "engine/rl/experience.py",
             "advantages = whiten(advantages, learned, total)",
             "advantages = whiten(advantages, learned, total); returns = advantages + values", (OBJECTIVES,)),
    Mutation("value loss normalised per microbatch", "engine/rl/objectives.py",
             "return [(weights * each).sum() for", "return [(weights * each).sum() / weights.sum() for", (OBJECTIVES,)),
    Mutation("minibatch normalised per data rank", "engine/rl/updates.py", "    all_reduce(divisor, state.mesh.data)\n",
             "", (TENSOR,)),
    Mutation("whitening over one rank's tokens", "engine/rl/experience.py", "        all_reduce(total, world)\n", "",
             (TENSOR,)),
    Mutation("truncated texts in the denominator", "engine/rl/experience.py", "_counts(learned, rows",
             "_counts(there, rows", (OBJECTIVES, BAD)),
    Mutation("token metrics averaged per rank", "engine/rl/metrics.py", "dist.ReduceOp.SUM", "dist.ReduceOp.MAX",
             (TENSOR,)),
    Mutation("end token masked because it is also padding", "engine/rl/rows.py",
             "    return Sample(tokens, mask,", "    mask &= tokens[1:] != 0\n    return Sample(tokens, mask,",
             (OBJECTIVES,)),
    Mutation("optimizer of the critic not restored", "engine/train/state.py",
             "return [*state.masters(prefix), *state.moments(prefix),", "return [*state.masters(prefix),", (RESUME,)),
    Mutation("prompt stream restarted at resume", "engine/rl/loop.py", 'int(state["next_prompt"])', "0", (RESUME,)),
    Mutation("scale of the scores restarted at resume", "engine/rl/loop.py", 'RunningMoments.of(state["scores"])',
             "self.scores", (RESUME,)),
    Mutation("non-finite old log-probabilities in the denominator", "engine/rl/experience.py",
             "numbers[LOG_PROBS], finite, config)", "numbers[LOG_PROBS], there, config)", (BAD,)),
    Mutation("a received buffer reused before its copy", "engine/rl/move.py", "else torch.empty(sum(received))",
             "else BUFFER[: sum(received)]", (APART,),
             ("class Move:", "BUFFER = torch.empty(1 << 16)\n\n\nclass Move:")),
    Mutation("random numbers by rank", "engine/rl/making.py", "numbers=[prompts[place].number for place in own]",
             "numbers=[place - own.start for place in own]", (TENSOR,)),
    Mutation("moments of an idle role not kept", "engine/parallel/data/offload.py", "                if changed:",
             "                if False:", (OFFLOAD,)),
    Mutation("texts of the step to come not saved", "engine/rl/loop.py", "pieces_of(self.carried.ahead)",
             "pieces_of(())", (AHEAD,)),
)


def noticed(mutation: Mutation) -> list[str]:
    """The tests that fail with the mistake, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, there / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, there / name)
        file = there / mutation.file
        text = file.read_text()
        if text.count(mutation.right) < 1:
            raise SystemExit(f"{mutation.name}: {mutation.file} does not hold {mutation.right!r} any more")
        file.write_text(text.replace(mutation.right, mutation.wrong, 1).replace(*mutation.also, 1))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *mutation.tests],
                              cwd=there, capture_output=True, text=True)
        return [line.split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ").split("::")[-1]
                for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="mistakes whose name holds this")
    given = parser.parse_args()
    missed = 0
    print("| mistake | tests that fail |\n|---|---|")
    for mutation in MUTATIONS:
        if given.only in mutation.name:
            failing = noticed(mutation)
            missed += not failing
            print(f"| {mutation.name} | {', '.join(f'`{name}`' for name in failing[:3]) or '**none**'}"
                  f"{f' and {len(failing) - 3} more' if len(failing) > 3 else ''} |", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
