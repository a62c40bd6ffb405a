"""Figure 5: cost and KL against the auxiliary loss's weight α, with and without annealing."""

from fastvae.experiments.figures import costs
from fastvae.experiments.grid import Claim, Configuration, Experiment
from fastvae.experiments.report import trace
from fastvae.presets import CHARACTERS

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AT_ONCE = {"kl_floor": 1.0}  # the whole weight of the KL from the first step
ANNEALED, CONSTANT = "annealed", "not annealed"


def _configurations(weight: float) -> tuple[Configuration, ...]:
    changes = {"length": 52, "aux_weight": weight}
    return (
        Configuration(ANNEALED, weight, "ptb-lstm", changes),
        Configuration(CONSTANT, weight, "ptb-lstm", {**changes, **AT_ONCE}),
    )


EXPERIMENT = Experiment(
    title="Figure 5: cost and KL against the weight of the auxiliary loss",
    claims=(
        Claim(
            "the KL grows with α",
            lambda rows: "KL in nats, annealed, at α " + trace(rows, "kl", series=ANNEALED),
        ),
        Claim(
            "annealing helps at small α",
            lambda rows: (
                "bits, annealed, at α "
                + trace(rows, "bpc", ".3f", series=ANNEALED)
                + "; not annealed "
                + trace(rows, "bpc", ".3f", series=CONSTANT)
                + "; KL in nats, not annealed "
                + trace(rows, "kl", series=CONSTANT)
            ),
        ),
    ),
    grids={CHARACTERS: tuple(p for weight in WEIGHTS for p in _configurations(weight))},
    axis="α",
    draw=costs,
)
