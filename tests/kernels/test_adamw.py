"""AdamW's writes: a bf16 copy of the masters in the same pass, and bf16 weights without masters, rounded by chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.adamw import ADAMW, adamw_fused, adamw_reference
from engine.kernels.operation import Place
from engine.kernels.rounding import CHUNK, Counted, counted, noise, round_into, rounded, signed
from tests.kit.compare import random
from tests.kit.launches import Launches, triton_counted

SHAPE, CUT = (6, 50, 10), 20                     # of a tensor, and where a rank's part of its second dimension begins
# Two boxes with padding before, between and behind: rows of a tensor that is cut, and the whole of a small one.
RANGES = [counted(SHAPE, (2, CUT, 0), (3, 20, 10), 64, signed(0xDEADBEEF)), counted((7,), (0,), (7,), 704, 5)]
SIZE = 768


def triton() -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = next(entry for entry in ADAMW.implementations if entry.name == "triton")
    return found.find(Place(torch.device("cuda"), torch.float32))


def hashed(x: int) -> int:
    """The same by Python's numbers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_noise_is_a_hash_of_an_elements_place_in_the_whole_tensor() -> None:
    got, update = noise(RANGES[0], 0, RANGES[0].size, torch.tensor(3.0)), 3
    numbers = torch.arange(6 * 50 * 10).view(SHAPE)[2:5, CUT : CUT + 20].flatten()
    key = hashed((update * 0x9E3779B9 % 2**32) ^ 0xDEADBEEF)
    assert got.tolist() == [hashed(number ^ key) >> 16 for number in numbers.tolist()]
    assert noise(RANGES[0], 7, 9, torch.tensor(3.0)).tolist() == got[7:9].tolist()
    huge = counted((2**20, 2**13), (2**19, 0), (1, 2**13), 0, 5)                         # beyond 2³² elements
    assert huge.origin == 2**32 and noise(huge, 0, 9, torch.tensor(1.0)).max() < 2**16


def test_rounding_by_chance_keeps_the_mean() -> None:
    """Means of 2²⁰ numbers that lie k/16 of the way between two of bf16: five standard deviations."""
    count = 1 << 20
    for parts in (0, 1, 5, 8, 15):
        for base, last_bit in ((1.0, 2.0**-7), (-3.0, 2.0**-6), (2.0**-100, 2.0**-107)):
            x = torch.full((count,), base + base / abs(base) * last_bit * parts / 16)
            up = rounded(x, noise(Counted(0, count, signed(parts), count, 1, 0), 0, count, torch.tensor(9.0)))
            away = (up.float() != base).double().mean().item()
            spread = (parts / 16 * (1 - parts / 16) / count) ** 0.5
            assert abs(away - parts / 16) <= 5 * spread
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    assert torch.equal(rounded(special, torch.full((4,), 0xFFFF, dtype=torch.int32)).float(), special)
    assert rounded(special * float("nan"), torch.full((4,), 0xFFFF, dtype=torch.int32)).isnan().all()


def test_updates_and_parameters_have_noise_of_their_own() -> None:
    """Correlations of 2¹⁶ numbers: five standard deviations."""
    streams = [noise(Counted(0, 1 << 16, key, 1 << 16, 1, 0), 0, 1 << 16, torch.tensor(float(update))).double()
               for key, update in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1000))]
    correlations = torch.corrcoef(torch.stack([*streams, streams[0].roll(1)])) - torch.eye(6)
    assert correlations.abs().max() < 5 / 2**8


def test_small_updates_add_up() -> None:
    """A weight of 1 loses 2⁻¹³ each time, a 32nd of its last bit, which rounding to nearest would never see."""
    weights, steps = torch.ones(4096, dtype=torch.bfloat16), 256
    own = [Counted(0, 4096, 7, 4096, 1, 0)]
    for step in range(steps):
        round_into(weights, weights.float() - 2.0**-13, own, torch.tensor(float(step)))
    assert weights.float().mean().item() == pytest.approx(1 - steps * 2.0**-13, abs=5 * 2.0**-8 * 8**0.5 / 4096**0.5)


def updated(function: Any, weights: Tensor, copies: bool) -> list[Tensor]:
    """Three steps, the second of them skipped."""
    grad, moments = random(SIZE, seed=2, dtype=torch.float32), [torch.zeros(SIZE) for _ in range(2)]
    padding = torch.ones(SIZE)
    for each in RANGES:
        padding[each.start : each.start + each.size] = 0
    grad *= 1 - padding
    step, own = torch.zeros(()), weights.clone()
    copy = torch.zeros(SIZE, dtype=torch.bfloat16) if copies else None
    for skipped in (0.0, 1.0, 0.0):
        function([own], [grad * (float("nan") if skipped else 1.0)], [moments[0]], [moments[1]], [step], lr=1e-3,
                 betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_divisor=torch.tensor(2.0),
                 found_inf=torch.tensor(skipped), copies=[copy], ranges=() if copies else [RANGES])
    return [own, *moments, step, *([copy] if copy is not None else [])]


@pytest.mark.parametrize("name", ["reference", "torch-fused", "triton"])
def test_a_copy_is_the_master_rounded(name: str) -> None:
    function = {"reference": adamw_reference, "torch-fused": adamw_fused}.get(name) or triton()
    master, *_, copy = updated(function, random(SIZE, seed=1, dtype=torch.float32), True)
    if name == "triton" and not torch.cuda.is_available():          # the interpreter cuts off
        assert torch.equal(copy.view(torch.int16), (master.view(torch.int32) >> 16).to(torch.int16))
    else:
        assert torch.equal(copy, master.bfloat16())


def test_one_launch_reads_and_writes_everything() -> None:
    """Of each element, each tensor once: gradient, moments, master and its copy; or gradient, moments and weight."""
    for copies, each_byte in ((True, 3 * 4 + 4 + 2), (False, 3 * 4 + 2)):
        function, count = triton(), Launches()
        params = torch.empty(SIZE, dtype=torch.float32 if copies else torch.bfloat16, device="meta")
        grads, first, second = (torch.empty(SIZE, device="meta") for _ in range(3))
        copy, number = torch.empty(SIZE, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
        whole = [counted((SIZE,), (0,), (SIZE,), 0, 1)]
        with count, triton_counted(count):
            function([params], [grads], [first], [second], [number], lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
                     weight_decay=0.1, grad_divisor=number, found_inf=number, copies=[copy if copies else None],
                     ranges=() if copies else [whole])
        assert count.kernels == {"triton::adamw.kernel": 1, "aten::rsub": 1, "aten::add_": 1}
        assert count.moved["triton::adamw.kernel"] == SIZE * each_byte + 4            # and what the scalars are


@pytest.mark.parametrize("name", ["torch-fused", "triton"])
def test_weights_without_masters(name: str) -> None:
    """All implementations draw the same noise; their fp32 differs by 1e-7, which now and then tips the scale."""
    weights = torch.zeros(SIZE, dtype=torch.bfloat16)
    for each in RANGES:
        weights[each.start : each.start + each.size] = random(each.size, seed=each.size, dtype=torch.bfloat16)
    want = updated(adamw_reference, weights, False)
    got = updated(adamw_fused if name == "torch-fused" else triton(), weights, False)
    for own, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(own, other)
    assert (got[0] != want[0]).sum() <= 2
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=1e-6)
    changed = (want[0] != weights).double()
    assert changed.mean() > 0.1 and sum(int(changed[each.start : each.start + each.size].sum()) for each in RANGES) == \
        int(changed.sum())
    assert CHUNK > SIZE
