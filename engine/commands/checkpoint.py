"""`octant checkpoint list|inspect|verify|reshard`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import CHECKPOINTS, checkpoints_at, corrupt_checkpoints, no_checkpoint
from engine.checkpoint.manifest import DamagedCheckpoint, StoredTensor
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.reshard import reshard
from engine.checkpoint.resume import open_checkpoint
from engine.hints import hint
from engine.progress import Progress


def run(args: argparse.Namespace) -> int:
    actions = {"list": _list, "inspect": _inspect, "verify": _verify, "reshard": _reshard}
    return actions[args.action](args)


def _found(path: Path) -> list[Path]:
    found = checkpoints_at(path)
    if not found:
        raise no_checkpoint(path)
    return found


def _list(args: argparse.Namespace) -> int:
    """One line per checkpoint; looks at manifests and file sizes only."""
    path = Path(args.path)
    rows = [_row(checkpoint) for checkpoint in _found(path)]
    aside = [str(p) for folder in (path, path / CHECKPOINTS) for p in corrupt_checkpoints(folder)]
    if args.json:
        _print_json({"checkpoints": rows, "set_aside": aside})
        return 0
    print(f"{'step':>10}  {'tokens seen':>18}  {'sample':>14}  {'size':>10}  {'files':>6}  {'tensors':>8}  state")
    for row in rows:
        size = _size(row["bytes"]) if row["bytes"] is not None else "?"
        print(f"{row['step'] if row['step'] is not None else '?':>10}  {_number(row['tokens_seen']):>18}  "
              f"{_number(row['sample']):>14}  {size:>10}  {row['files'] or '?':>6}  "
              f"{row['tensors'] or '?':>8}  {row['problem'] or 'complete'}  {row['path']}")
    for name in aside:
        print(f"set aside as corrupt: {name}")
    print(hint("checkpoint", "verify", args.path, why="reads every byte"))
    return 0


def _row(checkpoint: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(checkpoint), "step": None, "tokens_seen": None, "sample": None, "bytes": None,
                           "files": None, "tensors": None, "problem": None}
    try:
        reader = CheckpointReader(checkpoint)
    except DamagedCheckpoint as error:
        return row | {"problem": str(error)}
    problems = reader.verify(content=False)
    manifest = reader.manifest
    return row | _position(reader.metadata) | {
                  "step": reader.step, "bytes": manifest.num_bytes, "files": len(manifest.files),
                  "tensors": len(manifest.tensors),
                  "problem": f"{problems[0].file}: {problems[0].what}" if problems else None}


def _position(metadata: dict[str, Any]) -> dict[str, int]:
    """How far a run had come in its data: tokens, and the number of the next sample; empty where only weights are."""
    samples = metadata.get("state", {}).get("consumed_samples")
    seq_len = metadata.get("config", {}).get("data", {}).get("seq_len")
    if samples is None:
        return {}
    return {"sample": samples} | ({"tokens_seen": samples * seq_len} if isinstance(seq_len, int) else {})


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _inspect(args: argparse.Namespace) -> int:
    reader = CheckpointReader(_found(Path(args.path))[-1])
    manifest = reader.manifest
    if args.json:
        report: dict[str, Any] = {
            "path": str(reader.path), "step": reader.step, "bytes": manifest.num_bytes, "metadata": reader.metadata,
            "files": [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in manifest.files]}
        if args.tensors:
            report["tensors"] = {key: {"dtype": t.dtype, "shape": t.shape, "boxes": t.num_parts}
                                 for key, t in manifest.tensors.items()}
        _print_json(report)
        return 0
    print(f"{reader.path}: step {reader.step}, {_size(manifest.num_bytes)} in {len(manifest.files)} files, "
          f"{len(manifest.tensors)} tensors")
    for kind, (count, elements) in sorted(_kinds(manifest.tensors).items()):
        print(f"  {kind:<24} {count:>6} tensors  {elements:>18,} elements")
    for name, value in reader.metadata.items():
        text = json.dumps(value, ensure_ascii=False)
        print(f"  {name}: {text if len(text) <= 400 else text[:400] + ' …'}")
    if args.tensors:
        for key, tensor in manifest.tensors.items():
            shape = "×".join(map(str, tensor.shape)) or "scalar"
            print(f"  {tensor.dtype:<8} {shape:<20} {tensor.num_parts:>5} parts  {key}")
    print(hint("checkpoint", "verify", reader.path))
    return 0


def _kinds(tensors: Any) -> dict[str, tuple[int, int]]:
    """Count and elements by what the tensors are: `model`, `optimizer.exp_avg`, …"""
    kinds: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    stored: StoredTensor
    for key, stored in tensors.items():
        words = key.split(".")
        kind = ".".join(words[:2]) if words[0] == "optimizer" else words[0]
        count, elements = kinds[kind]
        volume = 1
        for n in stored.shape:
            volume *= n
        kinds[kind] = count + 1, elements + volume
    return kinds


def _verify(args: argparse.Namespace) -> int:
    """Reads every byte; exit code 1 when anything is wrong."""
    report = {}
    for checkpoint in _found(Path(args.path)):
        report[str(checkpoint)] = problems = _problems(checkpoint)
        if args.json:
            continue
        print(f"{checkpoint}: {'every byte is as it was written' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
    bad = sum(bool(problems) for problems in report.values())
    if args.json:
        _print_json({"ok": not bad, "problems": report})
    elif bad:
        print(f"{bad} of {len(report)} damaged; training resumes from the newest that is whole")
    else:
        print(hint("checkpoint", "inspect", list(report)[-1]))
    return 1 if bad else 0


def _problems(checkpoint: Path) -> list[str]:
    try:
        reader = CheckpointReader(checkpoint)
    except DamagedCheckpoint as error:
        return [str(error)]
    with Progress("reading", reader.manifest.num_bytes) as progress:
        return [f"{problem.file}: {problem.what}" for problem in reader.verify(progress=progress.advance)]


def _reshard(args: argparse.Namespace) -> int:
    newest = CheckpointReader(_found(Path(args.path))[-1])
    with Progress("verifying", newest.manifest.num_bytes) as progress:
        source = open_checkpoint(newest.path, progress.advance)
    with Progress("writing", source.manifest.num_bytes) as progress:
        output = reshard(source, Path(args.output), args.files, progress.advance)
    written = CheckpointReader(output).manifest
    if args.json:
        _print_json({"path": str(output), "files": len(written.files), "bytes": written.num_bytes})
        return 0
    print(f"{output}: step {source.step}, {_size(written.num_bytes)} in {len(written.files)} files "
          f"(from {len(source.manifest.files)})")
    print(hint("checkpoint", "verify", output))
    return 0


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()
