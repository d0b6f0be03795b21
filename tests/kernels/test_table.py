"""Every implementation in the table beside its reference, and the rules by which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.schema import KernelsConfig
from engine.errors import ConfigError
from engine.kernels.operation import Implementation, Operation, Place, Unavailable, anywhere, installed, torch_operator
from engine.kernels.rms_norm import RMS_NORM, add_rms_norm
from engine.kernels.table import TABLE, Operations, choose, describe, describe_options
from tests.kernels.cases import CASES, Case
from tests.kit.compare import found

CPU = torch.device("cpu")
FP32 = Place(CPU, torch.float32)
ENTRIES = [(operation, entry) for operation in TABLE for entry in operation.implementations]


def distance(got: Tensor, want: Tensor) -> float:
    """Norm of the difference; infinities must be the same."""
    got, finite = got.double().cpu(), want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    return (got[finite] - want[finite]).norm().item()


def assert_as_good(operation: Operation, function: Any, case: Case, place: Place) -> None:
    """At most twice the reference's own error against fp64 of the same (rounded) inputs, forward and backward."""
    rounded = [x.to(place.dtype) for x in case.inputs]
    want = case.run(operation.reference.find(Place(CPU, torch.float64)), [x.double() for x in rounded])
    here = [x.to(place.device) for x in rounded]
    got, reference = case.run(function, here), case.run(operation.reference.find(place), here)
    assert len(got) == len(reference) == len(want)
    for i, (mine, its, exact) in enumerate(zip(got, reference, want, strict=True)):
        assert mine.shape == its.shape and mine.dtype == its.dtype, f"tensor {i}"
        # an output that is only rounded, at best, has half a unit of its dtype in the last place
        rounding = torch.finfo(mine.dtype).eps / 4 * exact[exact.isfinite()].norm().item()
        assert distance(mine, exact) <= 2 * max(distance(its, exact), rounding), f"tensor {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "entry"), ENTRIES, ids=lambda x: x.name)
def test_every_implementation_is_as_good_as_its_reference(operation: Operation, entry: Implementation,
                                                          dtype: torch.dtype, device: torch.device) -> None:
    function = found(operation, entry.name, device, dtype)
    for case in CASES[operation.name]():
        try:
            assert_as_good(operation, function, case, Place(device, dtype))
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from None


def test_the_comparison_notices_a_wrong_gradient_and_a_rounded_sum() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * (1 + 1e-4)

    case = CASES["rms_norm"]()[0]
    with pytest.raises(AssertionError, match="tensor 2"):
        assert_as_good(RMS_NORM, lambda x, r, w, eps: add_rms_norm(Wrong.apply(x), r, w, eps), case, FP32)
    with pytest.raises(AssertionError, match="tensor 0"):
        assert_as_good(RMS_NORM, lambda *args: tuple(x.bfloat16().float() for x in add_rms_norm(*args)), case, FP32)


# ------------------------------------------------------------------ choosing

def test_operations_config_and_cases_have_the_same_names() -> None:
    names = {operation.name for operation in TABLE}
    assert names == {field.name for field in fields(Operations)} - {"chosen"} == set(KernelsConfig.model_fields)
    assert names == CASES.keys()


def not_here(place: Place) -> Any:
    raise Unavailable("it is Tuesday")


def with_entries(*entries: Implementation) -> list[Operation]:
    """The table with more implementations of the norm, preferred to all others."""
    return [replace(row, implementations=(*entries, *row.implementations[-2:])) if row is RMS_NORM else row
            for row in TABLE]


def test_an_implementation_is_added_by_one_entry_and_removed_again() -> None:
    def mine(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    table = with_entries(Implementation("mine", anywhere(mine)))
    assert choose(FP32, table=table).rms_norm is mine
    assert choose(FP32, {"rms_norm": "octant"}, table).rms_norm is add_rms_norm
    assert_as_good(table[TABLE.index(RMS_NORM)], mine, CASES["rms_norm"]()[0], FP32)
    assert choose(FP32).rms_norm is add_rms_norm
    with pytest.raises(ConfigError, match="no implementation 'mine'"):
        choose(FP32, {"rms_norm": "mine"})


def test_what_is_passed_over_is_said_with_its_reason() -> None:
    operations = choose(FP32, table=with_entries(Implementation("absent", not_here)))
    row = next(row for row in operations.chosen if row.operation == "rms_norm")
    assert (row.implementation, row.passed_over) == ("octant", (("absent", "it is Tuesday"),))
    assert f"{'rms_norm':<20} octant; not absent (it is Tuesday)" in list(describe(operations))


def test_all_options_are_said() -> None:
    table = with_entries(Implementation("absent", not_here), Implementation("first", anywhere(add_rms_norm)))
    want = f"{'rms_norm':<20} first; or octant, reference; not absent (it is Tuesday)"
    assert want in list(describe_options(FP32, table))


@pytest.mark.parametrize(("wanted", "message"), [
    ({"rms_norm": "absent"}, r"absent cannot be used on cpu in fp32 \(it is Tuesday\): use auto, or another of absent"),
    ({"rms_norm": "fast"}, "there is no implementation 'fast'; there are auto, absent, octant, reference"),
    ({"norm": "auto"}, "kernels.norm: there is no such operation; there are attention, "),
])
def test_what_cannot_be_had_is_refused(wanted: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(FP32, wanted, with_entries(Implementation("absent", not_here)))


@pytest.mark.parametrize(("operation", "entry"), ENTRIES, ids=lambda x: x.name)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_a_probe_finds_or_gives_a_reason(operation: Operation, entry: Implementation, device: str) -> None:
    """On whatever device: `Unavailable`, never another error."""
    if device == "cuda" and not torch.cuda.is_available() and entry.name.endswith("mm-fp32"):
        pytest.skip("it multiplies on the GPU to find out")
    for dtype in (torch.float32, torch.bfloat16):
        try:
            entry.find(Place(torch.device(device), dtype))
        except Unavailable as reason:
            assert str(reason) and entry is not operation.reference


def test_references_run_a_whole_table() -> None:
    operations = choose(FP32, {row.name: row.reference.name for row in TABLE})
    assert all(row.implementation == operation.reference.name and not row.passed_over
               for row, operation in zip(operations.chosen, TABLE, strict=True))


def test_a_missing_operator_or_package_is_a_reason() -> None:
    with pytest.raises(Unavailable, match="has no aten::no_such_operator"):
        torch_operator("aten", "no_such_operator")
    with pytest.raises(Unavailable, match="not installed"):
        installed("octant_no_such_package.sub", "x")
    with pytest.raises(Unavailable, match="installed without no_such_symbol"):
        installed("torch", "no_such_symbol")


@pytest.mark.parametrize("missing", [["_scaled_dot_product_flash_attention_for_cpu"], ["_linear_pointwise"]], ids=str)
def test_a_torch_without_private_operators_falls_to_the_next_implementation(
        missing: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        def __init__(self, namespace: Any) -> None:
            self._namespace = namespace

        def __getattr__(self, name: str) -> Any:
            if name in missing:
                raise AttributeError(name)
            return getattr(self._namespace, name)

    monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten))
    monkeypatch.setattr(torch.ops, "mkldnn", Without(torch.ops.mkldnn))
    chosen = {row.operation: row for row in choose(FP32).chosen}
    if missing == ["_linear_pointwise"]:
        assert chosen["linear"].implementation == chosen["weight_gradient"].implementation == "torch"
    else:
        assert chosen["attention_block"].implementation == "reference"
        assert "has no aten::" in dict(chosen["attention_block"].passed_over)["flash-cpu"]
