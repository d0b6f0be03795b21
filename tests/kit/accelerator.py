"""A make-believe accelerator: every operation on it has shapes, types and a device, and no values.

Run as a program, in a process of its own because it registers a device with torch for good:

    python -m tests.kit.accelerator '[{"parallel": {"pipeline": 2}, "last": true}, …]'       # changes to a small run

For each it does on the first or last rank of the layout (the collectives are torch's fake ones) what a run does: two
steps that are not logged, an evaluation and a save; or with `use: true` what is done with its model: `octant eval`'s
sums and a few tokens of two texts; or with `park: true` what a role does that is on the device in its turn only.  It
prints one JSON line: how often the host read something where it may, or what went wrong; `engine.plan.pretend` says
what is an error on it.  `read: true` has the loop read a value back, to see that it is noticed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from corpus_tools.conversations.start import open_corpora
from engine.checkpoint.staging import Staging
from engine.checkpoint.write import CheckpointWriter
from engine.config import Config
from engine.data.sources import open_corpus
from engine.distributed.mesh import Mesh
from engine.distributed.pieces import Piece
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.evaluate import sum_of_losses
from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from engine.metrics.phases import Moment
from engine.model.context import Batch
from engine.parallel import replicas
from engine.parallel.parallelize import parallelize
from engine.plan import pretend
from engine.plan.pretend import DEVICE, install, one_rank
from engine.train.loop import Trainer
from engine.train.role import Role, RoleState
from tests.kit.runs import run_config

FIRST, LAST = 5, 6                         # steps, none of which is logged
TEXTS = [[1, 2, 3, 4], [5, 6]]
NEW_TOKENS = 3


class Enough(Exception):
    """The steps have been done."""


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Inside, the host may read values back (there are none: it gets ones); what it read, by shape."""
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    reads: list[str] = []

    def ones(tensor: torch.Tensor) -> Any:
        assert tensor.device.type == DEVICE
        reads.append(str(list(tensor.shape)))
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    with patch.object(FakeTensor, "tolist", ones), patch.object(FakeTensor, "item", ones):
        yield reads


def _copied(writer: CheckpointWriter, step: int, pieces: list[Piece], metadata: dict[str, Any]) -> None:
    """`CheckpointWriter.save` as far as the device has to do with it: copies in host memory."""
    json.dumps(metadata)
    copies = Staging(1).copy([piece.tensor for piece in pieces])
    assert all(copy.device.type == "cpu" and piece.tensor.device.type == DEVICE
               for copy, piece in zip(copies, pieces, strict=True)) and copies


@contextmanager
def pretending() -> Iterator[None]:
    """What is made inside has no values, but for what is read from files; nothing is saved."""
    with pretend.pretending(), patch.object(CheckpointWriter, "save", _copied), \
            patch.object(replicas, "gather_json", lambda found, group: [found]):       # all ranks find the same
        yield


def train(config: Config, rank: int, read: bool) -> dict[str, list[str]]:
    """Some steps that are not logged, an evaluation, a save, which may wait; what the host read in the evaluation."""
    def stop(moment: Moment) -> None:
        if moment.step > LAST:
            raise Enough
        if read and moment.phase == "update":
            trainer.state.optimizer.num_steps()

    with one_rank(Topology.of(config), rank, DEVICE) as mesh, pretending():
        trainer = Trainer.start(config, mesh, open_corpora(config, say=lambda line: None), lambda: False)
        trainer.state.step = FIRST - 1
        trainer.phases.listeners.append(stop)
        try:
            trainer.run()
        except Enough:
            assert trainer.state.step == LAST
        trainer.phases.listeners.clear()
        try:
            with host_reads() as reads:
                trainer._evaluate()
            with host_reads():
                trainer._save()
        finally:
            trainer.close()
    return {"evaluation": reads}


def use(config: Config, rank: int) -> dict[str, list[str]]:
    """The sums of an evaluation and a few tokens of two texts, with a model that is not trained."""
    [source] = config.data.valid
    with one_rank(Topology.of(config), rank, DEVICE) as mesh, pretending():
        model = parallelize(config, mesh, training=False)
        data = open_corpus(source, config.data.seq_len, config.model.vocab_size, None, config.data.document_mask)
        found = {}
        with host_reads() as reads:
            sum_of_losses(model, data, config.batch.global_ + 1)                 # the second step is not full
        found["evaluation"] = reads
        with host_reads() as reads:
            Generator(model).own(TEXTS, Sampling(top_k=5, top_p=0.9), Limits(NEW_TOKENS), numbers=range(len(TEXTS)))
        found["generation"] = reads
    return found


def park(config: Config, rank: int) -> dict[str, list[str]]:
    """An update, a forward pass of a role that is in host memory while it has nothing to do: what of it is on the
    device before, in and after each, and in which memory a save finds it."""
    seen: dict[str, list[str]] = {}
    with one_rank(Topology.of(config), rank, DEVICE) as mesh, pretending():
        batches = [_batch(config, mesh) for _ in range(config.num_microbatches)]
        for trainable in (True, False):
            ranks = range(config.parallel.world_size)
            state = RoleState.on(mesh, Role("role", config.model, config.parallel, ranks, trainable, offload=True),
                                 config)
            found = seen.setdefault("learns" if trainable else "judges", [_whereabouts(state)])
            with state.at_work():
                found.append(_whereabouts(state))
                state.evaluate(batches)
            found.append(_whereabouts(state))
            if trainable:
                with state.at_work(learning=True):
                    found.append(_whereabouts(state))
                    state.update(0.1, state.totals(state.forward_backward(batches, 1.0)))
                    state.publish()
                found.append(_whereabouts(state))
    return seen


def _whereabouts(state: RoleState) -> str:
    """What has memory on the device, and where a save would read."""
    model, optimizer = state.model, state.optimizer
    assert model is not None
    masters = [bucket.master for bucket in model.buckets]
    moments = [] if optimizer is None else [each for of in optimizer.moments.values() for each in of.values()]
    parts = {"weights": [parameter for chunk in model.chunks.values() for parameter in chunk.parameters()],
             "shards": [bucket.param_shard for bucket in model.buckets if bucket.level >= 3], "masters": masters,
             "gradients": [each for bucket in model.buckets for each in (bucket.grad_buffer, bucket.grad_shard)],
             "moments": moments}
    there = [name for name, tensors in parts.items() if any(each.untyped_storage().size() for each in tensors)]
    saved = {state._now(tensor).device.type for tensor in (*masters, *moments)}
    return " ".join([*there, "|", *sorted(saved)])


def _batch(config: Config, mesh: Mesh) -> Batch:
    shape = (config.data.seq_len, config.batch.micro)
    tokens, mask = torch.zeros(shape, dtype=torch.int64, device=DEVICE), torch.ones(shape, device=DEVICE)
    positions = torch.arange(shape[0], device=DEVICE).unsqueeze(1).expand(shape)
    return Batch(tokens, positions, tokens, mask)


def _short(text: str) -> str:
    """Of a traceback the lines of this repository, and what it ends with."""
    lines = text.splitlines()
    own = [line.strip() for line in lines if line.lstrip().startswith("File") and "site-packages" not in line]
    last = next(line for line in reversed(lines) if line[:1].isalpha() and "registered at" not in line)
    return "\n".join([*own, last[:500]])


def main() -> None:
    """One line for each case."""
    try:
        install()
    except RequestError as error:
        print(error, file=sys.stderr)
        raise SystemExit(77) from None     # as test programs say that they cannot run here
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(json.loads(sys.argv[1])):
            last, read, used, parked = (case.pop(name, False) for name in ("last", "read", "use", "park"))
            config = run_config(Path(folder), f"run-{number}", steps=40, **{
                "log": {"every": 30}, "checkpoint": {"every": 0, "resume": "never"},
                "eval": {"every": 0, "batches": 1}, **case})
            rank = config.parallel.world_size - 1 if last else 0
            try:
                told: object = (park(config, rank) if parked else
                                use(config, rank) if used else train(config, rank, read))
            except Exception:
                told = _short(traceback.format_exc())
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
