"""Layers whose products multiply FP8 matrices: the same numbers in every layout, cast no oftener than need be."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config, resolve_layout
from engine.distributed.collectives import Work, start_all_gather
from engine.distributed.mesh import Axis, Mesh, single_mesh
from engine.distributed.topology import Topology
from engine.errors import ConfigError
from engine.kernels.blocks import Block
from engine.kernels.fp8 import E4M3, RECIPES, Scaled, amax_of, narrow, scales_of, widened
from engine.kernels.table import PORTABLE, Chosen, Operations
from engine.model.spec import ParamSpec, Rule
from engine.parallel.parallelize import parallelize
from engine.parallel.tensor import layers as layers_of_tensor
from engine.parallel.tensor.layers import ParallelLinear
from engine.precision.fp8 import Fp8Gemms, gemms_of
from engine.precision.gemms import PlainGemms
from tests.kit.compare import random, relative_error
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import Result, assemble, microbatches, run_layout, tiny_config, train_layout
from tests.kit.reference import global_batch
from tests.kit.runs import run_config, train, trained
from tests.train.test_resume import assert_same_bits

SMALL = {"hidden_size": 64, "ffn_hidden_size": 128}
LARGE = {"hidden_size": 256, "ffn_hidden_size": 256}               # two ranks get whole blocks of 128
OUT, IN, TOKENS = 256, 512, 512                                    # of a single layer


def fp8_config(fp8: str, model: dict[str, Any] | None = None, **parallel: Any) -> Config:
    return tiny_config(model=model or (LARGE if fp8 == "blockwise" else SMALL), precision={"fp8": fp8},
                       parallel=parallel, data={"seq_len": 32}, batch={"global": 4})


# ------------------------------------------------------------------ one layer

def cast(x: Tensor, block: Block, dtype: torch.dtype = E4M3) -> Tensor:
    """What is left of x, wide."""
    return widened(narrow(x, scales_of(amax_of(x, block), dtype), block, dtype)).double()


def layer(kind: str = "column") -> dict[str, Tensor]:
    """x, dy and W of a layer, whose features and tokens differ in size: a scale of a part is not that of the whole."""
    spread = (2.0 ** torch.linspace(-6, 6, TOKENS)).view(-1, 1)
    return {"x": random(TOKENS, IN, seed=1, dtype=torch.float32) * spread * 2.0 ** torch.linspace(-4, 4, IN),
            "dy": random(TOKENS, OUT, seed=2, dtype=torch.float32) * spread * 2.0 ** torch.linspace(-5, 5, OUT),
            "w": random(OUT, IN, seed=3, dtype=torch.float32) * 2.0 ** torch.linspace(-3, 3, OUT).view(-1, 1)}


def gemms(fp8: str, mesh: Any, kind: str = "column", sequence: bool = False) -> Fp8Gemms:
    spec = ParamSpec("layers.1.mlp.linear.weight", (OUT, IN), Rule(kind, 0 if kind == "column" else 1))
    return Fp8Gemms(RECIPES[fp8], spec, mesh, sequence=sequence, keep=True, operations=PORTABLE)


@pytest.mark.parametrize("fp8", RECIPES)
def test_the_three_products(fp8: str) -> None:
    """Beside products in fp64 of what each recipe leaves of its factors, along the sum of each."""
    recipe, tensors = RECIPES[fp8], layer()
    x, dy, w = tensors["x"], tensors["dy"], tensors["w"]
    bias = random(OUT, seed=4, dtype=torch.float32)
    layers = gemms(fp8, single_mesh())
    shaped = x.view(TOKENS // 2, 2, IN)
    operand, gradient = layers.operand(shaped), layers.operand(dy.view(TOKENS // 2, 2, OUT), gradient=True)
    y, dx = layers.forward(operand, w, bias), layers.input_gradient(gradient, w)
    grad = torch.ones(OUT, IN)
    layers.weight_gradient(grad, gradient, operand, accumulate=True)
    block, weight_block = recipe.block, recipe.weight_block
    wide = {"y": cast(x, block) @ cast(w, weight_block).T + bias,
            "dx": cast(dy, block, recipe.gradients) @ cast(w.T, weight_block).T,
            "dw": cast(dy.T, block, recipe.gradients) @ cast(x.T, block).T + 1}
    for name, got in (("y", y.flatten(0, 1)), ("dx", dx.flatten(0, 1)), ("dw", grad)):
        assert got.dtype == torch.float32 and relative_error(got, wide[name]) < 1e-6, name
    for name, want in (("y", x.double() @ w.T.double() + bias), ("dx", dy.double() @ w.double()),
                       ("dw", dy.T.double() @ x.double() + 1)):
        assert 1e-3 < relative_error(wide[name], want) < 0.1, name


Casts = dict[str, list[tuple[Tensor, Tensor]]]


def parts_on_a_rank(topology: Topology, sequence: bool) -> dict[str, Casts]:
    return {f"{fp8} {kind}": parts_of(fp8, kind, mesh_for(topology), sequence)
            for fp8 in RECIPES for kind in ("column", "row")}


def parts_of(fp8: str, kind: str, mesh: Mesh, sequence: bool) -> Casts:
    """Every cast of this rank's part of a layer: what it stands for, and its scales."""
    tensor, context, whole = mesh.tensor.size, mesh.context.size, layer()
    layers, column = gemms(fp8, mesh, kind, sequence), kind == "column"

    def part(name: str, features: bool) -> Tensor:
        x = whole[name].chunk(context)[mesh.context.index]
        if features:
            return x.chunk(tensor, 1)[mesh.tensor.index]
        travels = fp8 == "tensorwise" or (column and name == "x")         # and is cast before
        return x.chunk(tensor)[mesh.tensor.index] if sequence and travels else x

    x, dy = layers.operand(part("x", not column)), layers.operand(part("dy", column), gradient=True)
    scales = x.scales if isinstance(x, Scaled) else None
    again = layers.operand(part("x", not column), scales=scales)
    if sequence and column:
        assert isinstance(x, Scaled) and isinstance(again, Scaled)
    w = whole["w"].chunk(tensor, 0 if column else 1)[mesh.tensor.index]
    gradients = RECIPES[fp8].gradients
    casts = {"w": [*layers.cast_weight(w)],
             "x": [layers._factor(x, ("tokens", "in"), E4M3), layers._factor(again, ("in", "tokens"), E4M3)],
             "dy": [layers._factor(dy, ("tokens", "out"), gradients), layers._factor(dy, ("out", "tokens"), gradients)]}
    return {name: [(widened(each), each.scales) for each in both] for name, both in casts.items()}


@pytest.mark.parametrize(("tensor", "context", "sequence"), [(2, 1, False), (2, 1, True), (1, 2, False)])
def test_a_scale_belongs_to_the_whole_tensor(tensor: int, context: int, sequence: bool) -> None:
    """Bit for bit: what ranks cast of their parts is their part of what one process casts."""
    for rank in run_distributed(parts_on_a_rank, tensor * context, Topology(tensor=tensor, context=context), sequence):
        for case, parts in rank.items():
            want = parts_of(*case.split(), single_mesh(), False)
            for name, casts in parts.items():
                for (got, scales), (whole, its_scales) in zip(casts, want[name], strict=True):
                    assert found_in(got, whole) and found_in(scales, its_scales), (case, name)


def found_in(part: Tensor, whole: Tensor) -> bool:
    """Whether it is it, or one of the equal parts along some dimension."""
    candidates = [whole, *(piece for dim in (0, 1) for piece in whole.chunk(2, dim))]
    return any(torch.equal(part, each) for each in candidates)


# ------------------------------------------------------------------ layouts

LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2}, {"tensor": 2, "sequence": False}, {"pipeline": 2}, {"context": 2}, {"data": 2, "zero": 3},
    {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}, {"tensor": 2, "data": 2, "zero": 3},
    {"tensor": 2, "recompute": "full"}, {"recompute": "selective", "zero": 3}]
FINER = [("rowwise", {"tensor": 2}), ("rowwise", {"context": 2, "zero": 3}), ("blockwise", {"tensor": 2}),
         ("blockwise", {"data": 2, "zero": 3}), ("mxfp8", {"tensor": 2, "sequence": False})]


@cache
def one_process(fp8: str) -> Result:
    return train_layout(fp8_config(fp8), 2)


@pytest.mark.parametrize(("fp8", "layout"), [*(("tensorwise", layout) for layout in LAYOUTS), *FINER], ids=str)
def test_every_layout_is_one_process(fp8: str, layout: dict[str, Any]) -> None:
    """Sums in another order differ by 1e-7, which now and then carries a number over the edge between two of FP8: a
    sixteenth of one element.  What FP8 itself changes is 8 % to 11 % of a gradient."""
    want, results = one_process(fp8), run_layout(fp8_config(fp8, **layout), 2)
    gradients = assemble(result.gradients for result in results)
    for name, expected in assemble([want.gradients]).items():
        assert (gradients[name] - expected).norm() < 5e-3 * expected.norm(), name
    for result in results:
        assert result.losses == pytest.approx(want.losses, rel=1e-5)
        assert result.parameters_equal_masters


def test_fp8_is_not_the_wide_computation() -> None:
    wide = assemble([train_layout(fp8_config("off", SMALL), 1).gradients])
    for fp8 in ("tensorwise", "rowwise", "mxfp8"):
        got = assemble([one_process(fp8).gradients])
        far = {name: relative_error(got[name], wide[name]) for name in wide}
        assert 0.01 < far["layers.1.mlp.linear_fc1.weight"] < 0.2


# ------------------------------------------------------------------ what travels, what is cast, and when

def gathered_along_the_sequence(configs: list[Config]) -> list[Counter[torch.dtype]]:
    """On a rank: bytes of a step's gathers of tokens in layers, for each configuration."""
    found = []
    for config in configs:
        gathered: Counter[torch.dtype] = Counter()

        def counting(x: Tensor, axis: Axis, gathered: Counter[torch.dtype] = gathered) -> tuple[Tensor, Work]:
            out, work = start_all_gather(x, axis)
            gathered[out.dtype] += out.numel() * out.element_size()
            return out, work

        def waiting(x: Tensor, axis: Axis, count: Any = counting) -> Tensor:
            out, work = count(x, axis)
            work.wait()
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers_of_tensor, "start_all_gather", counting)
            patch.setattr(layers_of_tensor, "all_gather", waiting)
            mesh = mesh_for(Topology.of(config))
            model = parallelize(config, mesh)
            model.initialise(7)
            model.forward_backward(microbatches(config, global_batch(config, 1), mesh), 1e-2)
        found.append(gathered)
    return found


def test_what_is_gathered_along_the_sequence_has_a_byte() -> None:
    """Of each number two before: x forward and again for its weight's gradient, with scales; tensorwise also dy."""
    recipes = ("off", *RECIPES)
    configs = [fp8_config(fp8, LARGE, tensor=2).with_changes(precision={"compute": "bf16"}, batch={"micro": 4})
               for fp8 in recipes]
    for rank in run_distributed(gathered_along_the_sequence, 2, configs):
        wide, *others = rank
        assert set(wide) == {torch.bfloat16}
        for fp8, own in zip(recipes[1:], others, strict=True):
            assert own[torch.uint8] * 2 + own[torch.bfloat16] == wide[torch.bfloat16], fp8
            assert own[torch.float32] <= own[torch.uint8] // 8
        tensorwise, rowwise = others[0][torch.uint8], others[1][torch.uint8]
        assert rowwise * 3 == tensorwise * 2 and tensorwise > wide[torch.bfloat16] / 8
        assert others[3][torch.uint8] == rowwise == 2 * others[2][torch.uint8]         # 64 tokens are no block of 128



@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_are_cast_once_a_step(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    casts: Counter[int] = Counter()
    original = Fp8Gemms.cast_weight

    def counting(self: Fp8Gemms, weight: Tensor) -> tuple[Scaled, Scaled]:
        casts[id(self)] += 1
        return original(self, weight)

    monkeypatch.setattr(Fp8Gemms, "cast_weight", counting)
    config = fp8_config("rowwise", recompute=recompute)
    model = parallelize(config, single_mesh())
    model.initialise(7)
    for step in (1, 2):
        for _ in range(2):                                        # four microbatches each, and the weights stay
            model.forward_backward(microbatches(config, global_batch(config, 1), single_mesh()), 1e-2)
        assert len(casts) == 2 * 4 and set(casts.values()) == {step}
        model.publish()


def test_first_and_last_layer_and_the_output_stay_wide() -> None:
    for skip, narrow_layers in ((("first", "last"), {1, 2}), (("last",), {0, 1, 2}), ((), {0, 1, 2, 3})):
        config = fp8_config("tensorwise").with_changes(precision={"fp8_skip": list(skip)})
        [chunk] = parallelize(config, single_mesh()).chunks.values()
        found = {name: layer.gemms for name, layer in chunk.named_modules() if isinstance(layer, ParallelLinear)}
        assert len(found) == 4 * 4 + 1 and isinstance(found["output_layer"], PlainGemms)
        for name, layer_gemms in found.items():
            wanted = name.startswith("layers.") and int(name.split(".")[1]) in narrow_layers
            assert isinstance(layer_gemms, Fp8Gemms if wanted else PlainGemms), name


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "data": 2, "zero": 3}], ids=str)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, layout: dict[str, Any]) -> None:
    sections = {"parallel": layout, "precision": {"compute": "bf16", "fp8": "tensorwise"}, "model": SMALL}
    whole = run_config(tmp_path, "whole", **sections)
    want = train(whole)
    resumed = run_config(tmp_path, "resumed", **sections)
    train(resumed, crash_after=3)
    assert_same_bits(train(resumed), want)
    assert trained(resumed) == trained(whole)


# ------------------------------------------------------------------ refusals

@pytest.mark.parametrize(("fp8", "model", "parallel", "message"), [
    ("tensorwise", {"ffn_hidden_size": 72}, {}, r"model.ffn_hidden_size\(72\) is not a multiple of 16, which "),
    ("rowwise", {"ffn_hidden_size": 80}, {"tensor": 2}, r"\(80\) / tensor\(2\) = 40 is not a multiple of 16"),
    ("blockwise", {"ffn_hidden_size": 128}, {"tensor": 2}, r"= 64 is not a multiple of 128.*to tensorwise or rowwise"),
    ("tensorwise", {"num_layers": 2}, {}, r"fp8_skip\['first', 'last'\] leaves none of model.num_layers\(2\)"),
    ("te", {}, {}, "FP8 by Transformer Engine is not available in this version: set precision.fp8 to tensorwise")])
def test_what_cannot_be_is_refused(fp8: str, model: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fp8_config(fp8, SMALL | model, **parallel)


def test_a_run_that_makes_texts_is_refused() -> None:
    config = Config.model_validate({
        **fp8_config("tensorwise").to_dict(), "run": {"objective": "grpo"}, "grpo": {"group": 4, "minibatch": 8},
        "rollout": {"prompts": 2, "max_new_tokens": 4}, "batch": {"micro": 1, "global": 8},
        "roles": {"reward": {"function": "length"}}})
    with pytest.raises(ConfigError, match="FP8 in a run that makes its own texts is not available"):
        resolve_layout(config, 1)


def test_a_gpu_that_has_no_such_products_is_refused_unless_their_emulation_is_asked_for() -> None:
    row = Chosen("fp8_product", "emulated", (("scaled-mm", "for compute capability 10.0 and newer"),))
    mesh, operations = single_mesh("cuda"), Operations(chosen=(row,))
    config = fp8_config("mxfp8")
    with pytest.raises(ConfigError, match=r"mxfp8 is not for this GPU \(for compute capability 10.0 and newer\)"):
        gemms_of(config, mesh, False, operations)
    asked = config.with_changes(kernels={"fp8_product": "emulated"})
    assert callable(gemms_of(asked, mesh, False, operations))
