"""The files: safetensors and JSON that others can read, and nothing that can run code."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.checkpoint.manifest import StoredTensor
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import DTYPES, Entry
from engine.checkpoint.stream import write_checkpoint
from engine.checkpoint.write import save
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
TOUCHES_PICKLE = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


def test_the_safetensors_library_reads_every_type(tmp_path: Path) -> None:
    pieces = []
    for code, dtype in DTYPES.items():
        values = (torch.arange(15).reshape(3, 5) % (2 if dtype is torch.bool else 15)).to(dtype)
        pieces += [Piece(f"x.{code}", (3, 5), Box((0, c), (3, n)), values[:, c:c + n]) for c, n in ((0, 2), (2, 3))]
    pieces.append(Piece("scalar", (), Box.whole(()), torch.tensor(2.5)))
    path = save(tmp_path, 1, pieces, {}, keep=None)
    with safe_open(str(path / "rank-00000.safetensors"), "pt") as file:
        assert len(file.keys()) == len(pieces)
        assert file.get_tensor("scalar[]") == 2.5
        for piece in pieces[:-1]:
            start, width = piece.box.offset[1], piece.box.size[1]
            there = file.get_tensor(f"{piece.key}[0:3,{start}:{start + width}]")
            assert there.dtype == piece.tensor.dtype
            assert torch.equal(there.double(), piece.tensor.double())


def test_the_manifest_is_json_with_everything_in_it(tmp_path: Path) -> None:
    metadata = {"layout": {"tensor": 2}, "config": {"model": {"num_layers": 1}}, "data": {"tokenizer": "abc"}}
    piece = Piece("model.w", (2, 3), Box.whole((2, 3)), torch.ones(2, 3))
    path = save(tmp_path, 500, [piece], metadata, keep=None)
    assert path == tmp_path / "step-00000500"
    body = json.loads((path / "manifest.json").read_text())
    assert (body["format"], body["version"], body["step"], body["metadata"]) == ("octant-checkpoint", 2, 500, metadata)
    [file] = body["files"]
    assert file["name"] == "rank-00000.safetensors"
    assert file["bytes"] == (path / file["name"]).stat().st_size
    assert body["tensors"] == {"model.w": {"dtype": "F32", "shape": [2, 3], "blocks": [[[0, 0], [2, 3], 0]]}}
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    reader = CheckpointReader(path)
    assert (reader.step, reader.metadata, reader.keys()) == (500, metadata, ["model.w"])
    assert reader.manifest.tensors["model.w"] == StoredTensor("F32", (2, 3), 1)


def test_numbers_that_json_does_not_know_survive(tmp_path: Path) -> None:
    """A loss average that became NaN must not cost the checkpoint."""
    path = save(tmp_path, 1, [], {"average": float("nan"), "best": float("inf"), "lr": 0.1 + 0.2}, keep=None)
    metadata = CheckpointReader(path).metadata
    assert metadata["average"] != metadata["average"] and metadata["best"] == float("inf")
    assert metadata["lr"] == 0.1 + 0.2


def test_no_pickle_in_the_source() -> None:
    for path in (ROOT / "engine" / "checkpoint").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] in TOUCHES_PICKLE for name in names), f"{path.name}: {names}"
            if isinstance(node, ast.Attribute):
                call = ast.unparse(node)
                assert call not in ("torch.load", "torch.save", "np.load", "np.save"), f"{path.name}: {call}"
                assert not (call.startswith("dist.") and "object" in call), f"{path.name}: {call} pickles"


PROGRAM = """
import pickle, sys
from pathlib import Path
import torch, torch.distributed as dist
from engine.distributed.pieces import Piece
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import find_latest
from engine.checkpoint.write import CheckpointWriter
from engine.distributed.boxes import Box

folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
group = dist.group.WORLD

def refuse(event, arguments):
    if event.startswith(("pickle.", "marshal.loads", "shelve.")) or event == "exec" and armed:
        raise RuntimeError(f"{event} {arguments}")

def refuse_call(*args, **kwargs):
    raise RuntimeError("pickle was called")

armed = False
for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
    setattr(pickle, name, refuse_call)
dist.distributed_c10d._pickler = dist.distributed_c10d._unpickler = refuse_call
piece = Piece("w", (4, 4), Box.whole((4, 4)), torch.arange(16.0).view(4, 4))
writer = CheckpointWriter(folder / "c", 2, True, group)
sys.addaudithook(refuse)
armed = True
for step in (1, 2, 3):
    writer.save(step, [piece], {"step": step})
    [report] = writer.wait()
    assert report.error is None, report.error
reader, skipped = find_latest(folder / "c", group)
target = Piece("w", (4, 4), Box.whole((4, 4)), torch.zeros(4, 4))
reader.load_into([target])
assert torch.equal(target.tensor, piece.tensor) and reader.verify() == [] and reader.step == 3
print("done")
sys.stdout.flush()
import os
os._exit(0)
"""


def test_no_pickle_at_run_time(tmp_path: Path) -> None:
    """Saving, resuming and loading over a real process group, where unpickling or running new code is an error."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_a_pickle_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [Piece("w", (4,), Box.whole((4,)), torch.zeros(4))], {}, keep=None)
    torch.save({"w": torch.zeros(4)}, path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        CheckpointReader(path).read("w")


def test_what_is_asked_for_must_fit(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [Piece("model.weight", (4, 2), Box.whole((4, 2)), torch.ones(4, 2))], {}, keep=None)
    reader = CheckpointReader(path)

    def into(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Piece:
        return Piece(key, shape, Box.whole(shape), torch.zeros(shape, dtype=dtype))

    with pytest.raises(CheckpointError, match=r"no tensor model\.weigth; the nearest is model\.weight"):
        reader.load_into([into("model.weigth", (4, 2))])
    assert reader.load_into([into("model.weigth", (4, 2))], strict=False) == ["model.weigth"]
    with pytest.raises(CheckpointError, match=r"\[4, 2\] in .*, \[4, 3\] here"):
        reader.load_into([into("model.weight", (4, 3))])
    with pytest.raises(CheckpointError, match="not asked for"):
        reader.load_into([into("model.weight", (4, 2), torch.bfloat16)])
    with pytest.raises(CheckpointError, match="not asked for"):
        reader.load_into([into("model.weight", (4, 2), torch.int32)], convert=True)
    rounded = into("model.weight", (4, 2), torch.bfloat16)
    reader.load_into([rounded], convert=True)
    assert torch.equal(rounded.tensor, torch.ones(4, 2, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="leaves it"):
        reader.read("model.weight", Box((0, 0), (5, 2)))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        CheckpointReader(tmp_path / "step-00000002")


def test_loading_into_a_parameter(tmp_path: Path) -> None:
    """Tensors that require gradients are filled in place, outside autograd."""
    path = save(tmp_path, 1, [Piece("w", (4, 4), Box.whole((4, 4)), torch.arange(16.0).view(4, 4))], {}, keep=None)
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    memory = parameter.data_ptr()
    CheckpointReader(path).load_into([Piece("w", (4, 4), Box((0, 1), (4, 2)), parameter)])
    assert parameter.data_ptr() == memory and parameter.grad_fn is None
    assert torch.equal(parameter.detach(), torch.arange(16.0).view(4, 4)[:, 1:3])


def test_pieces_must_be_what_they_say() -> None:
    with pytest.raises(ValueError, match="cannot be the box"):
        Piece("w", (4,), Box((0,), (2,)), torch.zeros(3))
    with pytest.raises(ValueError, match="leaves the tensor"):
        Piece("w", (4,), Box((3,), (2,)), torch.zeros(2))


def test_types_that_have_no_file_format(tmp_path: Path) -> None:
    piece = Piece("w", (2,), Box.whole((2,)), torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match="complex64 cannot be saved"):
        save(tmp_path, 1, [piece], {}, keep=None)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, [], {"object": object()}, keep=None)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_streaming_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """No tensor is fetched before the one before it was taken; failures leave nothing behind."""
    entries = [Entry(f"w{i}", (1 << 20,), Box.whole((1 << 20,)), torch.float32) for i in range(8)]
    order: list[str] = []

    def fetch(entry: Entry) -> torch.Tensor:
        order.append(entry.key)
        return torch.full((1 << 20,), float(entry.key[1:]))

    path = write_checkpoint(tmp_path / "out", 3, {}, [entries[:5], entries[5:]], fetch)
    assert order == [entry.key for entry in entries]
    assert CheckpointReader(path).verify() == [] and CheckpointReader(path).read("w6")[7] == 6.0
    with pytest.raises(CheckpointError, match="is there already"):
        write_checkpoint(path, 3, {}, [entries], fetch)

    def broken(entry: Entry) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left.*it needs 33,"):
        write_checkpoint(tmp_path / "other", 3, {}, [entries], broken)
    with pytest.raises(CheckpointError, match=r"hold 1,048,576 of its 2,097,152"):
        half = Entry("w", (2, 1 << 20), Box((0, 0), (1, 1 << 20)), torch.float32)
        write_checkpoint(tmp_path / "other", 3, {}, [[half]], fetch)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_documented_hash(tmp_path: Path) -> None:
    """`docs/checkpoints.md` gives the hash in three lines; they give what the manifest holds."""
    document = (ROOT / "docs" / "checkpoints.md").read_text()
    code = document.partition("```python\ndef file_hash")[2].partition("```")[0]
    names: dict[str, object] = {"hashlib": hashlib}
    exec("def file_hash" + code, names)
    piece = Piece("w", (5 << 20,), Box.whole((5 << 20,)), torch.arange(5 << 20, dtype=torch.float32))    # three chunks
    path = save(tmp_path, 1, [piece], {}, keep=None)
    file_hash = names["file_hash"]
    assert callable(file_hash)
    assert file_hash((path / "rank-00000.safetensors").read_bytes()) == CheckpointReader(path).manifest.files[0].sha256
