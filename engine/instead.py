"""What somebody gave in the place of what was asked for, with the command that makes the one out of the other.

A refusal that says "no checkpoint there" is right and no help to whoever gave a Hugging Face folder, a name on the Hub
or an address.  These are looked at here, once, for every command.
"""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MEGATRON = ("latest_checkpointed_iteration.txt", "common.pt")


def is_address(given: str | Path) -> bool:
    """`https://…`, `s3://…`: also after `Path` has made one slash of two."""
    return re.match(r"[a-z][a-z0-9+.-]*:/", str(given)) is not None


def is_hub_name(given: str | Path) -> bool:
    """Whether it could be `ORG/NAME` on the Hugging Face Hub: there is no such path, and no folder ORG."""
    path = Path(given)
    return HUB_NAME.fullmatch(str(given)) is not None and not path.exists() and not path.parent.exists()


def instead_of_checkpoint(given: str | Path) -> str:
    """What to do with a path that is no checkpoint; empty where nothing is known of it."""
    path = Path(given)
    if is_address(given):
        return f"; it is an address: download it, here a checkpoint is a folder ({given})"
    if is_hub_name(given):
        return (f"; if it is a model on the Hugging Face Hub, `octant convert from-hf {given} OUT` fetches it and "
                "makes a checkpoint of it")
    if is_hugging_face(path):
        return f"; it is a Hugging Face model: `octant convert from-hf {given} OUT` makes a checkpoint of it"
    if any((folder / name).exists() for folder in (path, path.parent) for name in MEGATRON):
        return f"; it is Megatron's: `octant convert from-megatron {given} OUT --config CONFIG.yaml` makes one of it"
    if path.is_file():
        return f"; it is a file, and a checkpoint is a folder{_named(path)}"
    return ""


def instead_of_tokenizer(given: str | Path) -> str:
    """What to do with a path at which there is no tokenizer; empty where nothing is known of it."""
    if is_hub_name(given):
        return (f"; if it is a model on the Hugging Face Hub: `hf download {given} --include 'tokenizer*' --local-dir "
                f"{Path(given).name}`, and give that folder")
    return "; it is an address: download it, and give the file" if is_address(given) else ""


def is_hugging_face(path: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return (path / "config.json").is_file()


def _named(path: Path) -> str:
    return f" (safetensors belong into a Hugging Face folder, beside a config.json: {path.name})" \
        if path.suffix == ".safetensors" else ""
