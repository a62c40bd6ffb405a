"""Figure 4: cost and KL against length, of the hybrid and of the LSTM VAE with word dropout p.

The paper's figure has p = 0.2 and 0.5. Additional baselines: p = 0.8, no history (p = 1) and the
feed-forward VAE.
"""

from fastvae.experiments.figures import costs
from fastvae.experiments.grid import (
    BOTH,
    CHARACTERS,
    MATCHED,
    RELEASED,
    Claim,
    Configuration,
    Experiment,
)
from fastvae.experiments.report import Fact, Row, facts

LENGTHS = (12, 24, 36, 48, 60)
HYBRID, CONV = "hybrid, α = 0.2", "feed-forward"
AXIS = "length"


def _lstm(length: int, dropout: float, mode: str) -> Configuration:
    name = f"LSTM VAE, p = {dropout:g}"
    changes = {"length": length, "word_dropout": dropout}
    match = "ptb-lstm" if mode == MATCHED else None
    return Configuration(name, length, "ptb-lstm-vae", changes, mode, match)


def _conv(length: int, mode: str) -> Configuration:
    match = "ptb-lstm" if mode == MATCHED else None
    return Configuration(CONV, length, "ptb-conv", {"length": length}, mode, match)


def _configurations() -> tuple[Configuration, ...]:
    """The paper's first, then the same matched, then the other baselines."""
    both = RELEASED, MATCHED
    return (
        *(
            Configuration(HYBRID, n, "ptb-lstm", {"length": n, "aux_weight": 0.2}, BOTH)
            for n in LENGTHS
        ),
        *(_lstm(n, p, mode) for mode in both for p in (0.2, 0.5) for n in LENGTHS),
        *(_lstm(n, p, mode) for mode in both for p in (0.8, 1.0) for n in LENGTHS),
        *(_conv(n, mode) for mode in both for n in LENGTHS),
    )


def _lstms(rows: list[Row]) -> list[Fact]:
    return [
        fact
        for p in ("0.2", "0.5")
        for fact in facts(
            rows, "KL, nats", "kl", series=f"LSTM VAE, p = {p}", axis=f"p = {p}, length"
        )
    ]


EXPERIMENT = Experiment(
    title="Figure 4: cost and KL against length",
    claims=(
        Claim(
            "the hybrid's KL keeps its share as the length grows",
            lambda rows: facts(rows, "KL / bound", "kl_share", ".2f", series=HYBRID, axis=AXIS),
        ),
        Claim("the LSTM VAE's KL falls to 0 past a length of 48", _lstms),
    ),
    grids={CHARACTERS: _configurations()},
    axis=AXIS,
    draw=costs,
)
