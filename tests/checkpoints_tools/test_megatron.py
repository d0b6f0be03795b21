"""Checkpoints as megatron-core's `torch_dist` and back, with megatron-core itself as the judge."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints_tools.megatron import convert_from_megatron, convert_to_megatron
from checkpoints_tools.names import PREFIX
from checkpoints_tools.torch_dist import METADATA, TorchDistReader
from engine import cli
from engine.checkpoint.read import CheckpointReader
from engine.errors import CheckpointError
from tests.kit.checkpoints import KINDS, MEGATRON_KINDS, model, write_random

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = {"phi3": "rope_share",
           **dict.fromkeys(("gpt2", "gemma", "starcoder2", "gpt-neox", "opt"), "norm")}
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each action of `megatron_cpu` found, by rank."""
    folder = tmp_path_factory.mktemp("megatron")
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.kit.megatron_cpu", str(folder)], cwd=ROOT,
                          env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, text=True, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return {action.name: [json.loads(result.read_text()) for result in sorted(action.glob("result-*.json"))]
            for action in folder.iterdir()}


@needs_megatron
def test_megatron_core_loads_what_we_write_and_gives_our_logits(megatron: dict[str, list[dict[str, Any]]]) -> None:
    """And of what it wrote in bf16 with fp32 masters, the masters are taken."""
    [found] = megatron["alone"]
    assert found["differences"].keys() == MEGATRON_KINDS.keys()
    assert max(found["differences"].values()) <= 1e-5, found
    assert len(found["masters"]) == 6 and all(found["masters"].values()), found


@needs_megatron
def test_theirs_to_ours_and_back_is_the_same_bits(megatron: dict[str, list[dict[str, Any]]]) -> None:
    """Saved by megatron-core on four ranks, and loaded by it on four."""
    results = megatron["there_and_back"]
    assert len(results) == 4 and all(len(equal) >= 14 for equal in results)
    assert not [(rank, name) for rank, equal in enumerate(results) for name, same in equal.items() if not same]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNKNOWN])
def test_ours_to_theirs_and_back_is_the_same_bits(kind: str, tmp_path: Path) -> None:
    config = model(**KINDS[kind])
    reader = write_random(tmp_path / "ours", config)
    checked = convert_to_megatron(reader, tmp_path / "theirs", file_bytes=50_000)
    assert checked is not None and checked.largest_difference == 0
    assert len(list((tmp_path / "theirs" / "iter_0000007").glob("*.distcp"))) > 2
    convert_from_megatron(tmp_path / "theirs", tmp_path / "back", config)
    back = CheckpointReader(tmp_path / "back")
    assert back.verify() == [] and back.metadata["config"]["model"] == config.model_dump(mode="json")
    assert all(torch.equal(back.read(key), reader.read(key)) for key in reader.keys())


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_layers": 3}, "of another shape"),
    ({"vocab_size": 300}, "embedding.word_embeddings.weight .256, 48. instead of .300, 48."),
    ({"qkv_bias": True}, "1 tensors missing: decoder.layers.self_attention.linear_qkv.bias"),
    ({"tie_embeddings": True}, "1 tensors unknown to Octant: output_layer.weight"),
])
def test_another_shape_than_stated_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    convert_to_megatron(write_random(tmp_path / "ours", model()), tmp_path / "theirs", check=False)
    with pytest.raises(CheckpointError, match=message):
        convert_from_megatron(tmp_path / "theirs", tmp_path / "back", model(**changes))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("kind", "key"), UNKNOWN.items())
def test_what_torch_dist_is_not_known_to_hold_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    config = model(**KINDS[kind])
    with pytest.raises(CheckpointError, match=f"is a model with {key}: .* `octant convert to-hf` writes it"):
        convert_to_megatron(write_random(tmp_path / "ours", config), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=f"is a model with {key}: "):
        convert_from_megatron(tmp_path / "theirs", tmp_path / "back", config)
    assert not (tmp_path / "theirs").exists() and not (tmp_path / "back").exists()


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    convert_to_megatron(write_random(tmp_path / "ours", model()), tmp_path / "theirs", check=False)
    folder = tmp_path / "theirs" / "iter_0000007"
    found = pickle.loads((folder / METADATA).read_bytes())
    found.planner_data = _Bomb(tmp_path / "ran")
    (folder / METADATA).write_bytes(pickle.dumps(found))
    assert len(TorchDistReader(folder).tensors) == 9
    assert not (tmp_path / "ran").exists()
    (folder / METADATA).write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchDistReader(folder)
    assert not (tmp_path / "ran").exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["truncated", "removed", "outside", "changed", "other format", "nothing"])
def test_damaged_folders_are_refused(damage: str, tmp_path: Path) -> None:
    convert_to_megatron(write_random(tmp_path / "ours", model()), tmp_path / "theirs", check=False)
    folder = tmp_path / "theirs" / "iter_0000007"
    file = folder / "__0_0.distcp"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "removed":
        file.unlink()
    elif damage == "outside":
        data = (folder / METADATA).read_bytes()
        found = pickle.loads(data)
        for place in found.storage_data.values():
            place.relative_path = "../" + place.relative_path
        (folder / METADATA).write_bytes(pickle.dumps(found))
    elif damage == "changed":
        (folder / METADATA).write_bytes((folder / METADATA).read_bytes()[:-50])
    elif damage == "other format":
        (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    else:
        (folder / "metadata.json").unlink()
    with pytest.raises(CheckpointError):
        convert_from_megatron(tmp_path / "theirs", tmp_path / "back", model())
    assert not (tmp_path / "back").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model()
    write_random(tmp_path / "ours", config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(
        {"model": config.model_dump(mode="json"), "steps": 1, "data": {"seq_len": 128}}))
    assert cli.run(["convert", "to-megatron", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "checked: all 15 tensors read back and compared" in out
    assert "--ckpt-format torch_dist" in out.splitlines()[-1]
    assert cli.run(["convert", "from-megatron", str(tmp_path / "theirs"), str(tmp_path / "back"), "--config",
                    str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: octant convert to-hf")
    before, after = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "back")
    assert all(torch.equal(before.read(key).bfloat16().float(), after.read(key)) for key in before.keys())
    assert cli.run(["convert", "from-megatron", str(tmp_path / "ours"), str(tmp_path / "x"), "--config",
                    str(tmp_path / "run.yaml")]) == 2
    assert "is not a torch_dist checkpoint of megatron-core" in capsys.readouterr().err
    assert {key.startswith(PREFIX) for key in after.keys()} == {True}
