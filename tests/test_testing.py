"""The accuracy rule itself: what it lets pass, and what it must not."""

import math

import pytest
import torch

from fastvae.testing import assert_accurate, assert_best, assert_same_non_finite, gradients

X = torch.tensor([1.0, -0.25, 0.5])
EPS = torch.finfo(torch.float32).eps


def off(error):
    """x -> x, off by an error in float32 and exact in float64."""
    return lambda x: x + error * (x.dtype == torch.float32)


@pytest.mark.parametrize(
    ("error", "plain", "factor", "passes"),
    [
        (0.0199, 0.01, 2.0, True),
        (-0.0199, 0.01, 2.0, True),
        (0.0201, 0.01, 2.0, False),
        (-0.0201, 0.01, 2.0, False),
        (0.0099, -0.01, 1.0, True),
        (0.0101, -0.01, 1.0, False),
        (EPS, 0.0, 2.0, True),  # 1 ulp of the largest value, which is 1 to 1.5
        (2 * EPS, 0.0, 2.0, False),
        (math.nan, 0.01, 2.0, False),
    ],
)
def test_errors_are_bounded_by_plain_pytorchs(error, plain, factor, passes):
    if passes:
        assert_accurate(off(error), off(plain), X, factor=factor)
        return
    with pytest.raises(AssertionError):
        assert_accurate(off(error), off(plain), X, factor=factor)


def test_each_output_is_looked_at():
    def both(error):
        return lambda x, n: (x, off(error)(x) + n)

    n = torch.tensor([1, 2, 3])
    assert_accurate(both(0.019), both(0.01), X, n)
    with pytest.raises(AssertionError, match=r"^output 1: error 0\.03.* > allowed 0\.02"):
        assert_accurate(both(0.03), both(0.01), X, n)
    with pytest.raises(AssertionError, match="1 outputs, expected 2"):
        assert_accurate(lambda x, n: x, both(0.01), X, n)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x.double(), "output 0 is torch.float64, expected torch.float32"),
        (lambda x: x.view(1, 3), r"output 0 has shape torch.Size\(\[1, 3\]\), expected"),
        (lambda x: x.masked_fill(x < 0, math.inf), "output 0: non-finite values elsewhere"),
    ],
)
def test_what_is_not_alike(fn, message):
    with pytest.raises(AssertionError, match=message):
        assert_accurate(fn, lambda x: x, X)


def test_non_finite_values_hide_no_error():
    values = torch.tensor([1.0, math.inf, 0.5])
    assert_accurate(off(0.019), off(0.01), values)
    with pytest.raises(AssertionError, match=r"output 0: error 0\.03"):
        assert_accurate(off(0.03), off(0.01), values)
    assert_accurate(off(0.03), off(0.01), values[1:2])


def test_an_overflow_of_plain_pytorch_hides_no_error():
    """In float64 the root is finite everywhere."""

    def root(error):
        return lambda x: off(error)(x.square().sqrt())

    values = torch.tensor([1.0, 1e30, 0.5])
    assert_accurate(root(0.019), root(0.01), values)
    with pytest.raises(AssertionError, match=r"output 0: error 0\.03"):
        assert_accurate(root(0.03), root(0.01), values)


@pytest.mark.parametrize(("size", "calls"), [(3, 8), (49_999, 8), (50_000, 1)])
def test_small_inputs_are_tried_at_several_scales(size, calls):
    largest = []
    assert_accurate(lambda x: largest.append(x.max().item()) or x, lambda x: x, torch.ones(size))
    assert largest == [1 + k / 16 for k in range(calls)]


def test_one_scale_may_be_lucky():
    """The largest error of all scales counts."""
    with pytest.raises(AssertionError):
        assert_accurate(lambda x: x + 0.03 * (x.max() > 1.4), off(0.01), X)


def test_non_finite_values_are_told_apart():
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert_same_non_finite(lambda x: x + 7, lambda x: x, values)
    for other in (
        -values,
        values.nan_to_num(posinf=math.inf, neginf=-math.inf),
        values.nan_to_num(),
    ):
        with pytest.raises(AssertionError):
            assert_same_non_finite(lambda x, other=other: other, lambda x: x, values)


@pytest.mark.parametrize(("gap", "passes"), [(0.0, True), (0.039, True), (0.041, False)])
def test_tokens_of_near_ties_may_be_either(gap, passes):
    """Logits may be off by 0.02 where plain PyTorch's are by 0.01, and so may both of two."""
    logits = torch.tensor([0.0, 1.0, 1.0 - gap]).view(1, 1, 3)
    assert_best(torch.tensor([[1]]), off(0.01), logits)
    if passes:
        assert_best(torch.tensor([[2]]), off(0.01), logits)
    for token in (0,) if passes else (0, 2):
        with pytest.raises(AssertionError, match="not the best one"):
            assert_best(torch.tensor([[token]]), off(0.01), logits)


def test_gradients_are_products_with_one_cotangent():
    n, y = torch.tensor([2, 3, 4]), torch.ones(3)
    vjp = gradients(lambda x, n, y: (x**2 * n, n, y * 5))
    dx, dy = vjp(X, n, y)
    cotangent = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(dx, 2 * X * n * cotangent)
    torch.testing.assert_close(dy, 5 * cotangent)
