"""Whatever a manifest says: the tensors that were written, or a refusal that names the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from checkpoints_tools.source import Source
from engine.checkpoint.manifest import MANIFEST_NAME
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import open_checkpoint
from engine.config import Config
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.generate.load import inference_config, load_model, load_tokenizer_of
from engine.optim.loss_scale import LossScale
from engine.reliability.spikes import SpikeMonitor
from engine.train.corpora import Corpora
from engine.train.loop import Trainer, kept
from engine.train.objectives import objective_of
from engine.train.role import Role, RoleState
from engine.train.start import take_over
from engine.train.state import TrainState
from engine.train.tally import Tally
from tests.kit.fuzz import WEIRD, Reader, bent, damaged, fuzz, hostile
from tests.kit.runs import run_config

SMALL = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 16, "vocab_size": 257,
         "max_seq_len": 64}
Body = dict[str, Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has saved step 2."""
    config = run_config(tmp_path_factory.mktemp("runs"), "run", steps=2, model=SMALL, eval={"every": 0},
                        data={"tokenizer": "bytes", "skip": [[1, 2]]})
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    trainer.run()
    trainer.close()
    return config


def sealed(body: Any) -> bytes:
    """A manifest with the hash that it should have, whatever it says."""
    text = json.dumps(body, separators=(",", ":"), default=str).encode("utf-8", "surrogatepass")[:-1]
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def taken_over(config: Config, corpora: Corpora, folder: Path) -> TrainState:
    """What a run begins with that resumes from there."""
    here = config.with_changes(run={"dir": str(folder / "run")}, checkpoint={"resume": str(folder)})
    state = TrainState((RoleState.on(single_mesh(), Role.of(here, objective_of(here)), here),))
    device = torch.device("cpu")
    tally, spikes = Tally(1, device), SpikeMonitor(here.reliability.spike, device)
    take_over(state, kept(tally, spikes, LossScale.of(here, device)), here, corpora, None)
    return state


def test_damaged_manifests(config: Config, request: pytest.FixtureRequest) -> None:
    [template] = (Path(config.run.dir) / "checkpoints").iterdir()
    corpora, good = Corpora.open(config), CheckpointReader(template)
    expected = {key: good.read(key) for key in good.keys()}
    manifest = (template / MANIFEST_NAME).read_bytes()
    body: Body = json.loads(manifest)
    del body["sha256"]
    assert sealed(body) == manifest

    def read(folder: Path) -> None:
        """As `octant checkpoint`, `train`, `generate` and `convert` do; the files have hashes, so tensors are right."""
        reader = open_checkpoint(folder)
        assert reader.step == reader.manifest.step >= 0
        state = taken_over(config, corpora, folder)
        assert state.step == reader.step and state.consumed_samples >= 0
        for piece in state.pieces():
            assert torch.equal(piece.tensor.view(piece.box.size), expected[piece.key][piece.box.slices]), piece.key
        used = inference_config(reader, Topology())
        model = load_model(reader, used, single_mesh())
        assert all(torch.equal(piece.tensor.view(piece.box.size), expected[piece.key]) for piece in model.weights())
        load_tokenizer_of(reader)
        source = Source.of(reader)
        assert source.config == used.model

    read(template)

    def part(*path: str) -> st.SearchStrategy[Body]:
        """Only what lies there is bent."""
        def put(value: Any) -> Body:
            changed: Body = json.loads(json.dumps(body))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            return changed

        there: Any = body
        for key in path:
            there = there[key]
        return st.one_of(bent(there), bent(there, edits=1), WEIRD).map(put)

    key = min(body["tensors"])
    places = (("step",), ("files",), ("tensors",), ("tensors", key), ("tensors", key, "blocks"), ("metadata",),
              *(("metadata", name) for name in body["metadata"]),
              *(("metadata", "config", name) for name in ("model", "data", "run", "precision")))
    one = st.one_of(bent(body).map(sealed), *(part(*place).map(sealed) for place in places), damaged(manifest),
                    hostile())
    fuzz(Reader("manifest.json", read, template), st.fixed_dictionaries({MANIFEST_NAME: one}), request)
