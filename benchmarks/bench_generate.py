"""Generation with a small model, greedy and at temperature 1, as a user calls it."""

import pytest
import torch

import fastvae
from fastvae import reference

SIZES = {"vocab_size": 259, "length": 24, "latent_size": 32, "encoder_channels": (64, 128)}
SIZES |= {"feature_channels": 100, "hidden_size": 200}
LINES = "fastvae", "eager"
WORKS = {"small hybrid, greedy": 0.0, "small hybrid, temperature 1": 1.0}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("B", [64, 128])
@pytest.mark.parametrize("work", WORKS)
@torch.no_grad()
def test_generate(timer, work, B, line):
    time = timer(f"{work}, B={B}", line)
    torch.manual_seed(0)
    ours, reference_model = fastvae.HybridVAE(**SIZES).eval(), reference.HybridVAE(**SIZES).eval()
    reference_model.load_state_dict(ours.state_dict())
    z, temperature = torch.randn(B, SIZES["latent_size"]), WORKS[work]

    def generate(model):
        def run():
            generator = torch.Generator(z.device).manual_seed(0)
            return model.generate(z, temperature=temperature, generator=generator)

        return run

    # Near ties may fall either way: most tokens are the same.
    assert (generate(ours)() == generate(reference_model)()).float().mean() > 0.9
    time(
        generate(ours if line == "fastvae" else reference_model),
        None if line == "fastvae" else generate(ours),
        tokens=B * SIZES["length"],
        flops=2 * B * SIZES["length"] * (4 * 200 * (200 + 100) + 259 * 200),
        rounds=9,
    )
