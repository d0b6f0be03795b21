"""Which model, and how many tokens, for so much compute: the law of Hoffmann et al. 2022 ("Chinchilla").

    L(N, D) = E + A / N^α + B / D^β            loss in nats per token, of N parameters after D tokens
    C = 6·N·D                                  the floating-point operations that takes

With C given, L is smallest at

    N = G·(C/6)^(β/(α+β))      D = C/(6·N)      G = (α·A / (β·B))^(1/(α+β))

`HOFFMANN` has the constants of their third approach (appendix D.3).  They are those of their data, tokenizer and model:
E and the coefficients differ between corpora, the exponents little.  `fit` finds one's own from runs, by least squares
of relative errors; for exponents that are given the other three are linear, so only two are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from engine.errors import RequestError

FEWEST = 6                                 # runs for five constants
EXPONENTS = (0.05, 1.0)                    # between which they are searched
GRID, ROUNDS = 17, 12                      # values of an exponent in a round, each of which halves the distance


@dataclass(frozen=True)
class Law:
    """The five constants, by the letters of the paper."""

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D)."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def best(self, compute: float) -> tuple[float, float]:
        """N and D of the smallest loss for so many operations."""
        both = self.alpha + self.beta
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both)
        parameters = ratio * (compute / 6) ** (self.beta / both)
        return parameters, compute / 6 / parameters


HOFFMANN = Law(irreducible=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)


@dataclass(frozen=True)
class Trained:
    """A run: parameters, tokens seen, loss then."""

    name: str
    parameters: float
    tokens: float
    loss: float


def fit(runs: Sequence[Trained]) -> Law:
    """The law nearest to these runs.

    Raises:
        RequestError: they do not determine it.
    """
    sizes, lengths = ({getattr(run, name) for run in runs} for name in ("parameters", "tokens"))
    if len(runs) < FEWEST or len(sizes) < 3 or len(lengths) < 3:
        raise RequestError(f"five constants need {FEWEST} runs or more, of 3 or more sizes and 3 or more lengths; "
                           f"these are {len(runs)} runs of {len(sizes)} and {len(lengths)}")
    centre, reach = (sum(EXPONENTS) / 2,) * 2, (EXPONENTS[1] - EXPONENTS[0]) / 2
    best: tuple[float, Law] | None = None
    for _ in range(ROUNDS):
        steps = np.linspace(-reach, reach, GRID)
        tried = [_linear(runs, alpha, beta) for alpha, beta in product(*(_inside(at + steps) for at in centre))]
        best = min([one for one in tried if one is not None] + ([best] if best else []), key=lambda one: one[0],
                   default=None)
        if best is None:
            raise RequestError("no law of this form comes near these runs: the loss has to fall with parameters and "
                               "with tokens")
        centre, reach = (best[1].alpha, best[1].beta), reach / 2
    assert best is not None
    return best[1]


def _inside(values: np.ndarray) -> Iterable[float]:
    return [float(value) for value in values if EXPONENTS[0] <= value <= EXPONENTS[1]]


def _linear(runs: Sequence[Trained], alpha: float, beta: float) -> tuple[float, Law] | None:
    """E, A and B for these exponents, with the sum of squared relative errors; None: one would be negative."""
    n, d, loss = (np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss"))
    columns = np.stack((np.ones_like(loss), (n / n.min()) ** -alpha, (d / d.min()) ** -beta), axis=1) / loss[:, None]
    found, *_ = np.linalg.lstsq(columns, np.ones_like(loss), rcond=None)
    if (found < 0).any():
        return None
    e, a, b = map(float, found)
    law = Law(e, a * float(n.min()) ** alpha, b * float(d.min()) ** beta, alpha, beta)
    return float(np.square(columns @ found - 1).sum()), law
