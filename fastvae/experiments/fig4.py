"""Figure 4: cost and KL against length, the hybrid beside the LSTM VAE with word dropout p.

The paper's figure has p = 0.2 and 0.5; p = 0.8, no history (p = 1) and the feed-forward VAE are
baselines besides.
"""

from fastvae.experiments.figures import costs
from fastvae.experiments.grid import BOTH, MATCHED, RELEASED, Claim, Configuration, Experiment
from fastvae.experiments.report import Row, trace
from fastvae.presets import CHARACTERS

LENGTHS = (12, 24, 36, 48, 60)
HYBRID, CONV = "hybrid, α = 0.2", "feed-forward"


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


def _lstms(rows: list[Row]) -> str:
    parts = (trace(rows, "kl", series=f"LSTM VAE, p = {p}") for p in ("0.2", "0.5"))
    return "KL in nats at length " + "; ".join(
        f"(p = {p}) {part}" for p, part in zip(("0.2", "0.5"), parts, strict=True)
    )


EXPERIMENT = Experiment(
    title="Figure 4: cost and KL against length",
    claims=(
        Claim(
            "the hybrid's KL keeps its share as the length grows",
            lambda rows: (
                "share of the bound at length " + trace(rows, "kl_share", ".2f", series=HYBRID)
            ),
        ),
        Claim("the LSTM VAE's KL falls to 0 past a length of 48", _lstms),
    ),
    grids={CHARACTERS: _configurations()},
    axis="length",
    draw=costs,
)
