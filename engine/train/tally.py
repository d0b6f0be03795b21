"""What steps leave behind on the device, and how the host reads it without making the device wait.

Reading a value that the device has just been told to compute makes the host wait for the whole step, and leaves the
device idle while the host prepares the next.  So sums stay on the device until a line is logged; and what the host must
know after every step it learns one step late: copied into pinned memory behind the step's work, it is there by the time
the next step has been enqueued.  All ranks read the same all-reduced numbers, so they decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.optim.gradients import StepSums

UNLOGGED = "unlogged"                      # where a checkpoint's metadata keep `Tally.state`
NUM_NUMBERS = 9                            # of a verdict, on the device
STOP, SAVE = 1.0, 0.5                      # what a rank adds to the flag of a step's sums to ask for it


@dataclass(frozen=True)
class Line:
    """What is read when a line is logged.

    Attributes:
        totals: the objective's sums since the line before, over steps in which they were finite.
        divisor: what those steps' losses were divided by, added up; 0 if no such step counted anything.
        grad_norm: of the latest step.
        places: inputs that were computed in this process's steps since the line before, padding too.
    """

    totals: Sequence[float]
    divisor: float
    grad_norm: float
    places: float


@dataclass(frozen=True)
class Verdict:
    """What all ranks know after a step.

    Attributes:
        step: the one it is about.
        stop: somebody asked to stop.
        skips_in_a_row: steps that changed nothing, up to and with this one.
        counts: anything counted in this one.
        skips, spikes, saves: since the process began: steps that changed nothing, steps that stood out, and requests to
            save.  What is heard of some steps only is counted, so that nothing is missed.
        spike_z: how far the latest spike stood out.
        spike_age: steps since then.
        too_large: since the process began, steps that changed nothing because their gradient was too large.
    """

    step: int = 0
    stop: bool = False
    skips_in_a_row: int = 0
    counts: bool = True
    skips: int = 0
    spikes: int = 0
    saves: int = 0
    spike_z: float = 0.0
    spike_age: int = 0
    too_large: int = 0

    @staticmethod
    def of(step: int, numbers: Sequence[float]) -> Verdict:
        """From the numbers as they lie on the device."""
        stop, in_a_row, divisor, skips, spikes, saves, spike_z, spike_age, too_large = numbers
        return Verdict(step, stop > 0, int(in_a_row), divisor > 0, int(skips), int(spikes), int(saves), spike_z,
                       int(spike_age), int(too_large))


class Tally:
    """What has been added up since the last line, and how many steps in a row were skipped."""

    def __init__(self, num_sums: int, device: torch.device, step: int = 0) -> None:
        """`step`: steps done before the first that is added."""
        self._sums = torch.zeros(num_sums + 1, dtype=torch.float64, device=device)          # the divisor is the last
        self._verdict = torch.zeros(NUM_NUMBERS, device=device)              # see `Verdict.of`
        self._grad_norm = torch.zeros((), device=device)
        self._places = torch.zeros((), dtype=torch.float64, device=device)
        self._late = LateRead(NUM_NUMBERS, device)
        self.step = step

    def add(self, sums: StepSums, divisor: Tensor | int, skipped: Tensor, spike_z: Tensor, is_spike: Tensor,
            too_large: Tensor, places: Tensor | int = 0) -> None:
        """Takes a step's totals in; `skipped` is 1 where it changed nothing, else 0, and so are the two questions.

        Of the flag whole numbers ask to stop, and a half to save.
        """
        counted = divisor if isinstance(divisor, Tensor) else torch.full_like(self._sums[0], divisor)
        finite = torch.isfinite(sums.sums).all()
        self._sums += torch.where(finite, torch.cat((sums.sums.double(), counted.double().view(1))), 0.0)
        _, in_a_row, _, skips, spikes, saves, latest_z, age, large = self._verdict
        asked_to_save = sums.flag.frac() * 2
        self._verdict = torch.stack((sums.flag.floor(), (in_a_row + 1) * skipped, counted.float(), skips + skipped,
                                     spikes + is_spike, saves + asked_to_save,
                                     torch.where(is_spike.bool(), spike_z, latest_z), (age + 1) * (1 - is_spike),
                                     large + too_large))
        self._grad_norm = sums.grad_norm
        self._places += places
        self.step += 1

    def late(self) -> Verdict:
        """On the step before this one; nobody waits."""
        return Verdict.of(self.step - 1, self._late.exchange(self._verdict))

    def read(self) -> tuple[Line, Verdict]:
        """Everything up to this step; sums begin anew.  Waits for the device."""
        last = torch.stack((self._grad_norm.double(), self._places))
        values = torch.cat((self._sums, self._verdict.double(), last)).tolist()
        *totals, divisor = values[: len(self._sums)]
        self._sums.zero_()
        self._places.zero_()
        self._late.exchange(self._verdict)               # what has been read now need not be read late
        return Line(totals, divisor, *values[-2:]), Verdict.of(self.step, values[len(self._sums) : -2])

    def state(self) -> list[float]:
        """What a checkpoint must hold for the next line to be the same.  Waits for the device."""
        return torch.cat((self._sums, self._verdict[1:2].double())).tolist()

    def restore(self, state: Sequence[float]) -> None:
        """Takes over what `state` returned.

        Raises:
            ValueError: it has other sums.
        """
        if len(state) != len(self._sums) + 1:
            raise ValueError(f"{UNLOGGED} holds {len(state)} numbers, this run keeps {len(self._sums) + 1}")
        values = torch.tensor(state, dtype=torch.float64)
        self._sums.copy_(values[:-1])
        self._verdict[1:2].copy_(values[-1:])


class LateRead:
    """Hands a step's numbers to the host and gives back those of the step before; zeros at first."""

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(count, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def exchange(self, numbers: Tensor) -> list[float]:
        """`numbers` is an fp32 vector on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()                  # returns at once before the first record
        before: list[float] = self._host.tolist()
        self._host.copy_(numbers, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return before
