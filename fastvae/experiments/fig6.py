"""Figure 6: cost and KL against the number of masked convolutions, by the auxiliary weight α.

N layers see N + 1 previous tokens.
"""

from fastvae.experiments.figures import costs
from fastvae.experiments.grid import CHARACTERS, Claim, Configuration, Experiment
from fastvae.experiments.report import facts

LAYERS, WEIGHTS = (1, 2, 3, 5, 7, 10), (0.0, 0.2, 0.5)


def _configuration(layers: int, weight: float) -> Configuration:
    changes = {"conv_layers": layers, "aux_weight": weight}
    return Configuration(f"α = {weight:g}", layers, "ptb-bytenet", changes)


def _kl(weight: float):
    return lambda rows: facts(rows, "KL, nats", "kl", series=f"α = {weight:g}", axis="layers:")


EXPERIMENT = Experiment(
    title="Figure 6: cost and KL against the number of masked convolutions",
    claims=(
        Claim("without the auxiliary loss the KL vanishes past a field of 3 tokens", _kl(0.0)),
        Claim("with α = 0.2 it never does", _kl(0.2)),
        Claim("with α = 0.5 it never does", _kl(0.5)),
    ),
    grids={CHARACTERS: tuple(_configuration(n, weight) for n in LAYERS for weight in WEIGHTS)},
    axis="masked convolutions",
    draw=costs,
)
