"""Rows of benchmarks/planning/rows.csv from the files in which others publish what they measured.

    python benchmarks/planning_sources.py FILE.csv … > rows.csv          # or benchmarks/planning.py --rows FILE.csv

Three kinds are known by their columns: vTrain's iteration times, SimuMax's B200 runs, and the golden files of
Megatron-LM's functional tests, collected by case and platform.  What their columns do not say is said here, with where
it comes from; a run with something that Octant has not (experts, encoders, latent attention, layers dealt by hand) is
left out.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

COLUMNS = ("set,device,practice,layers,hidden,heads,kv_heads,ffn,vocab,seq,global_batch,micro,tensor,pipeline,chunks,"
           "context,data,mlp,recompute,sequence,zero,precision,step_seconds,memory_gib,steady_gib,bias,options,"
           "source").split(",")
Row = dict[str, str]

# Of SimuMax's models (run_pretrain_llama3.sh): layers come from a case's name.
LLAMA_3 = {"70b": {"hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
           "405b": {"hidden": 16384, "heads": 128, "kv_heads": 16, "ffn": 53248}}
GOLDEN_DEVICES = {"dev_dgx_a100": "a100-80g", "dev_dgx_h100": "h100-sxm", "dev_dgx_gb200": "b200"}
# Cases whose options change what is compared and are in no column: resumed, grown batches, layers dealt by hand, …
OTHERWISE = re.compile(r"uneven|account_for_embedding|mla|fsdp|multi_dist|15b|weekly|uninstall|grpo|etp")
# … and those that change the peak alone: more microbatches in flight, gradients that wait for one product.
OTHER_PEAK = re.compile(r"tunable_overlap|defer_embedding|qk_layernorm")


def rows_of(path: Path) -> Iterator[Row]:
    """The file's runs, in the columns of rows.csv; such a file is passed on as it is.

    Raises:
        ValueError: its columns are none of the known ones.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if set(COLUMNS) <= columns:
            yield from reader
        elif "iteration time (ms)" in columns:
            yield from map(_vtrain, reader)
        elif "real_alloc_GiB" in columns:
            yield from filter(None, map(_simumax, reader))
        elif "alloc_GiB_median" in columns:
            yield from filter(None, map(_golden, reader))
        else:
            raise ValueError(f"{path}: none of the files that benchmarks/planning_sources.py knows")


def _row(**values: object) -> Row:
    """With the usual value where none is given."""
    usual = dict.fromkeys(COLUMNS, "") | {"chunks": "1", "context": "1", "sequence": "0", "bias": "0",
                                          "precision": "bf16", "recompute": "none"}
    return usual | {name: str(value) for name, value in values.items()}


def _seconds(milliseconds: str) -> float:
    return round(float(milliseconds) / 1000, 7)


def _vtrain(row: Mapping[str, str]) -> Row:
    """fp16 and 1F1B; on several nodes with full recomputation.

    Within a node without: each 1,024 tokens more take 2.0 ms in a layer of 2,048, where four passes would need
    products at 109 % of the A100's peak, and three need 81 %, as every other set does.
    """
    alone, hidden = int(row["# GPUs"]) <= 8, int(row["hidden size"])
    return _row(set=f"vTrain, {'one node' if alone else 'several nodes'}", device="a100-80g",
                practice="Megatron-LM of vTrain" if alone else "Megatron-LM 2021", layers=row["# layers"],
                hidden=hidden, heads=row["attention heads"], kv_heads=row["attention heads"], ffn=4 * hidden,
                vocab=51200, seq=row["sequence length"], global_batch=row["global batch"], micro=row["micro batch"],
                tensor=row["tensor parallelism"], pipeline=row["pipeline parallelism"],
                data=row["data parallelism"], mlp="gelu", recompute="none" if alone else "full", zero=0,
                step_seconds=_seconds(row["iteration time (ms)"]), source="VIA-Research/vTrain data")


def _simumax(row: Mapping[str, str]) -> Row | None:
    """Llama 3 with a few layers, sequence parallelism, the distributed optimizer, a fused loss and added gradients."""
    case = row["case"]
    if (model := re.match(r"llama3_(\d+b)_", case)) is None:
        return None

    def number(name: str, otherwise: int = 1) -> int:
        found = re.search(rf"_{name}(\d+)", case)
        return int(found[1]) if found else otherwise

    data = number("dp")
    return _row(set="SimuMax B200", device="b200", practice="NeMo 2025", layers=number("l"), vocab=128256,
                seq=number("seq", 4096), global_batch=number("mbc") * data, micro=1, tensor=number("tp"),
                pipeline=number("pp"), context=number("cp"), data=data, mlp="swiglu",
                sequence=int(number("tp") > 1), zero=1, step_seconds=_seconds(row["real_ms"]),
                memory_gib=row["real_alloc_GiB"], options="accumulates fused_loss",
                source=f"MooreThreads/SimuMax {case}", **LLAMA_3[model[1]])


def _golden(row: Mapping[str, str]) -> Row | None:
    """GPT of any width in bf16; 8 devices, and 4 in cases of one GB200 node.

    The vocabulary is that of GPT-2 unless the case has its own; it is padded to 128 for each tensor rank.  Attention is
    written out in layers without Transformer Engine and in deterministic cases that do not resume (their
    `attention-backend`); else it is cuDNN's on an H100 and with grouped keys.  There is no dropout beside context
    parallelism.
    """
    case, device = row["case"], GOLDEN_DEVICES.get(row["platform"])
    if (row["family"] != "gpt" or row["experts"] or device is None or not row["bf16"] or row["fp8"]
            or OTHERWISE.search(case)):
        return None
    tensor, pipeline, context = int(row["tp"]), int(row["pp"]), int(row["cp"])
    world = 4 if device == "b200" and "_1node" in case else 8
    hidden, layers = int(row["hidden"]), int(row["layers"])
    padded = -(-int(row["vocab"] or 50257) // (128 * tensor)) * 128 * tensor
    deterministic, usual = bool(row["deterministic"]), "memory_speed" in case          # whose options are the defaults
    local = not usual and "_te_" not in case
    unfused = local or "cross_entropy_loss_fusion" in case or (deterministic and not usual and "resume" not in case)
    words = {"local": local, "unfused": unfused, "deterministic": deterministic, "dropout": context == 1,
             "accumulates": not row["no_wgrad_fusion"],
             "transposed": not (unfused or row["kv_groups"]) and (
                 context > 1 or device == "a100-80g" or (device == "b200" and deterministic)),
             "positions": "rope" not in case}
    return _row(set="Megatron-LM golden files", device=device, practice="NeMo 2025", layers=layers, hidden=hidden,
                heads=row["heads"], kv_heads=row["kv_groups"] or row["heads"],
                ffn=row["ffn"] or (hidden * 8 // 3 // 64 * 64 if row["swiglu"] else 4 * hidden), vocab=padded,
                seq=row["seq"], global_batch=row["gbs"], micro=row["mbs"], tensor=tensor, pipeline=pipeline,
                chunks=layers // pipeline // int(row["vpp_arg"]) if row["vpp_arg"] else 1, context=context,
                data=world // (tensor * pipeline * context), mlp="swiglu" if row["swiglu"] else "gelu",
                recompute=row["recompute"] or "none", sequence=int(bool(row["seq_parallel"]) and tensor > 1),
                zero=int(bool(row["dist_opt"])), steady_gib=row["alloc_GiB_median"],
                memory_gib="" if OTHER_PEAK.search(case) else row["max_alloc_GiB"],
                bias=int("disable_bias" not in case), options=" ".join(word for word, is_on in words.items() if is_on),
                source=f"NVIDIA/Megatron-LM {case} {row['platform']}")


def main(paths: Iterable[str]) -> None:
    """Writes the rows of these files."""
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for path in paths:
        writer.writerows(rows_of(Path(path)))


if __name__ == "__main__":
    main(sys.argv[1:])
