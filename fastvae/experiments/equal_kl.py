"""Beyond the paper: three ways to keep the KL up, compared by what the bound costs at equal KL.

The auxiliary loss (weight α), free bits (nats a dimension that cost nothing) and cyclical annealing
(a number of cycles in the time of the paper's annealing), on the hybrid with an LSTM, length 48.
"""

from fastvae.experiments.figures import bound_at_kl
from fastvae.experiments.grid import Claim, Configuration, Experiment
from fastvae.experiments.report import Row
from fastvae.presets import CHARACTERS

BASE = {"length": 48}
AUXILIARY, FREE_BITS, CYCLES = "auxiliary loss, α", "free bits, nats", "cyclical annealing, cycles"


def _pairs(rows: list[Row]) -> str:
    found = (f"{r.series} {r.x:g}: {r['kl']:.1f} nats, {r['bpc']:.3f} bits" for r in rows)
    return "; ".join(found) or "not run"


def _cyclical(cycles: int) -> Configuration:
    changes = {**BASE, "aux_weight": 0.0, "kl_cycles": cycles, "kl_rise": 0.5}
    return Configuration(CYCLES, cycles, "ptb-lstm", changes)


EXPERIMENT = Experiment(
    title="Beyond the paper: the cost of a KL that stays",
    claims=(Claim("(not in the paper) KL and bits of each way", _pairs),),
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
