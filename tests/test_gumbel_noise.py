"""Gumbel noise: the generator's published values, the distribution, and equality of devices."""

import math

import pytest
import torch

from fastvae.ops.gumbel_noise import _philox, gumbel_noise, gumbel_noise_reference

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 67), (5, 2, 64), (40, 33, 129)]
SEEDS = [0, 1, -1, 2**62 + 12345]


def seed(value: int) -> torch.Tensor:
    return torch.tensor([value])


def test_generator_gives_the_published_words():
    """Random123's known answer for a counter and a key of zeros."""
    (words,) = torch.stack(_philox(torch.tensor([0]), seed(0)), 1).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("value", SEEDS)
@pytest.mark.parametrize("counter", [0, 1, 2**35 + 7, 2**62 + 3])
def test_generator_by_hand(counter, value):
    """Philox4x32-10 in Python's whole numbers: Salmon et al. 2011, figure 4."""
    c = [counter % 2**32, counter // 2**32, 0, 0]
    key = [value % 2**64 % 2**32, value % 2**64 // 2**32]
    for _ in range(10):
        high, low = divmod(0xD2511F53 * c[0], 2**32)
        other_high, other_low = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [other_high ^ c[1] ^ key[0], other_low, high ^ c[3] ^ key[1], low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    (words,) = torch.stack(_philox(torch.tensor([counter]), seed(value)), 1).tolist()
    assert words == c


@pytest.mark.parametrize("value", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, value, isa, threads):
    found = gumbel_noise(seed(value), *shape, 0.7)
    assert found.shape == shape and found.dtype == torch.float32
    expected = gumbel_noise_reference(seed(value), *shape, 0.7)
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=5e-7)


def test_values_are_within_a_few_ulps(isa):
    """Two logarithms, each of a few roundings; the worst is near 0, between the two."""
    count = 1 << 18
    found = gumbel_noise(seed(5), 1, 1, count, 1.0).flatten().double()
    words = torch.stack(_philox(torch.arange(count // 4), seed(5)), 1).flatten().double()
    exact = -(-torch.log1p(-(words + 0.5) / 2**32)).log()
    ulp = torch.finfo(torch.float32).eps * exact.abs().clamp(min=1)
    assert ((found - exact).abs() / ulp).max() < 3


@pytest.mark.parametrize("temperature", [math.inf, -math.inf, math.nan, 1e38])
def test_infinite_noise_is_refused(temperature):
    with pytest.raises(RuntimeError, match="temperature must be at most 1e\\+37"):
        gumbel_noise(seed(0), 1, 1, 3, temperature)
    assert gumbel_noise(seed(0), 9, 9, 99, 1e37).isfinite().all()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_triton(shape):
    kernels = pytest.importorskip("fastvae.kernels.gumbel_noise")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = kernels.gumbel_noise(seed(-7).to(device), *shape, 1.5).cpu()
    expected = gumbel_noise_reference(seed(-7), *shape, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_distribution_reaches_into_its_tails():
    """Counts beside those that the distribution function exp(−e⁻ˣ) expects, by chi-square."""
    noise = gumbel_noise(seed(3), 64, 256, 256, 1.0).flatten().double()
    edges = torch.tensor([-2.5, -2.3, -2, -1.5, -1, 0, 1, 2, 4, 6, 8, 10, 11, 12, 13], dtype=float)
    below = torch.cat([torch.zeros(1), (-(-edges).exp()).exp(), torch.ones(1)]).double()
    expected = below.diff() * noise.numel()
    assert expected.min() > 5
    counts = torch.bucketize(noise, edges).bincount(minlength=len(expected))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 15 degrees of freedom: 1e-4 of all seeds


def test_neighbors_are_independent():
    """Correlations of a value with those that come next, and with the same of another seed."""
    a, b = (gumbel_noise(seed(s), 16, 256, 256, 1.0).flatten().double() for s in (5, 6))
    for first, second in [(a[:-k], a[k:]) for k in (1, 2, 3, 4, 16, 64, 256)] + [(a, b)]:
        r = torch.corrcoef(torch.stack([first, second]))[0, 1]
        assert abs(r) < 5 / math.sqrt(len(first))


def test_does_not_depend_on_what_is_beside_it(threads):
    whole = gumbel_noise(seed(9), 6, 11, 13, 1.0)
    torch.testing.assert_close(gumbel_noise(seed(9), 2, 11, 13, 1.0), whole[:2], rtol=0, atol=0)


def test_nothing_is_drawn_for_nothing():
    assert gumbel_noise(seed(1), 0, 3, 5, 1.0).shape == (0, 3, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, dtype=torch.int64), 1, 1, 1), r"seed must have shape \[1\].*, got \[2\]"),
        ((torch.zeros(1), 1, 1, 1), "seed must have dtype int64, got float32"),
        *(
            ((seed(1), *sizes), rf"must be 0 or more, got \{sizes}")
            for sizes in ([-1, 1, 1], [1, -1, 1], [1, 1, -1], [-1, -1, 1])
        ),
        ((seed(1), 2**40, 2**40, 2**40), "at most 2.40 elements"),
        ((seed(1), 2**20, 2**18, 1), "sizes too large"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        gumbel_noise(*arguments, 1.0)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int32", "uint8", "bool"]
)
def test_a_wrong_dtype_is_named(dtype):
    with pytest.raises(RuntimeError, match=f"seed must have dtype int64, got {dtype}$"):
        gumbel_noise(torch.zeros(1, dtype=getattr(torch, dtype)), 1, 1, 1, 1.0)


def test_fake_has_the_shape_of_the_kernel():
    torch.library.opcheck(torch.ops.fastvae.gumbel_noise, (seed(1), 2, 3, 5, 1.0))
