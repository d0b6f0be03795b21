"""The shapes of the learning rate behind the warm-up: a table with one entry each.

With w warm-up steps of n in all, step t (the first is 1) has lr · t / w up to w.  Behind it, x = (t − w) / (n − w),

    cosine            min_lr + (lr − min_lr) · (1 + cos πx)/2          Loshchilov and Hutter 2017
    linear            min_lr + (lr − min_lr) · (1 − x)
    constant          lr
    wsd               lr, and over the last d steps, y = (t − (n − d)) / d of them done,
                      min_lr + (lr − min_lr) · (1 − y), or (1 − √y)    warm-up, stable, decay: Hu et al. 2024 (MiniCPM),
                                                                       Hägele et al. 2024 (the square root)
    inverse_sqrt      max(min_lr, lr · √(w / t))                       Vaswani et al. 2017
    linear_to_zero    lr · (1 − x)                                     Bergsma et al. 2025: min_lr is 0

An entry is a class: its fields are keys of its own, given as `decay: {shape: wsd, decay_steps: 2000}`; `rate` is the
formula; `problems` says what cannot work; `floor` is what `optim.min_lr` is where nobody sets it.  Being a function of
the step alone, a shape has nothing to save, and a resumed run follows the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError

from engine.config.fields import Count, Section, nearest


class Rates(Protocol):
    """What a formula reads of the section `optim`."""

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def warmup_steps(self) -> float: ...


class Shape(Section):
    """One shape; subclasses say how much of the way from `min_lr` up to `lr` is left, or the rate itself."""

    def rate(self, step: float, num_steps: float, optim: Rates) -> float:
        """Learning rate of `step` > `warmup_steps`, counted from 1, in a run of `num_steps`."""
        return optim.min_lr + (optim.lr - optim.min_lr) * self.share(step, num_steps, optim)

    def share(self, step: float, num_steps: float, optim: Rates) -> float:
        """1 at the peak, 0 at `min_lr`."""
        raise NotImplementedError

    def floor(self, lr: float) -> float:
        """`optim.min_lr` unless it is given."""
        return float(f"{lr / 10:.6g}")

    def problems(self, num_steps: int, optim: Rates) -> Iterator[str]:
        """What cannot work with this shape, for people."""
        return iter(())

    def __str__(self) -> str:
        name, keys = written(self), self.model_dump(exclude_defaults=True)
        return ", ".join([name["shape"] if isinstance(name, dict) else name, *(f"{k} {v}" for k, v in keys.items())])


class Cosine(Shape):
    def share(self, step: float, num_steps: float, optim: Rates) -> float:
        return (1 + math.cos(math.pi * progress(step, num_steps, optim.warmup_steps))) / 2


class Linear(Shape):
    def share(self, step: float, num_steps: float, optim: Rates) -> float:
        return 1 - progress(step, num_steps, optim.warmup_steps)


class Constant(Shape):
    def share(self, step: float, num_steps: float, optim: Rates) -> float:
        return 1.0


class WarmupStableDecay(Shape):
    decay_steps: Count | None = None                         # the last so many; null: a tenth of `steps`
    form: Literal["linear", "sqrt"] = "linear"

    def share(self, step: float, num_steps: float, optim: Rates) -> float:
        length = self._length(num_steps)
        done = min(1.0, max(0, step - (num_steps - length)) / length)
        return 1 - (math.sqrt(done) if self.form == "sqrt" else done)

    def problems(self, num_steps: int, optim: Rates) -> Iterator[str]:
        length = self._length(num_steps)
        if optim.warmup_steps + length > num_steps:
            yield (f"optim.warmup_steps({optim.warmup_steps:g}) + the decay's {length} steps > steps({num_steps}): "
                   "lower optim.decay.decay_steps or the warm-up")

    def _length(self, num_steps: float) -> int:
        return self.decay_steps or max(1, int(num_steps) // 10)


class InverseSqrt(Shape):
    def rate(self, step: float, num_steps: float, optim: Rates) -> float:
        return max(optim.min_lr, optim.lr * math.sqrt(optim.warmup_steps / step))

    def floor(self, lr: float) -> float:
        return 0.0

    def problems(self, num_steps: int, optim: Rates) -> Iterator[str]:
        if optim.warmup_steps == 0:
            yield "optim.decay inverse_sqrt falls from the end of the warm-up: set optim.warmup_steps to 1 or more"


class LinearToZero(Linear):
    def floor(self, lr: float) -> float:
        return 0.0

    def problems(self, num_steps: int, optim: Rates) -> Iterator[str]:
        if optim.min_lr:
            yield f"optim.decay linear_to_zero ends at 0, optim.min_lr is {optim.min_lr}: leave it out, or use `linear`"


DECAYS: dict[str, type[Shape]] = {
    "cosine": Cosine,
    "linear": Linear,
    "constant": Constant,
    "wsd": WarmupStableDecay,
    "inverse_sqrt": InverseSqrt,
    "linear_to_zero": LinearToZero,
}


def progress(step: float, num_steps: float, warmup_steps: float) -> float:
    """How much of the way behind the warm-up is done, from 0 to 1."""
    return min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))


def read(value: object) -> Shape:
    """A name of the table, or `{shape: NAME}` with keys of that entry.

    Raises:
        ValueError: there is no such shape or key, or a key's value is impossible.
    """
    if isinstance(value, Shape):
        return value
    keys: dict[str, Any] = {str(key): given for key, given in value.items()} if isinstance(value, dict) else {}
    name = keys.pop("shape", None) if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError(f"must be a shape's name or {{shape: NAME, …}}; it is {value!r:.60}")
    if name not in DECAYS:
        raise ValueError(f"no such shape: {name!r:.60}; {nearest(name, list(DECAYS))}")
    kind = DECAYS[name]
    if unknown := [key for key in keys if key not in kind.model_fields]:
        known = nearest(unknown[0], list(kind.model_fields)) if kind.model_fields else "it has none"
        raise ValueError(f"{name} has no key `{unknown[0]:.60}`; {known}")
    try:
        return kind(**keys)
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ValueError(f"{name}, {first['loc'][0]}: {first['msg']} (it is {first['input']!r:.60})") from None


def written(shape: Shape) -> str | dict[str, Any]:
    """The shortest form that `read` takes."""
    name = next(name for name, kind in DECAYS.items() if kind is type(shape))
    keys = shape.model_dump(exclude_defaults=True)
    return {"shape": name, **keys} if keys else name


def _describe(schema: dict[str, Any]) -> None:
    named = {"type": "object", "required": ["shape"], "properties": {"shape": {"enum": [*DECAYS]}}}
    schema.update(anyOf=[{"enum": [*DECAYS]}, named])


Decay = Annotated[Shape, PlainValidator(read), PlainSerializer(written), Field(json_schema_extra=_describe)]
