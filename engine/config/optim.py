"""The section `optim`: the optimizer, its learning-rate schedule, and what is done to its gradients."""

from __future__ import annotations

from pydantic import Field, model_validator

from engine.config.decay import Cosine, Decay
from engine.config.fields import Fraction, NonNegative, Number, Positive, Rate, RateOrZero, Section, Share
from engine.config.length import Warmup
from engine.config.optimizers import OptimizerName


class SquareRootRule(Section):
    """Fine-tuning at the rate of pretraining, times the square root of how much smaller a batch is."""

    labels: Positive                                         # of a batch: tokens that are learned
    pretraining: Positive                                    # tokens of a batch in pretraining

    @property
    def factor(self) -> float:
        return (self.labels / self.pretraining) ** 0.5


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = "adamw"
    lr: Rate = 1.5e-4
    warmup_steps: NonNegative = 0
    warmup: Warmup | None = None                             # instead: 2000 (steps), 1% (of the run), 375M (tokens)
    decay: Decay = Cosine()                                  # a name of `engine.config.decay`, or {shape: NAME, …}
    min_lr: RateOrZero = Field(default_factory=lambda values: values["decay"].floor(values["lr"]))
    square_root: SquareRootRule | None = None                # makes lr and min_lr, then of pretraining, smaller
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)           # of AdamW, which muon uses for what is no matrix
    momentum: Fraction | None = None                         # of sgd (null: 0.9), muon (0.95) and adafactor (0)
    eps: Rate = 1e-8
    weight_decay: RateOrZero = 0.1
    grad_clip: Number = 1.0                                  # largest global gradient norm; 0: no clipping
    z_loss: RateOrZero = 0.0                                 # of pretraining: weight of log²Z beside the loss
    embedding_grad: Share = 1.0                              # of the embedding's gradient, so much is used

    @model_validator(mode="after")
    def _of_this_optimizer(self) -> OptimConfig:
        if self.momentum is not None and self.name == "adamw":
            raise ValueError(f"momentum({self.momentum:g}) is of sgd, muon and adafactor; adamw has betas")
        return self

    def momentum_or(self, default: float) -> float:
        """Of an optimizer whose own default is `default`."""
        return default if self.momentum is None else self.momentum
