"""A whole training step (forward, backward, Adam) of the paper's models, and of our baseline.

`compile` is torch.compile of the reference model. For models with an LSTM it is left out: the loop
unrolled takes minutes to compile (bench_layer_norm_lstm.py has its step compiled). On a GPU
`recorded` is our step and `graph` the reference model's as one CUDA graph, as fastvae.train does.

Batches of lines have sequences as long as those of tweets (mean 75 of 128 bytes, their end with
them) and of place names (mean 10.9 of 32 characters); `pads computed` is our step that leaves pads
out of the loss alone, as on a GPU.
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
PLACES = {"vocab_size": 200, "length": 32, "encoder_channels": (128, 256)}
PLACES |= {"feature_channels": 100, "hidden_size": 300}
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
# Deciles of the lengths of 100,000 lines, from the shortest to the longest.
LINES_WORK = {  # name: sizes, batch, deciles
    "tweets as lines, LSTM 1000": (TWEETS, 32, (11, 35, 46, 56, 66, 76, 86, 94, 103, 116, 128)),
    "place names, LSTM 300": (PLACES, 64, (3, 6, 7, 8, 9, 10, 11, 12, 14, 17, 32)),
}


def lines(batch: int, length: int, vocab_size: int, deciles: tuple[int, ...]) -> Tensor:
    """Sequences of evenly spread ranks, in some order -> tokens [batch, length], 0 after an end."""
    rank = (torch.randperm(batch) + 0.5) * 10 / batch
    low, high = torch.tensor(deciles)[torch.stack([rank.long(), rank.long() + 1])]
    ends = (low + (high - low) * rank.frac()).round().clamp(max=length)
    tokens = torch.randint(1, vocab_size, (batch, length))
    return tokens.masked_fill(torch.arange(length) >= ends.unsqueeze(1), 0)


def check(name: str, arguments: dict, low: bool, tokens: Tensor | None = None, pads=False) -> None:
    """The loss of a few short samples, by the accuracy rule, for given noise, nothing dropped."""
    arguments = arguments | {"length": 32}
    model = getattr(fastvae, name)(**arguments).eval()
    if pads:
        compute_pads(model)
    reference_modules = {}
    for dtype in (torch.float32, torch.float64):
        reference_modules[dtype] = getattr(reference, name)(**arguments, dtype=dtype).eval()
        reference_modules[dtype].load_state_dict(model.state_dict())
    if tokens is None:
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


def training_step(model, run, low: bool, capturable: bool = False):
    """tokens -> loss: forward by `run`, backward and Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True, capturable=capturable)
    device = torch.get_default_device()

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = run(tokens, 0.5).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def training(line: str, name: str, sizes: dict, batch: int, compiled, rival=None):
    """One step of the line's model."""
    package, low = fastvae if line.startswith("fastvae") else reference, line.endswith("bf16")
    model = rival(name)(**sizes) if line == "rival" else getattr(package, name)(**sizes)
    tokens = torch.randint(sizes["vocab_size"], (batch, sizes["length"]))
    run = compiled(model) if line.startswith("compile") else model
    recorded = line.startswith(("fastvae recorded", "graph"))
    step, device = training_step(model, run, low, capturable=recorded), torch.get_default_device()
    if not recorded:
        return partial(step, tokens)
    replayed = fastvae.RecordedStep(step, device)
    for _ in range(5):
        assert replayed(tokens).isfinite()
    assert not replayed.failed
    return partial(replayed, tokens)


def compute_pads(model) -> None:
    model._packing = lambda tokens: None


def multiply_adds(name: str, sizes: dict, decoder_steps: float | None = None) -> float:
    """Of one sample's forward pass, with one-hot products as lookups, and decoder steps so many."""
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
    return total + (decoder_steps or L) * (token + decoder.classifier.weight.numel() + D * V)


@pytest.mark.parametrize("work, line", CASES)
def test_training_step(timer, compiled, steps, rival, work, line):
    name, sizes, batch = WORK[work]
    time = timer(f"training step, {work.removesuffix(', larger batch')}, B={batch}", line)
    sizes = sizes | {"length": steps(sizes["length"], few=32)}
    if line.startswith("fastvae"):
        check(name, sizes, line.endswith("bf16"))
    beside = None if line == "fastvae" else training("fastvae", name, sizes, batch, compiled)
    time(
        training(line, name, sizes, batch, compiled, rival),
        beside,
        tokens=batch * sizes["length"],
        flops=3 * 2 * batch * multiply_adds(name, sizes),
        rounds=3 if "tweets" in work else 5,
    )


@pytest.mark.parametrize("line", ["fastvae", "pads computed"])
@pytest.mark.parametrize("work", LINES_WORK)
def test_lines(timer, steps, work, line):
    sizes, batch, deciles = LINES_WORK[work]
    time = timer(f"training step, {work}, B={batch}", line)
    sizes = sizes | {"length": steps(sizes["length"], few=32), "pad_id": 0, "mask_pad": True}
    V, pads = sizes["vocab_size"], line == "pads computed"
    check("HybridVAE", sizes, False, lines(4, 32, V, deciles), pads)
    tokens = lines(batch, sizes["length"], V, deciles)
    count = int((tokens != 0).sum())

    def step_of(pads: bool):
        model = fastvae.HybridVAE(**sizes)
        if pads:
            compute_pads(model)
        return training_step(model, model, False), tokens

    time(
        partial(*step_of(pads)),
        partial(*step_of(False)) if pads else None,
        tokens=count,
        flops=6 * batch * multiply_adds("HybridVAE", sizes, None if pads else count / batch),
        rounds=5 if "tweets" in work else 15,
    )
