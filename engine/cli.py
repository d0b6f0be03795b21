"""The `octant` command: one table of verbs, each a module of `engine.commands` that is imported when it is called.

Nothing here imports torch, so `--help` and every mistake in the arguments answer at once.  A verb's `run(args)` returns
the exit code; an `OctantError` is printed without a traceback and gives its own code.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from engine import __version__
from engine.commands import _model_arguments as model
from engine.commands._parser import Parser, add_actions, sentence
from engine.errors import OctantError
from engine.schedules.table import schedule_names

TEXT_FILES = ".txt .jsonl .json .parquet, each also .gz or .zst"
CONFIG = "a file, or the name of one that comes with Octant (`octant config` names them)"


@dataclass(frozen=True)
class Verb:
    """One row of the table: what it does in a line, an example, and its arguments."""

    name: str
    help: str
    example: str
    add_arguments: Callable[[Parser], None]


def _demo(p: Parser) -> None:
    p.add_argument("what", nargs="?", choices=("pretrain", "align"), default="pretrain",
                   help="pretrain: text to a model; align: a model to an instructed and a preferred one "
                        "(default: %(default)s)")
    p.add_argument("--dir", help="folder for everything it writes (default: runs/demo, runs/demo-align)")
    p.add_argument("--processes", type=int, choices=(1, 2, 4),
                   help="processes of the runs: 4 is tensor 2 × pipeline 2 (default: 4; for align 1)")


def _tokenizer(p: Parser) -> None:
    train, extend, verify = add_actions(
        p, ("train", "train a SentencePiece BPE model on text files",
            "tokenizer train data/*.txt --vocab-size 32000 --output tok.model"),
        ("extend", "add another model's pieces, as for Chinese vocabulary expansion",
         "tokenizer extend llama.model --with chinese_sp.model --output merged.model"),
        ("verify", "compare a model with its Hugging Face export on text files",
         "tokenizer verify data/*.txt --tokenizer tok.model"))
    for action in (train, verify):
        action.add_argument("files", nargs="+", metavar="FILE", help=TEXT_FILES)
        action.add_argument("--field", default="text", help="key of the text in JSON and parquet (default: text)")
    train.add_argument("--vocab-size", type=int, required=True)
    train.add_argument("--output", required=True, help="the .model file to write")
    for action in (train, extend):
        _overwrite(action, "replace the files of these names if they are there")
    extend.add_argument("model", metavar="MODEL", help="the .model whose ids stay as they are")
    extend.add_argument("--with", dest="with_model", required=True, metavar="MODEL", help="the .model to take from")
    extend.add_argument("--only", choices=("han", "all"), default="han",
                        help="pieces to take: those with Han characters leave English as it was (default: %(default)s)")
    extend.add_argument("--output", required=True, help="the .model file to write")
    verify.add_argument("--tokenizer", required=True, metavar="MODEL")


def _overwrite(p: Parser, what: str) -> None:
    p.add_argument("--overwrite", action="store_true", help=f"{what} (default: refuse)")


def _prepare(p: Parser) -> None:
    p.add_argument("files", nargs="+", metavar="FILE", help=TEXT_FILES)
    p.add_argument("--tokenizer", required=True, metavar="T",
                   help="a .model, a .tiktoken, a Hugging Face tokenizer folder or tokenizer.json, or `bytes`")
    p.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    p.add_argument("--field", default="text", help="key of the text in JSON and parquet (default: %(default)s)")
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                   help="what to do with a record that cannot be read (default: %(default)s)")
    p.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True,
                   help="end every document with the end-of-document id (default: on)")
    p.add_argument("--chat", action="store_true", help="the files are of conversations: template, tokens and loss mask "
                                                       "ahead of a run, for large sets")
    p.add_argument("--template", default="auto", metavar="T",
                   help="of conversations, as data.template (default: the tokenizer's own)")
    p.add_argument("--kind", choices=("conversations", "pairs", "ranked"), default="conversations",
                   help="of conversations: what a record holds (default: %(default)s)")
    p.add_argument("--columns", nargs="+", default=[], metavar="KEY=NAME",
                   help="of conversations: other names of keys, such as prompt=question")
    p.add_argument("--shard", metavar="K/N", help="only the K-th of N runs of files, into PREFIX-0000K-of-0000N")
    p.add_argument("--holdout", metavar="N", help="put so many documents, or such a share of them (0.01), into "
                                                  "PREFIX-valid instead; chosen by content")
    _overwrite(p, "replace a corpus made from anything else that is there")
    p.add_argument("--backend", choices=("auto", "reference"), default="auto",
                   help="auto: gigatoken where it is installed and gives the same ids (default: %(default)s)")


def _data(p: Parser) -> None:
    example, extract, classifier, inspect, preview, verify, merge, clean = add_actions(
        p, ("example", "text to try things with: the sources of this Python as JSON lines",
            "data example corpus.jsonl"),
        ("extract", "documents out of records, web pages, TeX and StackExchange's dumps",
         "data extract pages.jsonl.gz --kind html --field html --keep lang=en,zh --output pages.text.jsonl.gz"),
        ("classifier", "a fastText model of good and bad text, for the rule `fasttext` of clean",
         "data classifier --good books.jsonl --bad web.jsonl --output quality.bin"),
        ("inspect", "statistics of a prepared corpus, or the samples a run consumes",
            "data inspect run.yaml --samples 0:8 --json"),
        ("preview", "what a fine-tuning run sees: its samples as text, what is learned in colour",
         "data preview configs/sft-llama3.2-1b.yaml --samples 0:2"),
        ("verify", "check a prepared corpus against its index and content hashes", "data verify data/web"),
        ("merge", "several corpora of one tokenizer as one", "data merge data/web-0000*.bin --output data/web"),
        ("clean", "filter documents and lines by rules, mask personal data, remove duplicates and evaluation sets",
         "data clean raw/*.jsonl.gz --output clean/ --decontaminate gsm8k_test.jsonl"))
    example.add_argument("output", metavar="FILE", help="the .jsonl to write")
    example.add_argument("--bytes", type=int, default=3_000_000, metavar="N", help="of text (default: %(default)s)")
    extract.add_argument("files", nargs="+", metavar="FILE", help=".jsonl .json .txt, each also .gz or .zst; Posts.xml")
    extract.add_argument("--output", required=True, metavar="FILE", help="a .jsonl or .jsonl.gz")
    extract.add_argument("--kind", choices=("text", "html", "tex"), default="text", help="what the field holds "
                                                                                       "(default: %(default)s)")
    extract.add_argument("--field", default="text", help="key of the text; a.b is in the object a "
                                                            "(default: %(default)s)")
    extract.add_argument("--keep", action="append", default=[], metavar="KEY=A,B", help="only records with such values")
    extract.add_argument("--at-least", action="append", default=[], metavar="KEY=N", help="only records with N or more")
    extract.add_argument("--at-most", action="append", default=[], metavar="KEY=N", help="only records with N or less")
    _overwrite(extract, "replace the file that is there")
    classifier.add_argument("--good", nargs="+", required=True, metavar="FILE", help="texts as they should be")
    classifier.add_argument("--bad", nargs="+", required=True, metavar="FILE", help="texts as they are")
    classifier.add_argument("--output", required=True, metavar="FILE.bin")
    classifier.add_argument("--field", default="text", help="key of the text (default: %(default)s)")
    _overwrite(classifier, "replace the model that is there")
    merge.add_argument("target", nargs="+", metavar="PREFIX", help="corpora, in the order they shall have")
    merge.add_argument("--output", required=True, metavar="PREFIX")
    _overwrite(merge, "replace a corpus made from anything else that is there")
    for action in (inspect, verify):
        action.add_argument("target", nargs="+", metavar="TARGET", help="prefix of a corpus, or a file")
        action.add_argument("--json", action="store_true", help="one JSON object per line")
    preview.add_argument("config", metavar="CONFIG.yaml")
    preview.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as data.template=chatml")
    preview.add_argument("--samples", metavar="A:B", default="0:2", help="samples A to B-1 (default: %(default)s)")
    preview.add_argument("--json", action="store_true",
                         help="one JSON object per line: index source tokens loss_mask (role of pairs)")
    inspect.add_argument("--samples", metavar="A:B", help="consumed samples A to B-1 of a CONFIG.yaml")
    inspect.add_argument("--document", type=int, metavar="N", help="print document N of the corpus")
    inspect.add_argument("--tokenizer", metavar="T", help="show text, not only ids")
    clean.add_argument("files", nargs="*", metavar="FILE", help=".txt .jsonl .json .parquet, each also .gz or .zst")
    clean.add_argument("--output", metavar="DIR", help="gets clean-*.jsonl.gz, report.md and _report.json")
    _overwrite(clean, "replace what was cleaned from other files, or with other rules")
    clean.add_argument("--rules", metavar="FILE.yaml", help="your rules (default: those of --print-rules)")
    clean.add_argument("--print-rules", action="store_true", help="print the default rules, to be changed")
    clean.add_argument("--decontaminate", nargs="+", default=[], metavar="FILE", help="evaluation texts to keep out")
    clean.add_argument("--examples", type=int, default=5, metavar="N", help="shown per rule (default: %(default)s)")
    clean.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    clean.add_argument("--field", default="text", help="key of the text in JSON and parquet (default: %(default)s)")
    clean.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                       help="what to do with a record that cannot be read (default: %(default)s)")


def _train(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", help=CONFIG)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as optim.lr=3e-4")


def _plan(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", nargs="?", help=CONFIG + "; not with --budget")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as parallel.zero=3")
    p.add_argument("--gpus", metavar="N[,N…]", help="processes (default: as parallel.data says, or a node)")
    p.add_argument("--gpu", metavar="NAME", help="device, such as h100-sxm (default: of the first lines of CONFIG)")
    p.add_argument("--calibrate", nargs="+", default=[], metavar="FILE",
                   help="figures of the device from what octant bench mfu, kernels and network measured (--json)")
    p.add_argument("--search", action="store_true", help="find the fastest layouts that fit")
    p.add_argument("--tokens", metavar="T", help="length of the run, such as 1.4T, instead of the configuration's")
    p.add_argument("--budget", metavar="C", help="the best model and tokens for so many operations, such as 1e21")
    p.add_argument("--runs", nargs="+", metavar="RUN_DIR", help="with --budget: by the law of these runs, fitted "
                                                                "(default: by that of Hoffmann et al. 2022)")
    p.add_argument("--svg", metavar="FILE", help="draw memory by stage and time by cause; of a budget the loss by size")
    p.add_argument("--json", action="store_true", help="print one object: memory by stage, whether it fits, step time")
    p.add_argument("--explain-rank", type=int, metavar="R", help="what rank R holds, does, and whom it works with")
    p.add_argument("--schedule-svg", metavar="FILE", help="draw the pipeline schedule, at costs as the model's")


def _goodput(p: Parser) -> None:
    p.add_argument("--gpus", type=int, required=True, metavar="N", help="of the job")
    p.add_argument("--failures", type=float, default=419, metavar="N", help="that a job met with (default: Llama 3's, "
                                                                            "%(default)s)")
    p.add_argument("--days", type=float, default=54, metavar="D", help="in so many days (default: %(default)s)")
    p.add_argument("--on", type=int, default=16_384, metavar="N", help="on so many GPUs (default: %(default)s)")
    for name, value, text in (("restart", 60.0, "from a failure to training (default: %(default)s, which the tests "
                                                "hold a lost node to)"),
                              ("save", 1.0, "that training waits for a save (default: %(default)s)"),
                              ("write", 0.0, "until a save counts, behind training's back (default: %(default)s)"),
                              ("step", None, "of a step, to say the interval in steps")):
        p.add_argument(f"--{name}-seconds", type=float, default=value, metavar="S", help=text)
    p.add_argument("--json", action="store_true", help="print one object: best_interval_seconds goodput shares …")


def _rehearse(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", help=CONFIG)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as parallel.zero=3")
    p.add_argument("--rank", type=int, metavar="R", help="the rank to walk through (default: 0)")
    p.add_argument("--world", type=int, metavar="N", help="processes of the job (default: as parallel.data says)")
    p.add_argument("--all-stages", action="store_true", help="one rank of every pipeline stage and tensor position")
    p.add_argument("--device", choices=("auto", "cuda", "cpu", "pretend"), default="auto",
                   help="pretend: tensors without memory, which find what would go wrong on a GPU (default: a GPU, or "
                        "without one pretend)")
    p.add_argument("--json", action="store_true", help="print peak_bytes, step_seconds, phases and faults")


def _schedule(p: Parser) -> None:
    p.add_argument("name", metavar="NAME", choices=schedule_names(), help=", ".join(schedule_names()))
    p.add_argument("--stages", type=int, required=True, metavar="P")
    p.add_argument("--microbatches", type=int, required=True, metavar="M")
    p.add_argument("--chunks", type=int, metavar="V", help="model chunks per stage (default: what the schedule needs)")
    for part, cost in (("forward", 1.0), ("backward", 1.0), ("weight", 1.0), ("comm", 0.0)):
        p.add_argument(f"--cost-{part}", type=float, default=cost, metavar="C", help="(default: %(default)s)")
    p.add_argument("--svg", metavar="FILE", help="draw it")
    p.add_argument("--json", action="store_true", help="makespan, bubble, peak_in_flight and actions")


def _bench(p: Parser) -> None:
    p.add_argument("action", metavar="WHAT", choices=("mfu", "network", "matmul", "kernels", "step"),
                   help="mfu: steps of a job, any layout on any processes; network: messages and collectives, and the "
                        "slow pair; matmul: the speed of plain matrix products; kernels: every implementation of every "
                        "operation; step: a training step beside peers, and where its time goes")
    p.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="options of that benchmark; try --help after it")


def _report(p: Parser) -> None:
    p.add_argument("run_dir", metavar="RUN_DIR", nargs="+", help="a run's folder; several are drawn on the same axes")
    p.add_argument("--output", metavar="PATH", help="a folder, or a .html file (default: the first run's folder)")
    p.add_argument("--watch", type=int, metavar="SECONDS", help="write it again while the run goes on; the page loads "
                                                                "itself again as often")


def _sweep(p: Parser) -> None:
    p.add_argument("mixtures", metavar="MIXTURES.yaml", help="base, dir, sources and mixtures, or random ones")
    p.add_argument("--json", action="store_true", help="shares and losses of each mixture as JSON")


def _rewind(p: Parser) -> None:
    p.add_argument("run_dir", metavar="RUN_DIR", help="the folder of a run that is not training now")
    p.add_argument("--to", type=int, required=True, metavar="STEP", help="a step with a checkpoint; 0: the beginning")
    p.add_argument("--skip-steps", type=int, required=True, metavar="N", help="leave out the data of so many steps "
                                                                             "from there on")


def _log(p: Parser) -> None:
    p.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder")
    p.add_argument("--all", action="store_true", help="a line for each save and each skipped step")


def _config(p: Parser) -> None:
    p.add_argument("config", metavar="CONFIG.yaml", nargs="?", help=CONFIG)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as optim.lr=3e-4")
    p.add_argument("--schema", action="store_true", help="print a JSON Schema of what a file may hold, for editors")
    p.add_argument("--scripts", action="store_true", help="print the folder of the batch scripts")


def _presets(p: Parser) -> None:
    p.add_argument("name", metavar="NAME", nargs="?", help="print this one as YAML, to be changed")


def _completion(p: Parser) -> None:
    p.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")


def _doctor(p: Parser) -> None:
    """No arguments: everything is looked up."""


VERBS = (
    Verb("demo", "the whole path on this machine's CPU, without downloads: text to a model that generates",
         "demo --dir runs/demo", _demo),
    Verb("tokenizer", "train, extend or verify a tokenizer", "tokenizer train *.txt --vocab-size 8000 --output t.model",
         _tokenizer),
    Verb("prepare", "text into a memory-mapped corpus (.bin, .idx)",
         "prepare web.jsonl.zst --tokenizer tok.model --output data/web --workers 8", _prepare),
    Verb("data", "inspect, verify or clean corpora", "data inspect data/web", _data),
    Verb("train", "run a training job; started plainly it launches the local processes its layout needs",
         "train tiny parallel.tensor=2 optim.lr=3e-4", _train),
    Verb("generate", "sample from a checkpoint", 'generate runs/x --prompt "Once upon a time" --temperature 0.8',
         model.generate),
    Verb("eval", "loss, perplexity and bits per byte of a checkpoint on a corpus", "eval runs/x --data data/held",
         model.eval),
    Verb("score", "what a reward model says of conversations or pairs", "score runs/rm --data pairs.jsonl",
         model.score),
    Verb("convert", "checkpoints to and from Hugging Face and megatron-core", "convert to-hf runs/x out/",
         model.convert),
    Verb("checkpoint", "list, inspect, verify or reshard checkpoints", "checkpoint list runs/x", model.checkpoint),
    Verb("rewind", "a run back to an earlier step, leaving out the data behind it: once, and remembered",
         "rewind runs/x --to 1000 --skip-steps 300", _rewind),
    Verb("log", "what happened to a run: starts, changes, skips, spikes, saves, ways back, ends", "log runs/x", _log),
    Verb("config", "a configuration as it will be read, resolved; or the schema of one",
         "config tiny parallel.tensor=2", _config),
    Verb("presets", "the models that model.preset knows", "presets llama3-8b", _presets),
    Verb("plan", "a job of any size on paper: what a rank holds and does, and the schedule as a picture",
         "plan llama-65b --explain-rank 777", _plan),
    Verb("sweep", "small models on mixtures of sources, and the loss on each held-out source", "sweep mixtures.yaml",
         _sweep),
    Verb("goodput", "what failures cost a job of any size, and how often it is best to save",
         "goodput --gpus 2048 --restart-seconds 60 --save-seconds 2 --write-seconds 40", _goodput),
    Verb("rehearse", "one rank of a job of any size walked through here, its peers left out",
         "rehearse llama-65b --rank 777", _rehearse),
    Verb("schedule", "a pipeline schedule as a grid, with its bubble and peak activations",
         "schedule 1f1b --stages 4 --microbatches 8", _schedule),
    Verb("bench", "measured tables", "bench matmul", _bench),
    Verb("report", "report.html and pictures of a run", "report runs/x", _report),
    Verb("doctor", "the environment, and what is used of it; paste it into an issue", "doctor", _doctor),
    Verb("completion", "a script that completes commands in a shell", "completion bash", _completion),
)


def build_parser() -> Parser:
    """The parser of the whole command line; `args.verb` names the row of `VERBS`."""
    verbs = "\n".join(f"  {verb.name:<12}{verb.help}" for verb in VERBS)
    parser = Parser(prog="octant", usage="octant VERB …",
                    description=f"A 3D-parallel training engine for Llama-family language models.\n\nverbs:\n{verbs}",
                    epilog="start here:\n  octant demo\n\n`octant VERB --help` explains a verb.")
    parser.add_argument("--version", action="version", version=f"octant {__version__}")
    table = parser.add_subparsers(dest="verb", required=True, metavar="VERB", help=argparse.SUPPRESS, prog="octant",
                                  parser_class=Parser)
    for verb in VERBS:
        verb.add_arguments(table.add_parser(verb.name, help=verb.help, description=sentence(verb.help),
                                            epilog=f"example:\n  octant {verb.example}"))
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code.

    `args.argv` keeps the words themselves: the processes of a layout are started with them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        print(parser.format_help(), file=sys.stderr)
        print("octant: say what to do: octant VERB …", file=sys.stderr)
        return 2
    asked = [*words[1:], "--help"] if words[0] == "help" else words
    args = parser.parse_args(asked, argparse.Namespace(argv=words, parser=parser))
    try:
        code = int(import_module(f"engine.commands.{args.verb}").run(args))
        sys.stdout.flush()                                   # a closed pipe shows here, not at interpreter exit
        return code
    except OctantError as error:
        print(f"octant {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"octant {args.verb}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # the reader has gone: nobody left to tell
        return 1


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script.  `kill -USR2` makes the process print where each of its threads stands."""
    if sys.stderr is not None:
        faulthandler.register(signal.SIGUSR2)
    sys.exit(run(argv))
