"""A whole training step (forward, backward, Adam) of the paper's models, and of our baseline.

`compile` is torch.compile of the plain twin. For models with an LSTM it is left out: the loop
unrolled takes minutes to compile (bench_layer_norm_lstm.py has its step compiled).
"""

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.testing import assert_accurate

PTB = {"vocab_size": 51, "length": 48, "latent_size": 50, "encoder_channels": (128, 256)}
BYTENET = {**PTB, "length": 56, "decoder": "bytenet"}
BASELINE = {"vocab_size": 51, "length": 48, "hidden_size": 500}
WORK = {
    "PTB hybrid, LSTM 500": ("HybridVAE", {**PTB, "hidden_size": 500}, 64),
    "PTB hybrid, ByteNet 3": ("HybridVAE", {**BYTENET, "conv_layers": 3}, 64),
    "PTB hybrid, ByteNet 10": ("HybridVAE", {**BYTENET, "conv_layers": 10}, 64),
    "PTB LSTM VAE 500": ("LSTMVAE", BASELINE, 64),
    "tweets hybrid, LSTM 1000": ("HybridVAE", {"vocab_size": 259, "length": 128}, 32),
    "tweets LSTM VAE 1000": ("LSTMVAE", {"vocab_size": 259, "length": 128}, 32),
}
CASES = [
    (work, rival)
    for work in WORK
    for rival in ("fastvae", "eager", *(("compile",) if "ByteNet" in work else ()))
]


@pytest.mark.parametrize("work, rival", CASES)
def test_training_step(time, work, rival):
    name, arguments, batch = WORK[work]
    model = getattr(fastvae if rival == "fastvae" else reference, name)(**arguments)
    tokens = torch.randint(arguments["vocab_size"], (batch, arguments["length"]))
    if rival == "fastvae":
        _check(model, name, arguments, tokens[:4])
    run = torch.compile(model) if rival == "compile" else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        run(tokens, 0.5).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    time(f"training step, {work}, B={batch}", step, 0.0, rounds=3 if "tweets" in work else 5)


def _check(model, name: str, arguments: dict, tokens: torch.Tensor) -> None:
    """The loss of a few samples, by the accuracy rule, for given noise and nothing dropped."""
    twins = {}
    for dtype in (torch.float32, torch.float64):
        twins[dtype] = getattr(reference, name)(**arguments, dtype=dtype)
        twins[dtype].load_state_dict(model.state_dict())
        twins[dtype].eval()
    model.eval()
    dropped = torch.zeros_like(tokens, dtype=torch.bool)
    noise = torch.randn(len(tokens), model.latent_size)
    assert_accurate(
        lambda n: model(tokens, 0.5, noise=n, dropped=dropped).loss,
        lambda n: twins[n.dtype](tokens, 0.5, noise=n, dropped=dropped).loss,
        noise,
    )
    model.train()
