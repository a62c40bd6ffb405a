"""Table 3: reconstruction and KL on tweets, LSTM VAE with word dropout p beside the hybrid.

Besides: the LSTM VAE without history (p = 1) and the feed-forward VAE.
"""

from fastvae.experiments.grid import BOTH, MATCHED, RELEASED, Claim, Configuration, Experiment
from fastvae.experiments.report import Row
from fastvae.presets import TWEETS

DROPOUT = (0.2, 0.5, 0.8, 1.0)
PAPER = {0.2: (67.4, 1.0), 0.5: (77.1, 2.1), 0.8: (93.7, 3.8)}
HYBRID = Configuration("hybrid, α = 0.2", 0, "tweets", {"aux_weight": 0.2}, BOTH)


def lstm(dropout: float, mode: str) -> Configuration:
    """The LSTM VAE that drops tokens with this probability."""
    match = "tweets" if mode == MATCHED else None
    name = f"LSTM VAE, p = {dropout:g}"
    return Configuration(name, dropout, "tweets-lstm-vae", {"word_dropout": dropout}, mode, match)


def _claim(name: str, reconstruction: float, kl: float) -> Claim:
    def ours(rows: list[Row]) -> str:
        found = [row for row in rows if row.series == name]
        return "; ".join(f"{r['reconstruction']:.1f} / {r['kl']:.1f}" for r in found) or "not run"

    return Claim(f"{name}: reconstruction {reconstruction} / KL {kl} nats", ours)


EXPERIMENT = Experiment(
    title="Table 3: reconstruction and KL on tweets",
    claims=(
        *(_claim(f"LSTM VAE, p = {p:g}", *nats) for p, nats in PAPER.items()),
        _claim(HYBRID.series, 58.5, 12.5),
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
