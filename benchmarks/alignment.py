"""Steps of fine-tuning beside TRL's, on one machine's CPU: SFT, DPO, ORPO, reward models and GRPO.

    pip install 'trl>=1,<2'
    python benchmarks/alignment.py [--objectives sft dpo orpo reward grpo] [--sizes small] [--repeats 15] [--markdown F]

Both sides are whole trainers, each in a process of its own, with the same weights, tokenizer, template, batches in the
same order, AdamW, clipping, fp32 and threads; that their losses are the same is a test
(`tests/align/test_trl.py`).  A step is what lies between two steps' beginnings: batch, forward and backward passes,
update, and what is logged.  They take turns step by step, so that each round compares the same texts.

Texts have lengths as instructions have: of questions and answers the logarithms are normal, the longest are cut.  TRL's
DPO asks its reference anew in every step unless it is told not to; ours computes what it says once, before the first
step, which is not part of the steps.  `precomputed` is TRL told so, the like of ours.  TRL logs the entropy and the
accuracy of tokens besides.

A step of GRPO writes its texts, sampled at temperature 1 and as long as they may be (random models end none early),
scores them by a function, and makes one update.  Ours asks the policy for old log-probabilities, too, which TRL then
takes from the update's own forward pass; and scores in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.rl.rewards import letters
from checkpoints_tools.from_hf import convert_from_hf
from corpus_tools.conversations.start import open_corpora
from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job, single_mesh
from engine.metrics.phases import Moment, Phases
from engine.rl.prompts import Prompts
from engine.rl.start import begin
from engine.train.loop import Trainer
from tests.kit.chats import hf_tokenizer
from tests.kit.hf_folders import save_hf
from tests.kit.texts import english_texts

SIZES = {"tiny": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 80, "vocab_size": 1280},
         "medium": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
                    "intermediate_size": 704, "vocab_size": 4096},
         "small": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
                   "intermediate_size": 1408, "vocab_size": 8192}}
SEQ_LEN, BATCH = 256, 4
RATE, BETAS, CLIP = 1e-5, (0.9, 0.95), 1.0
OBJECTIVES = ("sft", "dpo", "orpo", "reward", "grpo")
PROMPTS, GROUP, NEW = 4, 8, 32                               # of a step of GRPO; tokens of each text
TEMPLATE = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
            "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ turn.content }}<|im_end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Turns:
    """A trainer's side of taking turns: its process waits before each step until it is told to go on."""

    def __init__(self, orders: Connection, clock: Callable[[], float]) -> None:
        self._orders, self._clock, self._since = orders, clock, 0.0

    def __call__(self) -> None:
        """Begins a step, and ends the one before."""
        if self._since:
            self._orders.send(self._clock() - self._since)
        self._orders.recv()
        self._since = self._clock()


def words(draw: random.Random, known: list[str], median: float) -> str:
    """So many words that half of all texts have more than `median`."""
    count = min(round(draw.lognormvariate(0, 0.7) * median) + 1, 4 * round(median))
    first = draw.randrange(len(known) - count)
    return " ".join(known[first : first + count])


def write_texts(folder: Path, objective: str, number: int) -> None:
    """Conversations of one question and one answer, or two of them."""
    draw, known = random.Random(0), " ".join(english_texts(4)).split()
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(number):
            question, *answers = (words(draw, known, median) for median in (12, 18, 18))
            record: dict[str, Any] = {"messages": [{"role": "user", "content": question},
                                                   {"role": "assistant", "content": answers[0]}]}
            if objective == "grpo":
                record = {"prompt": question}
            elif objective != "sft":
                record = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
            file.write(json.dumps(record) + "\n")


def config_of(folder: Path, objective: str, size: dict[str, int], steps: int) -> Config:
    """Our run."""
    model = {"num_layers": size["num_hidden_layers"], "hidden_size": size["hidden_size"], "max_seq_len": SEQ_LEN,
             "num_heads": size["num_attention_heads"], "num_kv_heads": size["num_key_value_heads"], "norm_eps": 1e-6,
             "ffn_hidden_size": size["intermediate_size"], "vocab_size": size["vocab_size"],
             "head": "score" if objective == "reward" else "language_model"}
    own: dict[str, Any] = {"batch": {"micro": BATCH, "global": BATCH}} if objective != "grpo" else {
        "batch": {"micro": PROMPTS * GROUP}, "grpo": {"epochs": 1, "minibatch": PROMPTS * GROUP, "group": GROUP},
        "roles": {"reward": {"function": "benchmarks.rl.rewards:letters", "workers": 1}},
        "rollout": {"prompts": PROMPTS, "max_new_tokens": NEW, "batch": PROMPTS * GROUP}}
    return resolve_layout(Config.model_validate({
        "run": {"dir": str(folder / "run"), "objective": objective, "device": "cpu"}, "model": model, "steps": steps,
        "data": {"tokenizer": str(folder / "tokenizer"), "template": str(folder / "template.jinja"), "pack": False,
                 "seq_len": SEQ_LEN, "train": [{"path": str(folder / "texts.jsonl"), "max_epochs": 1}]},
        **own, "precision": {"compute": "fp32"}, "parallel": {"data": 1},
        "checkpoint": {"load": str(folder / "ours"), "every": 0}, "eval": {"every": 0},
        "optim": {"lr": RATE, "decay": "constant", "warmup_steps": 0, "betas": list(BETAS), "weight_decay": 0.0,
                  "grad_clip": CLIP}}), 1)


def ours(folder: Path, objective: str, size: dict[str, int], steps: int, turn: Turns) -> None:
    """Trains as `octant train` does."""
    config = config_of(folder, objective, size, steps)
    phases = Phases(torch.device("cpu"))

    def heard(moment: Moment) -> None:
        if moment.phase == ("reshard" if objective == "grpo" else "load"):
            turn()

    phases.listeners.append(heard)
    if objective == "grpo":
        begin(config, lambda: False, False)(Job("cpu"), phases).run()
        return
    corpora = open_corpora(config, say=lambda line: None)
    Trainer.start(config, single_mesh(), corpora, lambda: False, phases=phases).run()


def theirs(folder: Path, objective: str, size: dict[str, int], steps: int, turn: Turns,
           precomputed: bool = False) -> None:
    """The same with TRL: records in our order."""
    import datasets  # optional packages
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "<s>"
    records = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    order = json.loads((folder / "order.json").read_text())
    asked = [records[number] if objective == "sft" else of_turns(records[number]) for number in order]
    kind = transformers.AutoModelForSequenceClassification if objective == "reward" else \
        transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder / "hf", dtype="float32", **({"num_labels": 1} if objective == "reward" else {}))
    model.config.pad_token_id = tokenizer.pad_token_id
    own: dict[str, Any] = {"sft": {"assistant_only_loss": True, "packing": False, "shuffle_dataset": False},
                           "dpo": {"precompute_ref_log_probs": precomputed},
                           "grpo": {"per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP,
                                    "max_completion_length": NEW, "shuffle_dataset": False}}.get(objective, {})
    if objective != "grpo":
        own |= {"max_length": SEQ_LEN, "train_sampling_strategy": "sequential", "per_device_train_batch_size": BATCH}
    trainers = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
                "reward": (trl.RewardTrainer, trl.RewardConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        trainers["orpo"] = ORPOTrainer, ORPOConfig
    make, arguments = trainers[objective]
    settings = arguments(
        output_dir=str(folder / "trl"), max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, **own)

    class Waits(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()

    def score(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return letters((), [turns[0]["content"] for turns in completions], ())

    more = {"reward_funcs": score} if objective == "grpo" else {}
    make(model, args=settings, train_dataset=datasets.Dataset.from_list(asked), processing_class=tokenizer,
         callbacks=[Waits()], **more).train()


def of_turns(record: dict[str, str]) -> dict[str, Any]:
    """A pair, or a prompt, as turns."""
    prompt = [{"role": "user", "content": record["prompt"]}]
    answers = {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected") if key in record}
    return answers | {"prompt": prompt}


def serve(side: Callable[..., None], folder: Path, arguments: tuple[Any, ...], threads: int, cpu_time: bool,
          orders: Connection) -> None:
    """A process that is one trainer."""
    torch.set_num_threads(threads)
    with redirect_stdout(StringIO()):
        side(folder, *arguments, Turns(orders, process_time if cpu_time else perf_counter))


@contextmanager
def running(side: Callable[..., None], folder: Path, arguments: tuple[Any, ...], threads: int,
            cpu_time: bool) -> Iterator[Callable[[], float]]:
    """A trainer that waits; calling it makes one step, and says how long that took."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(side, folder, arguments, threads, cpu_time, there), daemon=True)
    process.start()
    there.close()

    def step() -> float:
        here.send(True)
        return float(here.recv())

    try:
        yield step
    finally:
        process.terminate()
        process.join()


def beside_trl(objective: str, name: str, threads: int, repeats: int, cpu_time: bool) -> Comparison:
    """One table."""
    warmup, size = 3, SIZES[name]
    steps, batch = warmup + repeats + 2, PROMPTS if objective == "grpo" else BATCH
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        (folder / "template.jinja").write_text(TEMPLATE)
        hf_tokenizer(folder / "tokenizer", vocab_size=1200)
        write_texts(folder, objective, steps * batch)
        if objective == "reward":
            save_classifier(folder, size)
        else:
            save_hf(folder / "hf", "Llama", max_position_embeddings=SEQ_LEN, rms_norm_eps=1e-6, **size)
        with redirect_stdout(StringIO()):
            convert_from_hf(folder / "hf", folder / "ours", check=False)
            config = config_of(folder, objective, size, steps)
            (folder / "order.json").write_text(json.dumps(order_of(config, objective, steps * batch)))
        arguments = (objective, size, steps)
        sides: dict[str, Callable[..., None]] = {"TRL": theirs}
        if objective == "dpo":
            sides["TRL, precomputed"] = partial(theirs, precomputed=True)
        sides["octant"] = ours
        work, unit = (PROMPTS * GROUP * NEW, "new tokens") if objective == "grpo" else (BATCH, "samples")
        cases = [Case(label, stack.enter_context(running(side, folder, arguments, threads, cpu_time)), work)
                 for label, side in sides.items()]
        model = f"{size['num_hidden_layers']} layers of {size['hidden_size']}, vocabulary {size['vocab_size']}"
        time = "CPU time of one thread" if cpu_time else f"{threads} threads"
        step = f"{PROMPTS} prompts × {GROUP} texts of {NEW} tokens" if objective == "grpo" else f"{BATCH} samples"
        return alternating(*cases, repeats=repeats, warmup=warmup, unit=unit, packages=["transformers", "trl"],
                           title=f"{objective}, {name}: {model}, {step} a step, {time}")


def order_of(config: Config, objective: str, number: int) -> list[int]:
    """The lines of the file in the order in which our run takes them."""
    if objective == "grpo":
        lines = [line["prompt"] for line in map(json.loads, Path(config.data.train[0].path).read_text().splitlines())]
        prompts = Prompts.open(config)
        return [lines.index(prompts.prompt(index).record["prompt"]) for index in range(number)]
    train = open_corpora(config, say=lambda line: None).train
    [source] = train.sources
    windows = [train.sample(index).window for index in range(number)]
    return [source.rows[w][0] if objective == "sft" else source.records[w] for w in windows]


def save_classifier(folder: Path, size: dict[str, int]) -> None:
    """A random model with one score."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=SEQ_LEN, rms_norm_eps=1e-6, num_labels=1, **size)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "hf")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["small"])
    parser.add_argument("--threads", type=int, default=2, help="of each side (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="count what the processor worked for each side, with "
                        "one thread each: for machines that others use too")
    add_options(parser, repeats=15)
    args = parser.parse_args(arguments)
    threads = 1 if args.cpu_time else args.threads
    publish([beside_trl(objective, name, threads, args.repeats, args.cpu_time)
             for name in args.sizes for objective in args.objectives], args)


if __name__ == "__main__":
    main()
