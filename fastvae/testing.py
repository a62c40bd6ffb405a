"""The accuracy rule of tests/ and benchmarks/: errors are bounded relative to plain PyTorch's."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_accurate(
    fn: Callable, reference: Callable, *inputs: Tensor, factor: float = 2.0
) -> None:
    """Check that the error of `fn` is at most `factor` times plain PyTorch's, plus 1 ulp.

    Both errors are the largest absolute difference of an output from `reference` in float64. The
    ulp is that of the output's largest value, and at least that of float64 at 1. On small inputs
    errors depend on chance: these are scaled by several factors, by more factors before the check
    fails, and the largest error counts on both sides. Non-finite values must be where the reference
    has them. Dtypes and shapes must match the reference's.

    Args:
        fn: the kernel, tensors -> tensor or tuple of tensors.
        reference: the same function in plain PyTorch.
        inputs: inputs of both; non-floating tensors are passed on unchanged.
        factor: the largest accepted ratio of the errors.

    Raises:
        AssertionError: an output has a larger error, or another dtype, shape or non-finite value;
            the message names it.
    """
    for count in (8, 64) if sum(t.numel() for t in inputs) < 50_000 else (1,):
        scales = [1 + k / (2 * count) for k in range(count)]
        trials = [_losses(fn, reference, [_scaled(t, scale) for t in inputs]) for scale in scales]
        failures = []
        for n, output in enumerate(zip(*trials, strict=True)):
            error, plain, ulp = (max(values) for values in zip(*output, strict=True))
            allowed = factor * plain + ulp
            if not error <= allowed:
                failures.append(f"output {n}: error {error:.3g} > allowed {allowed:.3g}")
        if not failures:
            return
    raise AssertionError("; ".join(failures))


def assert_same_non_finite(fn: Callable, reference: Callable, *inputs: Tensor) -> None:
    """Check that the outputs of `fn` have NaN, ∞ and −∞ exactly where the reference has them.

    Meant for forward passes: which non-finite value a gradient has depends on the order of
    operations.

    Args:
        fn: the kernel, tensors -> tensor or tuple of tensors.
        reference: the same function in plain PyTorch.
        inputs: inputs of both.

    Raises:
        AssertionError: an output has other non-finite values; the message names it.
    """
    outputs = zip(_outputs(fn, inputs), _outputs(reference, inputs), strict=True)
    for n, pair in enumerate(outputs):
        got, want = (t.where(~t.isfinite(), 0) for t in pair)
        difference = f"output {n}: other non-finite values"
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=difference)


def _scaled(t: Tensor, scale: float) -> Tensor:
    """A floating-point tensor times `scale`, in its dtype; any other tensor unchanged."""
    return t if scale == 1 or not t.is_floating_point() else (t.detach() * scale).to(t.dtype)


def _losses(fn: Callable, reference: Callable, inputs) -> list[tuple[float, float, float]]:
    """For each output: error of `fn`, error of plain PyTorch, 1 ulp."""
    gold = _outputs(reference, [t.double() if t.is_floating_point() else t for t in inputs])
    plain, got = _outputs(reference, inputs), _outputs(fn, inputs)
    assert len(got) == len(plain), f"{len(got)} outputs, expected {len(plain)}"
    losses = []
    for n, (k, p, g) in enumerate(zip(got, plain, gold, strict=True)):
        assert k.dtype == p.dtype, f"output {n} is {k.dtype}, expected {p.dtype}"
        assert k.shape == p.shape, f"output {n} has shape {k.shape}, expected {p.shape}"
        assert torch.equal(k.isfinite(), p.isfinite()), f"output {n}: non-finite values elsewhere"
        finite = g.isfinite() & p.isfinite()
        if not finite.any():
            losses.append((0.0, 0.0, 0.0))
            continue
        k, p, g = k.double()[finite], p.double()[finite], g[finite]
        ulp = max(torch.finfo(got[n].dtype).eps * g.abs().max().item(), torch.finfo(g.dtype).eps)
        losses.append(((k - g).abs().max().item(), (p - g).abs().max().item(), ulp))
    return losses


def assert_best(tokens: Tensor, logits: Callable, *inputs: Tensor) -> None:
    """Check that tokens [B, T] are greedy: the largest logit of each step, given those before.

    A logit may be off by what the accuracy rule allows. If the two largest logits differ by less
    than twice that, either may be chosen; otherwise only the largest passes.

    Args:
        tokens: the decoded tokens, [B, T].
        logits: inputs -> logits of each step, [T, B, V], given the tokens.
        inputs: inputs of `logits`.

    Raises:
        AssertionError: a token is not the best one.
    """
    gold = logits(*[t.double() if t.is_floating_point() else t for t in inputs])
    plain = logits(*inputs)
    ulp = torch.finfo(plain.dtype).eps * gold.abs().max()
    allowed = 2 * (plain.double() - gold).abs().max() + ulp
    chosen = gold.gather(-1, tokens.T.unsqueeze(-1)).squeeze(-1)
    assert (gold.amax(-1) - chosen <= 2 * allowed).all(), "a token is not the best one"


def gradients(fn: Callable) -> Callable:
    """fn -> its vector-Jacobian product with a fixed cotangent, as a function of the same inputs.

    The result maps tensors to the gradients of the floating-point ones, so that `assert_accurate`
    can compare backward passes.
    """

    def vjp(*inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]  # strides stay
        outputs = [y for y in _outputs(fn, inputs) if y.requires_grad]
        cotangents = [torch.linspace(-1, 1, y.numel()).to(y).view_as(y) for y in outputs]
        wanted = [t for t in inputs if t.requires_grad]
        return torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)

    return vjp


def _outputs(fn: Callable, inputs) -> tuple[Tensor, ...]:
    """Call fn -> its outputs as a tuple."""
    result = fn(*inputs)
    return result if isinstance(result, tuple) else (result,)
