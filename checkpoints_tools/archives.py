"""What `torch.save` writes: a zip of a pickle and the tensors' bytes, or, before torch 1.6, a row of pickles.

A pickle may run code, so torch's reader of tensors alone (`weights_only`) is used.  It trusts sizes and never looks at
the zip's checksums, so both are looked at before: records must be stored as they are (a compressed one would be mapped
as if it were the tensor, or fill the memory), their bytes must have the checksum they were written with, and no tensor
may be larger than what the file holds of it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from engine.errors import CheckpointError
from engine.reading import regular_size, require_fetched, shown

READ_BYTES = 1 << 20
REASON = re.compile(r"WeightsUnpickler error: ([^\n]+)")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file, mapped; of one in the old format, in memory.

    Raises:
        CheckpointError: it is none, is damaged, or holds something else.
    """
    try:
        regular_size(path)
        with open(path, "rb") as file:
            require_fetched(file.read(1024))
            file.seek(0)
            is_zip = zipfile.is_zipfile(file)
            found = load_archive(path if is_zip else file, file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of tensors alone: {error}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} is not a file of tensors alone: it holds a {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not is_plain_tensor(tensor):
            raise CheckpointError(f"{path} is not a file of tensors alone: under {shown(name)} it holds a "
                                  f"{_kind(tensor)}, not a tensor")
    return dict(found)


def load_archive(source: Path | IO[bytes], file: IO[bytes]) -> Any:
    """What an archive holds, on the CPU; plain values and tensors only.

    Args:
        source: what torch reads; a path is mapped into memory.
        file: the same, open; looked through first.

    Raises:
        ValueError: damaged, or not of tensors and plain values alone.
    """
    try:
        if zipfile.is_zipfile(file):
            _verify(zipfile.ZipFile(file))
        file.seek(0)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, Path))
    except Exception as error:          # the unpickler stumbles over damage in every way there is, MemoryError included
        raise ValueError(_reason(error)) from None


def _verify(archive: zipfile.ZipFile) -> None:
    """Every record against its checksum; all of them are 0 where torch was told not to compute any."""
    records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {shown(record.filename)} is compressed, which torch does not do")
    for record in records if any(record.CRC for record in records) else ():
        with archive.open(record) as content:
            while content.read(READ_BYTES):
                pass


def is_plain_tensor(value: Any) -> bool:
    """Is it a dense tensor on the CPU with bytes for every element?"""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and not value.is_quantized and value.numel() * value.itemsize <= value.untyped_storage().nbytes())


def _kind(value: Any) -> str:
    return f"tensor of another kind ({value.layout}, {value.device})" if isinstance(value, torch.Tensor) \
        else type(value).__name__


def _reason(error: Exception) -> str:
    """One line of what torch or the zip reader says."""
    found = REASON.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    text = found[1] if found else str(error).strip().split("\n")[0]
    return f"{text[:200] or 'no reason given'} ({type(error).__name__})"
