"""Table 3: reconstruction and KL on tweets, of the LSTM VAE with word dropout p and the hybrid.

Additional baselines: the LSTM VAE without history (p = 1) and the feed-forward VAE.
"""

from collections.abc import Callable

from fastvae.experiments.grid import (
    BOTH,
    MATCHED,
    RELEASED,
    TWEETS,
    Claim,
    Configuration,
    Experiment,
)
from fastvae.experiments.report import Fact, Row, compare

DROPOUT = (0.2, 0.5, 0.8, 1.0)
PAPER = {0.2: (67.4, 1.0), 0.5: (77.1, 2.1), 0.8: (93.7, 3.8)}
HYBRID = Configuration("hybrid, α = 0.2", 0, "tweets", {"aux_weight": 0.2}, BOTH)


def lstm(dropout: float, mode: str) -> Configuration:
    """The LSTM VAE with this probability of hiding a token from its decoder."""
    match = "tweets" if mode == MATCHED else None
    name = f"LSTM VAE, p = {dropout:g}"
    return Configuration(name, dropout, "tweets-lstm-vae", {"word_dropout": dropout}, mode, match)


def _claims(name: str, reconstruction: float, kl: float) -> tuple[Claim, Claim]:
    """The two cells of a model in the paper's table."""

    def ours(measure: str, key: str) -> Callable[[list[Row]], list[Fact]]:
        return lambda rows: compare([r for r in rows if r.series == name], measure, key)

    return (
        Claim(
            f"{name}: reconstruction {reconstruction}",
            ours("reconstruction, nats", "reconstruction"),
        ),
        Claim(f"{name}: KL {kl}", ours("KL, nats", "kl")),
    )


EXPERIMENT = Experiment(
    title="Table 3: reconstruction and KL on tweets",
    claims=(
        *(c for p, nats in PAPER.items() for c in _claims(f"LSTM VAE, p = {p:g}", *nats)),
        *_claims(HYBRID.series, 58.5, 12.5),
    ),
    grids={
        TWEETS: (
            HYBRID,
            *(lstm(p, mode) for mode in (RELEASED, MATCHED) for p in DROPOUT),
            Configuration(
                "feed-forward", 1, "tweets", {"decoder": "none", "aux_weight": 0.0}, MATCHED
            ),
        )
    },
)
