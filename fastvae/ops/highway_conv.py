"""Highway masked convolution, kernel 2, undilated: one layer of the ByteNet decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.autograd import register_autograd, register_gradient
from fastvae.ops.checks import (
    check_highway_conv,
    check_highway_conv_gate,
    check_highway_conv_project_backward,
)
from fastvae.ops.fallback import register_fallback
from fastvae.ops.precision import accumulate_dtype


def highway_conv_project(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, B, C], weight [3C, C, 2], bias [3C] -> a [T, B, 3C], mean, m2 [3C]: in training.

        aₜ = W₀ xₜ₋₁ + W₁ xₜ + b,   x₋₁ = 0
        m2 = Σ (a − mean)²                                 over T and B, per channel

    The first of the two ops that a highway layer is in training: its statistics are tensors that
    processes can reduce. Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        x: the layer's input, [T, B, C].
        weight: W₀ = weight[..., 0] and W₁ = weight[..., 1], as in `torch.nn.Conv1d`, [3C, C, 2].
        bias: b, [3C].

    Returns:
        a in the dtype of `x`; mean and m2 in float32 (float64 for float64).

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    return torch.ops.fastvae.highway_conv_project(x, weight, bias)


def highway_conv_gate(
    a: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, carry: bool = True
) -> Tensor:
    """a [T, B, 3C], x [T, B, C], mean, scale, shift [3C] -> y [T, B, C]: norm and highway gates.

        i, f, g = chunk((aₜ − mean) · scale + shift)
        yₜ = σ(f) xₜ + σ(i) tanh(g)                        carry = True
        yₜ = σ(i) tanh(g)                                  carry = False

    Semeniuta et al. 2017, arXiv:1702.02390; gates after Srivastava et al. 2015, arXiv:1505.00387.

    Args:
        a: pre-activations of `highway_conv_project`, [T, B, 3C].
        x: the layer's input, [T, B, C].
        mean: mean of the batch norm, [3C] in float32 (float64 for float64), as the next two.
        scale: its weight over the standard deviation, [3C].
        shift: its bias, [3C].
        carry: whether the layer's input is carried on.

    Returns:
        y, [T, B, C], in the dtype of `x`.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    return torch.ops.fastvae.highway_conv_gate(a, x, mean, scale, shift, carry)


def highway_conv(x: Tensor, weight: Tensor, bias: Tensor, carry: bool = True) -> Tensor:
    """x [T, B, C], weight [3C, C, 2], bias [3C] -> y [T, B, C]: a layer with its norm folded in.

        i, f, g = chunk(W₀ xₜ₋₁ + W₁ xₜ + b),   x₋₁ = 0
        yₜ = σ(f) xₜ + σ(i) tanh(g)                        without the first term if not `carry`

    Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        x: the layer's input, [T, B, C].
        weight: W₀ = weight[..., 0] and W₁ = weight[..., 1], [3C, C, 2].
        bias: b, [3C].
        carry: whether the layer's input is carried on.

    Returns:
        y, [T, B, C], in the dtype of `x`.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    if not x.numel():  # no kernel starts for nothing
        return highway_conv_reference(x, weight, bias, carry)
    return torch.ops.fastvae.highway_conv(x, weight, bias, carry)


def highway_conv_project_reference(
    x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same function in plain PyTorch: what every kernel is tested against."""
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    a = F.linear(before, weight[..., 0]) + F.linear(x, weight[..., 1], bias)
    wide = a.to(accumulate_dtype(a.dtype))
    mean = wide.mean((0, 1))
    return a, mean, (wide - mean).square().sum((0, 1))


def highway_conv_gate_reference(
    a: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, carry: bool = True
) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    i, f, g = ((a - mean) * scale + shift).chunk(3, -1)
    y = i.sigmoid() * g.tanh()
    return (f.sigmoid() * x + y if carry else y).to(x.dtype)


def highway_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, carry: bool = True) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    a, mean, _ = highway_conv_project_reference(x, weight, bias)
    return highway_conv_gate_reference(a, x, *_identity_norm(mean), carry)


def _identity_norm(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zeros = torch.zeros_like(like)
    return zeros, torch.ones_like(like), zeros


@torch.library.register_fake("fastvae::highway_conv_project")
def _fake_project(x, weight, bias):
    T, B, C = check_highway_conv(x, weight, bias)
    mean, m2 = (x.new_empty(3 * C, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(T, B, 3 * C), mean, m2


@torch.library.register_fake("fastvae::highway_conv_project_backward")
def _fake_project_backward(da, dmean, dm2, x, weight, a, mean):
    check_highway_conv_project_backward(da, dmean, dm2, x, weight, a, mean)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@torch.library.register_fake("fastvae::highway_conv_gate")
def _fake_gate(a, x, mean, scale, shift, carry):
    check_highway_conv_gate(a, x, mean, scale, shift)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastvae::highway_conv_gate_backward")
def _fake_gate_backward(dy, a, x, mean, scale, shift, carry):
    check_highway_conv_gate(a, x, mean, scale, shift, dy)
    return tuple(t.new_empty(t.shape) for t in (a, x, mean, scale, shift))


@torch.library.register_fake("fastvae::highway_conv")
def _fake_folded(x, weight, bias, carry):
    check_highway_conv(x, weight, bias)
    return x.new_empty(x.shape)


def highway_conv_project_backward_reference(da, dmean, dm2, x, weight, a, mean):
    """The backward of highway_conv_project in plain PyTorch."""
    # mean and m2 reach a through d mean / d a = 1 / n and d m2 / d a = 2 (a − mean).
    n = a.shape[0] * a.shape[1]
    total = (da + dmean / n + 2 * dm2 * (a.to(mean.dtype) - mean)).to(x.dtype)
    after = torch.cat([total[1:], torch.zeros_like(total[:1])])
    dx = total @ weight[..., 1] + after @ weight[..., 0]
    taps = (total[1:].flatten(0, 1), x[:-1].flatten(0, 1)), (total.flatten(0, 1), x.flatten(0, 1))
    dweight = torch.stack([rows.T @ inputs for rows, inputs in taps], -1)
    # Σ (a − mean) = 0: a bias moves the mean alone.
    return dx, dweight, (da.to(mean.dtype).sum((0, 1)) + dmean).to(x.dtype)


def highway_conv_gate_backward_reference(dy, a, x, mean, scale, shift, carry):
    """The backward of highway_conv_gate in plain PyTorch."""
    dy, deviation = dy.to(mean.dtype), a - mean
    i, f, g = (deviation * scale + shift).chunk(3, -1)
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    df = dy * x * f * (1 - f) if carry else torch.zeros_like(f)
    dz = torch.cat([dy * g * i * (1 - i), df, dy * i * (1 - g * g)], -1)
    da = dz * scale
    dx = (dy * f).to(x.dtype) if carry else torch.zeros_like(x)
    sums = -da.sum((0, 1)), (dz * deviation).sum((0, 1)), dz.sum((0, 1))
    return da.to(a.dtype), dx, *sums


for _name, _reference in {
    "highway_conv_project": highway_conv_project_reference,
    "highway_conv_project_backward": highway_conv_project_backward_reference,
    "highway_conv_gate": highway_conv_gate_reference,
    "highway_conv_gate_backward": highway_conv_gate_backward_reference,
    "highway_conv": highway_conv_reference,
}.items():
    register_fallback(_name, _reference)


def _project_setup(ctx, inputs, output):
    x, weight, _ = inputs
    a, mean, _ = output
    ctx.save_for_backward(x, weight, a, mean)


def _project_backward(ctx, da, dmean, dm2):
    return torch.ops.fastvae.highway_conv_project_backward(da, dmean, dm2, *ctx.saved_tensors)


def _gate_setup(ctx, inputs, output):
    *tensors, ctx.carry = inputs
    ctx.save_for_backward(*tensors)


def _gate_backward(ctx, dy):
    grads = torch.ops.fastvae.highway_conv_gate_backward(dy, *ctx.saved_tensors, ctx.carry)
    return (*grads, None)


def _folded_setup(ctx, inputs, output):
    *tensors, ctx.carry = inputs
    ctx.save_for_backward(*tensors)


def _folded_backward(ctx, dy):
    # The pre-activations are computed again: inference keeps nothing of them.
    x, weight, bias = ctx.saved_tensors
    a, mean, _ = torch.ops.fastvae.highway_conv_project(x, weight, bias)
    da, dx, *_ = torch.ops.fastvae.highway_conv_gate_backward(
        dy, a, x, *_identity_norm(mean), ctx.carry
    )
    zeros = torch.zeros_like(mean)
    through, dweight, dbias = torch.ops.fastvae.highway_conv_project_backward(
        da, zeros, zeros, x, weight, a, zeros
    )
    return dx + through, dweight, dbias, None


register_autograd("highway_conv_project", _project_backward, _project_setup)
register_autograd("highway_conv_gate", _gate_backward, _gate_setup)
register_autograd("highway_conv", _folded_backward, _folded_setup)
register_gradient("highway_conv_project")
register_gradient("highway_conv_gate")
