"""Parameters made of their specs: allocated, and filled with the values they begin with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.distributed.random import generator_for
from engine.model.spec import ParamSpec


def new_parameter(spec: ParamSpec, device: torch.device | str | None = None,
                  dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter of the spec's local shape that carries the spec."""
    parameter = nn.Parameter(torch.empty(spec.local_shape, device=device, dtype=dtype), requires_grad=spec.trainable)
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ParamSpec:
    """The spec a parameter of the model carries."""
    spec = getattr(parameter, "spec", None)
    if not isinstance(spec, ParamSpec):
        raise TypeError("this parameter carries no ParamSpec: it was not made by `new_parameter`")
    return spec


def initial_values(spec: ParamSpec, seed: int) -> Tensor:
    """The global tensor at initialisation, fp32; it depends on seed and name alone, not on layout or device.

    It is drawn on the CPU: a GPU has another generator, whose numbers depend on how many processors it has.
    """
    values = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    if spec.init == "normal":
        return values.normal_(0.0, spec.init_std, generator=generator_for(seed, "init", spec.name))
    return values.fill_(1.0 if spec.init == "ones" else 0.0)


def take_local(spec: ParamSpec, values: Tensor) -> Tensor:
    """Cuts what this rank holds out of the global tensor and pads it with zero rows to `local_shape`."""
    (box, _), *others = spec.held
    if not others and box.size == spec.local_shape:
        return values[box.slices]
    out = values.new_zeros(spec.local_shape)
    for box, place in spec.held:
        out[place.slices] = values[box.slices]
    return out


def put_together(spec: ParamSpec, slices: Tensor) -> Tensor:
    """The global tensor of all tensor ranks' local ones, [ranks, *local shape]."""
    assert spec.cut is not None
    out = slices.new_empty(spec.shape)
    for index, local in enumerate(slices):
        for box, place in replace(spec, cut=replace(spec.cut, index=index)).held:
            out[box.slices] = local[place.slices]
    return out


def initialise(model: nn.Module, seed: int) -> None:
    """Fills every parameter of the model, cut or not, with its share of the global initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            spec = spec_of(parameter)
            parameter.copy_(take_local(spec, initial_values(spec, seed)))
