"""What a checkpoint says of itself besides tensors, and that it makes sense.

    config       the run's configuration: sections of keys, as resolved
    data         what identifies the corpora and the tokenizer
    state        where the run stands: step, consumed_samples, optimizer_step; not there where only weights were written
    unlogged     sums since the last line of the log
    base         the model under an adapter: its path, and the hash of its manifest
    end_ids      ids at which texts end besides the tokenizer's own
    rl           price of divergence, scale of scores and next prompt of a run that learns from its own texts
    score_scale  mean and standard deviation of a reward model's scores on samples held back
    base         where the checkpoint is whose model lies under this one's adapter, and the hash of its manifest

Everything may be missing, and other keys may be there.  But what is there is of its type, so that whoever uses it need
not ask again; what sections of `config` hold is for the configuration's own schema to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.reading import shown

SCALE, CARRIED = "score_scale", "rl"
COMPARED = "replicas_compared"                               # copies on several ranks were equal when it was saved
SECTIONS = ("model", "data", "run", "precision")             # of `config`, those that are looked into by name
NUMBERS = ("step", "consumed_samples", "optimizer_step")
LARGEST = 1 << 62


def check_metadata(metadata: Mapping[str, Any], step: int) -> None:
    """
    Args:
        step: of the checkpoint.

    Raises:
        ValueError: something in it is of another type, or contradicts the step.
    """
    config, data = (_section(metadata, key, "metadata") for key in ("config", "data"))
    for key in SECTIONS:
        _section(config, key, "config")
    for section, key, kind in (("run", "dir", str), ("data", "tokenizer", str | None)):
        path = config.get(section, {}).get(key, "")
        if not isinstance(path, kind):
            raise ValueError(f"config.{section}.{key} is {shown(path)}, not a path")
    below = _section(metadata, "base", "metadata")
    if below and not all(isinstance(below.get(key), str) for key in ("path", "content")):
        raise ValueError(f"base is {shown(below)}, not path and content of a model")
    if not isinstance(data.get("tokenizer"), str | None) or not _is_size(data.get("end_of_document") or 0):
        raise ValueError(f"data names the tokenizer {shown(data.get('tokenizer'))} and the end of a document "
                         f"{shown(data.get('end_of_document'))}")
    _check_position(metadata, step)
    _check_carried(metadata)
    for start, stop in _list_of(data, "skip", 2):
        if not (_is_size(start) and _is_size(stop) and start < stop):
            raise ValueError(f"data.skip leaves out [{shown(start)}, {shown(stop)}]")
    scale = _section(metadata, SCALE, "metadata")
    if scale and not all(type(scale.get(key)) in (int, float) and abs(scale[key]) < LARGEST for key in ("mean", "std")):
        raise ValueError(f"{SCALE} is {shown(scale)}, not a mean and a standard deviation")
    if not isinstance(metadata.get(COMPARED, False), bool):
        raise ValueError(f"{COMPARED} is {shown(metadata[COMPARED])}, not true or false")
    if not all(map(_is_size, _list_of(metadata, "end_ids"))):
        raise ValueError(f"end_ids is {shown(metadata['end_ids'])}, not a list of ids")


def _check_carried(metadata: Mapping[str, Any]) -> None:
    """What a run that learns from its own texts carries from step to step, where it is one."""
    carried = _section(metadata, CARRIED, "metadata")
    if not carried:
        return
    scores, numbers = carried.get("scores"), (int, float)
    if (type(carried.get("kl_coef")) not in numbers or not abs(carried["kl_coef"]) < LARGEST
            or not _is_size(carried.get("next_prompt")) or not isinstance(scores, list) or len(scores) != 3
            or not all(type(number) in numbers and abs(number) < LARGEST for number in scores)
            or not all(type(value) is str for value in _section(carried, "contents", CARRIED).values())):
        raise ValueError(f"{CARRIED} is {shown(carried)}")


def _check_position(metadata: Mapping[str, Any], step: int) -> None:
    if "state" in metadata:
        state = _section(metadata, "state", "metadata")
        if not all(_is_size(state.get(key)) for key in NUMBERS):
            raise ValueError(f"state is {shown(state)}, not {', '.join(NUMBERS)}")
        if state["step"] != step or (state["optimizer_step"] > step and CARRIED not in metadata):
            raise ValueError(f"state is {shown(state)} in a checkpoint of step {step}")
    sums = _list_of(metadata, "unlogged")
    if not all(type(number) in (int, float) and abs(number) < LARGEST for number in sums):
        raise ValueError(f"unlogged is {shown(metadata['unlogged'])}, not a list of numbers")


def _section(whole: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under a key; empty where there is none."""
    value = whole.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}.{key} is {shown(value)}, not an object")
    return value


def _list_of(whole: Mapping[str, Any], key: str, length: int | None = None) -> list[Any]:
    """The list under a key, of lists of that length; empty where there is none."""
    value = whole.get(key, [])
    if not isinstance(value, list) or (
            length is not None and not all(isinstance(row, list) and len(row) == length for row in value)):
        raise ValueError(f"{key} is {shown(value)}, not a list")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST
