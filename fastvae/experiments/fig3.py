"""Figure 3: training curves of autoencoders without history, feed-forward and LSTM, by length.

The KL weight is 0 and every previous token is hidden, so the decoder reads z only. As released, the
LSTM has 500 units and the size of the feed-forward model only at the largest length; matched, it
has that size at each length.
"""

from fastvae.experiments.figures import curves
from fastvae.experiments.grid import (
    BOTH,
    CHARACTERS,
    MATCHED,
    RELEASED,
    Claim,
    Configuration,
    Experiment,
)
from fastvae.experiments.report import facts

AUTOENCODER = {"kl_floor": 0.0, "kl_start": 0, "kl_end": 0, "kl_target": 0.0}
# Length -> LSTM units that make the recurrent model as large as the feed-forward one.
EQUAL_SIZE = {20: 244, 32: 288, 52: 352, 100: 476}
CONV, LSTM = "feed-forward", "LSTM"
AXIS, BITS = "length", "reconstruction, bits per character"


def _configurations(length: int) -> tuple[Configuration, ...]:
    setting = {"length": length, **AUTOENCODER}
    lstm = {"word_dropout": 1.0, **setting}
    same_size = {"hidden_size": EQUAL_SIZE[length], **lstm}
    return (
        Configuration(CONV, length, "ptb-conv", setting, BOTH),
        Configuration(LSTM, length, "ptb-lstm-vae", lstm, RELEASED),
        Configuration(LSTM, length, "ptb-lstm-vae", same_size, MATCHED, match="ptb-conv"),
    )


EXPERIMENT = Experiment(
    title="Figure 3: training curves of autoencoders",
    claims=(
        Claim(
            "the feed-forward model converges at every length",
            lambda rows: facts(rows, BITS, "reconstruction_bpc", ".2f", series=CONV, axis=AXIS),
        ),
        Claim(
            "the LSTM stalls from a length of about 30",
            lambda rows: facts(rows, BITS, "reconstruction_bpc", ".2f", series=LSTM, axis=AXIS),
        ),
    ),
    grids={CHARACTERS: tuple(p for length in EQUAL_SIZE for p in _configurations(length))},
    axis=AXIS,
    draw=curves,
    shows="curves",
)
