"""Figure 5: cost and KL against the auxiliary loss's weight α, with and without annealing."""

from fastvae.experiments.figures import costs
from fastvae.experiments.grid import CHARACTERS, Claim, Configuration, Experiment
from fastvae.experiments.report import facts

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AT_ONCE = {"kl_floor": 1.0}  # the full KL weight from the first step
ANNEALED, CONSTANT = "annealed", "not annealed"
BITS = "bits per character"


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
            lambda rows: facts(rows, "KL, nats", "kl", series=ANNEALED, axis="annealed, α"),
        ),
        Claim(
            "annealing helps at small α",
            lambda rows: [
                *facts(rows, BITS, "bpc", ".3f", series=ANNEALED, axis="annealed, α"),
                *facts(rows, BITS, "bpc", ".3f", series=CONSTANT, axis="not annealed, α"),
                *facts(rows, "KL, nats", "kl", series=CONSTANT, axis="not annealed, α"),
            ],
        ),
    ),
    grids={CHARACTERS: tuple(p for weight in WEIGHTS for p in _configurations(weight))},
    axis="α",
    draw=costs,
)
