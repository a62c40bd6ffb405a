"""A whole training step (forward, backward, Adam) of the paper's models, and of our baseline.

`compile` is torch.compile of the reference model. For models with an LSTM it is left out: the loop
unrolled takes minutes to compile (bench_layer_norm_lstm.py has its step compiled). On a GPU
`recorded` is our step and `graph` the reference model's as one CUDA graph, as fastvae.train does.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.testing import assert_accurate

PTB = {"vocab_size": 51, "length": 48, "latent_size": 50, "encoder_channels": (128, 256)}
BYTENET = {**PTB, "length": 56, "decoder": "bytenet"}
BASELINE = {"vocab_size": 51, "length": 48, "hidden_size": 500}
TWEETS = {"vocab_size": 259, "length": 128}
SMALL = {"vocab_size": 259, "length": 24, "latent_size": 32, "encoder_channels": (64, 128)}
SMALL |= {"feature_channels": 100, "hidden_size": 200}
WORK = {  # name: class, sizes, batch
    "PTB hybrid, LSTM 500": ("HybridVAE", {**PTB, "hidden_size": 500}, 64),
    "PTB hybrid, ByteNet 3": ("HybridVAE", {**BYTENET, "conv_layers": 3}, 64),
    "PTB hybrid, ByteNet 10": ("HybridVAE", {**BYTENET, "conv_layers": 10}, 64),
    "PTB LSTM VAE 500": ("LSTMVAE", BASELINE, 64),
    "tweets hybrid, LSTM 1000": ("HybridVAE", TWEETS, 32),
    "tweets LSTM VAE 1000": ("LSTMVAE", TWEETS, 32),
    "small hybrid, LSTM 200": ("HybridVAE", SMALL, 64),
    "small hybrid, LSTM 200, larger batch": ("HybridVAE", SMALL, 128),
}
LINES = "fastvae", "fastvae bf16", "eager", "eager bf16", "compile", "compile bf16", "rival"
LINES += "fastvae recorded", "fastvae recorded bf16", "graph", "graph bf16"
CASES = [
    (work, line) for work in WORK for line in LINES if "ByteNet" in work or "compile" not in line
]


def check(name: str, arguments: dict, low: bool) -> None:
    """The loss of a few short samples, by the accuracy rule, for given noise, nothing dropped."""
    arguments = arguments | {"length": 32}
    model = getattr(fastvae, name)(**arguments).eval()
    reference_modules = {}
    for dtype in (torch.float32, torch.float64):
        reference_modules[dtype] = getattr(reference, name)(**arguments, dtype=dtype).eval()
        reference_modules[dtype].load_state_dict(model.state_dict())
    tokens = torch.randint(arguments["vocab_size"], (4, 32))
    drop_mask = torch.zeros_like(tokens, dtype=torch.bool)

    def loss(noise: Tensor, model) -> Tensor:
        with torch.autocast(
            torch.get_default_device().type,
            torch.bfloat16,
            enabled=low and noise.dtype == torch.float32,
        ):
            return model(tokens, 0.5, eps=noise, drop_mask=drop_mask).loss

    noise = torch.randn(4, model.latent_size)
    assert_accurate(lambda n: loss(n, model), lambda n: loss(n, reference_modules[n.dtype]), noise)


def training(line: str, name: str, sizes: dict, batch: int, compiled, rival=None):
    """One step of the line's model."""
    package, low = fastvae if line.startswith("fastvae") else reference, line.endswith("bf16")
    model = rival(name)(**sizes) if line == "rival" else getattr(package, name)(**sizes)
    tokens = torch.randint(sizes["vocab_size"], (batch, sizes["length"]))
    run = compiled(model) if line.startswith("compile") else model
    recorded = line.startswith(("fastvae recorded", "graph"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True, capturable=recorded)
    device = torch.get_default_device()

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = run(tokens, 0.5).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    if not recorded:
        return partial(step, tokens)
    replayed = fastvae.RecordedStep(step, device)
    for _ in range(5):
        assert replayed(tokens).isfinite()
    assert not replayed.failed
    return partial(replayed, tokens)


def multiply_adds(name: str, sizes: dict) -> float:
    """Of one sample's forward pass, with one-hot products as lookups."""
    model = getattr(reference, name)(**sizes, device="meta")
    L, V, Z, decoder = model.length, model.vocab_size, model.latent_size, model.decoder
    if name == "LSTMVAE":
        H = model.encoder.hidden_size
        return L * (8 * H * H + H * V) + 4 * H * Z
    steps, total = L // 2, 0
    for conv in model.encoder.convs[1:]:
        steps //= 2
        total += steps * conv.weight.numel()
    total += model.encoder.linear.weight.numel() + model.deconvolution.linear.weight.numel()
    for conv in model.deconvolution.convs:
        total += steps * conv.weight.numel()
        steps *= 2
    D = model.head.in_features
    if sizes.get("decoder") == "bytenet":
        inputs = decoder.input.out_features * D
        token = inputs + sum(layer.weight.numel() for layer in decoder.stack.layers)
    else:
        token = 4 * decoder.lstm.hidden_size * (decoder.lstm.hidden_size + D)
    return total + L * (token + decoder.classifier.weight.numel() + D * V)


@pytest.mark.parametrize("work, line", CASES)
def test_training_step(time, compiled, steps, rival, work, line):
    name, sizes, batch = WORK[work]
    sizes = sizes | {"length": steps(sizes["length"], few=32)}
    if line.startswith("fastvae"):
        check(name, sizes, line.endswith("bf16"))
    beside = None if line == "fastvae" else training("fastvae", name, sizes, batch, compiled)
    time(
        f"training step, {work.removesuffix(', larger batch')}, B={batch}",
        line,
        training(line, name, sizes, batch, compiled, rival),
        beside,
        tokens=batch * sizes["length"],
        flops=3 * 2 * batch * multiply_adds(name, sizes),
        rounds=3 if "tweets" in work else 5,
    )
