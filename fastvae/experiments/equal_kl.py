"""Beyond the paper: three ways to keep the KL, compared by their bound at equal KL.

The auxiliary loss (weight α), free bits (nats per dimension without cost) and cyclical annealing
(cycles within the steps of the paper's annealing), on the hybrid with an LSTM, length 48.
"""

from fastvae.experiments.figures import bound_at_kl
from fastvae.experiments.grid import CHARACTERS, Claim, Configuration, Experiment
from fastvae.experiments.report import Fact, Row

BASE = {"length": 48}
AUXILIARY, FREE_BITS, CYCLES = "auxiliary loss, α", "free bits, nats", "cyclical annealing, cycles"


def _pairs(rows: list[Row]) -> list[Fact]:
    return [
        fact
        for row in rows
        for fact in (
            ("KL, nats", f"{row.series} {row.x:g}", f"{row['kl']:.1f}"),
            ("bits per character", f"{row.series} {row.x:g}", f"{row['bpc']:.3f}"),
        )
    ]


def _cyclical(cycles: int) -> Configuration:
    changes = {**BASE, "aux_weight": 0.0, "kl_cycles": cycles, "kl_rise": 0.5}
    return Configuration(CYCLES, cycles, "ptb-lstm", changes)


EXPERIMENT = Experiment(
    title="Beyond the paper: the cost of keeping the KL",
    claims=(Claim("(not in the paper)", _pairs),),
    grids={
        CHARACTERS: (
            *(
                Configuration(AUXILIARY, weight, "ptb-lstm", {**BASE, "aux_weight": weight})
                for weight in (0.0, 0.1, 0.2, 0.5)
            ),
            *(
                Configuration(
                    FREE_BITS, bits, "ptb-lstm", {**BASE, "aux_weight": 0.0, "free_bits": bits}
                )
                for bits in (0.1, 0.2, 0.4, 0.8)
            ),
            *map(_cyclical, (2, 4, 8)),
        )
    },
    axis="strength",
    draw=bound_at_kl,
)
