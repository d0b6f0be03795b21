"""The arguments of the verbs that read a checkpoint: what is made of a model, and what it is turned into."""

from __future__ import annotations

from engine.commands._parser import Parser, add_actions


def generate(p: Parser) -> None:
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder (its newest one)")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    p.add_argument("--prompt-file", metavar="FILE", help="one prompt per line")
    p.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (default: %(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest; 0: all (default: %(default)s)")
    p.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest of this total probability")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--num-samples", type=int, default=1, metavar="N", help="of each prompt (default: %(default)s)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                   help="above 1: ids that the text has already become less likely (default: %(default)s)")
    p.add_argument("--stop", nargs="+", default=[], metavar="STRING", help="texts end where one of these is complete")
    p.add_argument("--beams", type=int, default=1, metavar="K", help="beam search for the likeliest text")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default: %(default)s)")
    p.add_argument("--bos", action="store_true", help="begin prompts with the tokenizer's beginning-of-text id, which "
                                                      "most models from Hugging Face expect")
    p.add_argument("--chat", action="store_true", help="prompts are what a user says; only the answers are printed")
    p.add_argument("--template", metavar="T", help="of conversations (default: the run's)")
    p.add_argument("--best-of", type=int, default=1, metavar="N", help="answers to each prompt; the best is printed")
    p.add_argument("--reward-model", metavar="CHECKPOINT", help="says which of them is best")
    p.add_argument("--keep-all", action="store_true", help="print all of them, best first")
    p.add_argument("--token-ids", action="store_true", help="prompts and results are ids; needs no tokenizer")
    p.add_argument("--json", action="store_true", help="one JSON object per prompt")
    _inference(p)


def eval(p: Parser) -> None:
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder (its newest one)")
    p.add_argument("--data", metavar="PREFIX", help="a corpus made by `octant prepare`")
    p.add_argument("--tasks", nargs="+", metavar="FILE", help="instead: questions with answers to choose from, as JSON")
    p.add_argument("--harness", nargs="+", metavar="TASK", help="instead: tasks of lm-evaluation-harness, by name "
                                                                 "(pip install lm_eval)")
    p.add_argument("--include", metavar="DIR", help="with --harness: a folder of tasks of your own")
    p.add_argument("--fewshot", type=int, metavar="N", help="with --harness: examples before a question")
    p.add_argument("--limit", type=int, metavar="N", help="with --harness: only the first N questions of each task")
    p.add_argument("--bos", action="store_true", help="begin questions with the beginning-of-text id")
    p.add_argument("--seq-len", type=int, metavar="S", help="tokens per sequence (default: as in training)")
    p.add_argument("--stride", type=int, metavar="K", help="windows begin every K tokens, and the last K of each count "
                                                           "(default: as long as a window)")
    p.add_argument("--positions", action="store_true", help="the loss at each position of a window as well")
    p.add_argument("--svg", metavar="FILE", help="with --positions: as a picture")
    p.add_argument("--batches", type=int, metavar="N", help="only the first N batches (default: the whole corpus)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="the result as a JSON object")
    _inference(p)


def score(p: Parser) -> None:
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a reward model's, or its run's folder (its newest one)")
    p.add_argument("--data", required=True, metavar="FILE", help="conversations, pairs or ranked answers")
    p.add_argument("--template", metavar="T", help="(default: the run's)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="a JSON object per record, and a summary")
    _inference(p)


def _inference(p: Parser) -> None:
    """How a checkpoint's model is loaded; the layout need not be the one that wrote it."""
    p.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default: %(default)s)")
    p.add_argument("--pipeline", type=int, default=1, metavar="P", help="pipeline stages (default: %(default)s); "
                                                                        "T × P processes are started here")
    p.add_argument("--tokenizer", metavar="T",
                   help="where the model's tokenizer is now (default: where the run found it)")
    p.add_argument("--base", metavar="CHECKPOINT",
                   help="where the model under the checkpoint's adapter is now (default: where it was)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="of the arithmetic (default: as in training)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def convert(p: Parser) -> None:
    to_hf, from_hf, to_megatron, from_megatron, to_peft, from_peft, average, merge, extend = actions = add_actions(
        p, ("to-hf", "a checkpoint as a Hugging Face model", "convert to-hf runs/x/checkpoints/step-00001000 out/"),
        ("from-hf", "a Hugging Face Llama, Mistral or Qwen2 model as a checkpoint", "convert from-hf model/ out/"),
        ("to-megatron", "a checkpoint as megatron-core's torch_dist", "convert to-megatron runs/x out/"),
        ("from-megatron", "megatron-core's torch_dist as a checkpoint",
         "convert from-megatron iter_0000010 out/ --config llama-7b"),
        ("to-peft", "the adapter of a checkpoint in PEFT's format", "convert to-peft runs/lora adapter/"),
        ("from-peft", "an adapter of PEFT as a checkpoint, on top of another one",
         "convert from-peft adapter/ out/ --base runs/x"),
        ("average", "the last checkpoints of a run as one", "convert average runs/x out/ --last 5"),
        ("merge", "two models of one shape as one", "convert merge runs/a runs/b out/ --method slerp"),
        ("extend-vocab", "a model with rows for the pieces that were appended to its tokenizer",
         "convert extend-vocab runs/x out/ --tokenizer merged.model"))
    for action in actions:
        action.add_argument("source", metavar="FROM")
        if action is merge:
            action.add_argument("other", metavar="B")
        action.add_argument("output", metavar="OUT", help="a folder that is not there yet, or empty")
    for action in (to_hf, from_hf, to_megatron, from_megatron):
        action.add_argument("--skip-check", action="store_true", help="do not compare the result with its source")
    for action in (to_hf, to_megatron):
        action.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
        action.add_argument("--base", metavar="CHECKPOINT",
                            help="where the model under the checkpoint's adapter is now (default: where it was)")
    to_hf.add_argument("--tokenizer", metavar="T", help="where the run's tokenizer is now; `none`: write none "
                                                        "(default: where the run found it)")
    from_hf.add_argument("--tokenizer", metavar="T", help="what runs from it will use; `none`: leave it open "
                                                          "(default: the folder's own)")
    from_hf.add_argument("--allow-pickle", action="store_true",
                         help="read pytorch_model.bin where there are no safetensors, as tensors only")
    to_peft.add_argument("--base-name", metavar="MODEL", help="written as base_model_name_or_path: the model under it, "
                                                              "as transformers will find it")
    from_peft.add_argument("--base", required=True, metavar="CHECKPOINT", help="the model that it was trained on")
    extend.add_argument("--tokenizer", required=True, metavar="MODEL",
                        help="what `octant tokenizer extend` made of the model's own, or another that begins with it")
    extend.add_argument("--from-tokenizer", metavar="MODEL", help="where the model's own tokenizer is now (default: "
                                                                  "where the run found it)")
    average.add_argument("--last", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    merge.add_argument("--method", choices=("linear", "slerp", "ties"), default="linear", help="(default: %(default)s)")
    merge.add_argument("--share", type=float, default=0.5, help="of B, for linear and slerp (default: %(default)s)")
    merge.add_argument("--base", metavar="CHECKPOINT", help="for ties: what both were trained from")
    merge.add_argument("--density", type=float, default=0.2, help="for ties: the share of the changes of a tensor that "
                                                                  "count, the largest (default: %(default)s)")
    from_megatron.add_argument("--config", required=True, metavar="CONFIG.yaml",
                               help="its model section says what these checkpoints do not: the model's shape")


def checkpoint(p: Parser) -> None:
    listing, inspect, verify, reshard = add_actions(
        p, ("list", "the checkpoints of a run; looks at manifests and file sizes only", "checkpoint list runs/x"),
        ("inspect", "what is in a checkpoint", "checkpoint inspect runs/x/checkpoints/step-00001000 --tensors"),
        ("verify", "read every byte against the manifest; exit code 1 when anything is wrong",
         "checkpoint verify runs/x/checkpoints/step-00001000"),
        ("reshard", "rewrite a checkpoint as so many files", "checkpoint reshard FROM OUT --files 8"))
    for action in (listing, inspect, verify, reshard):
        action.add_argument("path", metavar="PATH")
        action.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    reshard.add_argument("output", metavar="OUT")
    reshard.add_argument("--files", type=int, default=1, help="(default: %(default)s)")
