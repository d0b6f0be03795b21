"""Generated tokens per second beside `transformers.generate`, on one machine's CPU.

    python -m benchmarks.generation [--sizes small] [--prompts 1 16 64] [--new 64] [--cpu-time] [--markdown F]

The same weights continue the same prompts in fp32, each by the same number of tokens, both sides in one process and
taking turns; greedy, where both must write the same, and sampled from the whole distribution.  Prompts have lengths as
instructions have: their logarithms are normal.  `transformers` pads them on the left to the longest, as its users do
with several; ours are fed one behind the other.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment import SIZES
from checkpoints_tools.from_hf import convert_from_hf
from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.distributed.mesh import single_mesh
from engine.generate.generator import Generator
from engine.generate.load import inference_config, load_model, open_shared
from engine.generate.request import Limits, Sampling
from tests.kit.hf_folders import save_hf

MEDIAN, LONGEST = 40, 256                                      # of prompts, in tokens


def prompts_of(number: int, vocab_size: int) -> list[list[int]]:
    """Random ids; a third of the prompts is longer than one and a half times the median."""
    draw = random.Random(number)
    lengths = [min(LONGEST, max(4, round(MEDIAN * draw.lognormvariate(0, 0.8)))) for _ in range(number)]
    return [[draw.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


def theirs(model: Any, prompts: list[list[int]], new: int, sampled: bool) -> Callable[[], list[list[int]]]:
    """`transformers.generate`, all prompts at once."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {"do_sample": False}

    def run() -> list[list[int]]:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
                             eos_token_id=None, use_cache=True, **how)
        return [[int(token) for token in row] for row in out[:, longest:]]

    return run


def ours(generator: Generator, prompts: list[list[int]], new: int, sampled: bool) -> Callable[[], list[list[int]]]:
    """The engine's, as it makes rollouts."""
    sampling = Sampling(temperature=1.0 if sampled else 0.0)
    return lambda: [text.tokens for text in generator.generate(prompts, sampling, Limits(new))]


def quietly(run: Callable[[], list[list[int]]]) -> Callable[[], None]:
    def once() -> None:
        run()

    return once


def compared(name: str, args: argparse.Namespace) -> list[Comparison]:
    """Tables of one size of model."""
    import transformers  # optional package

    size, tables = SIZES[name], []
    with tempfile.TemporaryDirectory() as place, redirect_stdout(StringIO()):
        folder = Path(place)
        save_hf(folder / "hf", "Llama", max_position_embeddings=1024, rms_norm_eps=1e-6, **size)
        checkpoint = convert_from_hf(folder / "hf", folder / "ours", check=False)
        twin = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="float32").eval()
        reader = open_shared(checkpoint or folder / "ours", single_mesh())
        config = inference_config(reader, single_mesh().topology)
        generator = Generator(load_model(reader, config, single_mesh()))
    time_of = "CPU time of one thread" if args.cpu_time else f"{args.threads} threads"
    for number in args.prompts:
        prompts = prompts_of(number, size["vocab_size"])
        for sampled in (way == "sampled" for way in args.ways):
            them, us = theirs(twin, prompts, args.new, sampled), ours(generator, prompts, args.new, sampled)
            same = sampled or sum(a == b for a, b in zip(them(), us(), strict=True))
            title = (f"{name}, {number} prompt{'s' * (number > 1)} of {min(map(len, prompts))} to "
                     f"{max(map(len, prompts))} tokens, {args.new} new ones, "
                     + ("sampled" if sampled else f"greedy ({same} of {number} texts the same)") + f", {time_of}")
            work = number * args.new
            tables.append(alternating(
                Case("transformers", quietly(them), work), Case("octant", quietly(us), work), repeats=args.repeats,
                warmup=1, unit="tokens", title=title, packages=["transformers"],
                clock=time.process_time if args.cpu_time else time.perf_counter))
            print(tables[-1].text(environment=False), flush=True)
    return tables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["small"])
    parser.add_argument("--prompts", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--ways", nargs="*", choices=("greedy", "sampled"), default=["greedy", "sampled"])
    parser.add_argument("--new", type=int, default=64, help="tokens of each text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="count what the processor worked for each side, with "
                        "one thread: for machines that others use too")
    add_options(parser, repeats=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    publish([table for name in args.sizes for table in compared(name, args)], args)


if __name__ == "__main__":
    main()
