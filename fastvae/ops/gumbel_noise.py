"""Gumbel noise, which turns the largest of the logits into a sample."""

import torch
from torch import Tensor

from fastvae.ops.checks import check_gumbel_noise
from fastvae.ops.fallback import register_fallback

HOTTEST = 1e37  # temperature: the noise is finite in float32

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def gumbel_noise(
    seed: Tensor, steps: int, batch: int, vocab_size: int, temperature: float
) -> Tensor:
    """seed [1] -> noise [steps, batch, vocab_size]: Gumbel noise times the temperature.

        gᵢ = −temperature · log(−log(1 − uᵢ)),   uᵢ = (xᵢ + ½) / 2³²

    The largest of logits + g is a sample of softmax(logits / temperature). xᵢ is word i mod 4 of
    Philox4x32-10 at counter ⌊i / 4⌋ with the seed as its key, so every device draws the same
    numbers. Salmon et al. 2011, doi:10.1145/2063384.2063405.

    Args:
        seed: the key, [1] int64.
        steps: T.
        batch: B.
        vocab_size: V.
        temperature: what multiplies the noise.

    Returns:
        float32 noise on the seed's device, between −3.2 and 22.9 times the temperature.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    if not abs(temperature) <= HOTTEST:
        raise RuntimeError(f"temperature must be at most {HOTTEST:g} in size, got {temperature}")
    return torch.ops.fastvae.gumbel_noise(seed, steps, batch, vocab_size, temperature)


def gumbel_noise_reference(
    seed: Tensor, steps: int, batch: int, vocab_size: int, temperature: float
) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    count = steps * batch * vocab_size
    blocks = torch.arange(-(-count // 4), device=seed.device)
    words = torch.stack(_philox(blocks, seed), 1).flatten()[:count].double()
    exponential = -torch.log1p(-(words + 0.5) / 2**32)
    return (-temperature * exponential.log()).float().view(steps, batch, vocab_size)


def _philox(counter: Tensor, seed: Tensor) -> list[Tensor]:
    """Ten rounds: the four 32-bit words of each 64-bit counter, in int64."""
    c = [counter & WORD, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        products = [MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]]  # modulo 2^64, all that is needed
        high, low = [(p >> 32) & WORD for p in products], [p & WORD for p in products]
        c = [high[1] ^ c[1] ^ key[0], low[1], high[0] ^ c[3] ^ key[1], low[0]]
        key = [(k + step) & WORD for k, step in zip(key, KEY_STEPS, strict=True)]
    return c


@torch.library.register_fake("fastvae::gumbel_noise")
def _fake(seed, steps, batch, vocab_size, temperature):
    check_gumbel_noise(seed, steps, batch, vocab_size)
    return seed.new_empty(steps, batch, vocab_size, dtype=torch.float32)


def _on_any_device(seed, steps, batch, vocab_size, temperature):
    check_gumbel_noise(seed, steps, batch, vocab_size)
    return gumbel_noise_reference(seed, steps, batch, vocab_size, temperature)


register_fallback("gumbel_noise", _on_any_device)
