"""Whatever a torch_dist folder holds: the tensors that were written, or a refusal that names the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata

from checkpoints_tools import megatron
from checkpoints_tools.megatron import TRACKER, convert_to_megatron
from checkpoints_tools.names import PREFIX, megatron_parts
from checkpoints_tools.torch_dist import FORMAT_FILE, METADATA, VALUE_CLASSES, TorchDistReader
from engine.checkpoint.read import CheckpointReader
from tests.kit.checkpoints import model, write_random
from tests.kit.fuzz import Reader, bent, damaged, fuzz, hostile

CONFIG = model(num_kv_heads=2, vocab_size=40)
FOLDER = "release"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    reader = write_random(root / "ours", CONFIG)
    object.__setattr__(reader.manifest, "step", 0)
    convert_to_megatron(reader, root / "theirs", file_bytes=50_000, check=False)
    return root / "theirs"


def described(folder: Path) -> dict[str, Any]:
    """The metadata in plain values."""
    found = pickle.loads((folder / METADATA).read_bytes())
    return {key: {"dtype": str(info.properties.dtype), "size": list(info.size), "chunks": [
        {"offset": list(chunk.offsets), "size": list(chunk.sizes), "place": list(vars(
            found.storage_data[metadata.MetadataIndex(key, chunk.offsets)]).values())[:3]}
        for chunk in info.chunks]} for key, info in found.state_dict_metadata.items() if hasattr(info, "chunks")}


def pickled(description: Any) -> bytes:
    """The other way round, whatever the values are; what cannot be put so far is left as it is."""
    tensors, places = {}, {}
    try:
        for key, info in description.items():
            chunks = [metadata.ChunkStorageMetadata(size_of(chunk["offset"]), size_of(chunk["size"]))
                      for chunk in info["chunks"]]
            for chunk in info["chunks"]:
                index = metadata.MetadataIndex(key, size_of(chunk["offset"]))
                places[index] = filesystem._StorageInfo(*chunk["place"])
            dtype = getattr(torch, str(info["dtype"]).removeprefix("torch."), info["dtype"])
            tensors[key] = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=dtype), size_of(info["size"]),
                                                          chunks)
        return pickle.dumps(metadata.Metadata(tensors, storage_data=places))
    except Exception:
        return pickle.dumps(description)


def size_of(value: Any) -> Any:
    try:
        return torch.Size(value)
    except TypeError:
        return value


PUSHES = (b"(", b")", b"]", b"}", b"N", b"K\x01", b"G" + bytes(8), b"X\x01\0\0\0a", b"h\x00", b"\x94", b"0", b"2",
          b"\x8a\x08" + b"\x7f" * 8, b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f",
          b"\x8e" + b"\xff" * 7 + b"\x7f", b"r\xff\xff\xff\x7f", b"q\xff", b"p2000000000\n", b"I" + b"9" * 6000 + b"\n",
          b"\x95" + b"\xff" * 8)
CLASSES = (*(f"c{cls.__module__}\n{cls.__qualname__}\n".encode() for cls in VALUE_CLASSES.values()), b"cos\nsystem\n",
           b"cbuiltins\neval\n", b"ctorch\nfloat32\n", b"ctorch\nload\n", b"\x8c\x05torch\x8c\x04Size\x93")
APPLIES = (b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"R", b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"o", b"\x92")


def hostile_pickles() -> st.SearchStrategy[bytes]:
    """Programs for the unpickler: every class it knows, called with and set to anything, deep and with huge numbers."""
    operation = st.one_of(*map(st.sampled_from, (PUSHES, CLASSES, APPLIES)))
    programs = st.lists(operation, max_size=60).map(b"".join)
    deep = st.builds(bytes.__mul__, st.sampled_from((b"]", b"(", b"N\x85", b")\x85", b"]h\x00a\x94")),
                     st.sampled_from((5_000, 500_000)))
    return st.builds(lambda version, program: b"\x80" + bytes([version]) + program + b".", st.integers(0, 5),
                     st.one_of(programs, deep, st.builds(bytes.__add__, deep, programs)))


def test_damaged_torch_dist(template: Path, request: pytest.FixtureRequest) -> None:
    parts = megatron_parts(CONFIG).values()
    good = CheckpointReader(template.parent / "ours")
    expected = {part.ours: good.read(PREFIX + part.ours).reshape(part.shape) for part in parts}

    def read(folder: Path) -> None:
        """Every chunk has checksums; so what is read is what was written."""
        theirs = TorchDistReader(megatron._newest(folder))
        megatron._require_tensors(theirs, CONFIG, {part.ours: part for part in parts})
        for part in parts:
            assert torch.equal(megatron._read(theirs, part).reshape(part.shape), expected[part.ours]), part

    read(template)
    inner = template / FOLDER
    description = described(inner)
    assert pickle.loads(pickled(description)).storage_data.keys() <= pickle.loads(
        (inner / METADATA).read_bytes()).storage_data.keys()
    one = st.one_of(bent(description).map(pickled), bent(description, edits=1).map(pickled),
                    damaged((inner / METADATA).read_bytes()), hostile(), hostile_pickles())
    others = {f"{FOLDER}/{path.name}": st.one_of(damaged(path.read_bytes()), damaged(path.read_bytes()[-3000:]),
                                                 hostile())
              for path in sorted(inner.glob("*.distcp")) if "objects" not in path.name}
    files = st.one_of(
        st.fixed_dictionaries({f"{FOLDER}/{METADATA}": one}), st.fixed_dictionaries({f"{FOLDER}/{METADATA}": one}),
        st.fixed_dictionaries({}, optional=others),
        st.fixed_dictionaries({f"{FOLDER}/{FORMAT_FILE}": st.one_of(damaged((inner / FORMAT_FILE).read_bytes()),
                                                                    hostile())}),
        st.fixed_dictionaries({TRACKER: st.one_of(damaged(b"release"), damaged(b"10"), hostile())}))
    fuzz(Reader("torch_dist", read, template), files, request)
